/* SPDX-License-Identifier: Apache-2.0 */
/* The test door: single table entries by address, for tests and the kernel bench. */
#ifndef DSV4_PY_KERNELS_H
#define DSV4_PY_KERNELS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Adds kernel_variants() and cpu_sets() to the module; -1 with an exception set on failure. */
int dsv4_py_add_kernels(PyObject *module);

#endif
