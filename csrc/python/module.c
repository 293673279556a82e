/* SPDX-License-Identifier: Apache-2.0 */
/* The extension module dsv4._core (multi-phase initialisation). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "py_kernels.h"

static int exec_core(PyObject *module) {
    return dsv4_py_add_kernels(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_core},
    {0, NULL},
};

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_core",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void); /* CPython declares it nowhere */

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&core_module);
}
