/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The test door: which variants of each kernel this machine has, with their addresses, so that
 * tests and benchmarks call them through ctypes.  With py_limits.c the one place of the bindings
 * that includes kernel headers.
 */
#include "py_kernels.h"

#include <string.h>

#include "cpu/dispatch.h"

enum { MAX_VARIANTS = 64 };

/* "avx2, avx512, ...": a new reference. */
static PyObject *known_sets(void) {
    PyObject *names = PyList_New(0), *comma = PyUnicode_FromString(", "), *joined = NULL;
    if (!names || !comma)
        goto done;
    for (int i = 0; dsv4k_cpu_set_names[i]; i++) {
        PyObject *name = PyUnicode_FromString(dsv4k_cpu_set_names[i]);
        int failed = !name || PyList_Append(names, name) < 0;
        Py_XDECREF(name);
        if (failed)
            goto done;
    }
    joined = PyUnicode_Join(comma, names);
done:
    Py_XDECREF(names);
    Py_XDECREF(comma);
    return joined;
}

void raise_unknown_set(const char *unknown) {
    PyObject *known = known_sets();
    PyObject *name = PyUnicode_DecodeUTF8(unknown, (Py_ssize_t)strcspn(unknown, ","), "replace");
    if (known && name)
        PyErr_Format(PyExc_ValueError, "disable: %R is not an instruction set; known are %U", name,
                     known);
    Py_XDECREF(known);
    Py_XDECREF(name);
}

static int append_variants(PyObject *list, enum dsv4_op op, const struct dsv4_variant *chosen) {
    const struct dsv4_variant *v[MAX_VARIANTS];
    int n = dsv4k_cpu_variants(op, v, MAX_VARIANTS);
    for (int i = 0; i < n; i++) {
        PyObject *address = PyLong_FromSize_t((size_t)v[i]->fn);
        PyObject *item = address ? Py_BuildValue("(ssNO)", dsv4k_op_name(op), v[i]->name, address,
                                                 v[i] == chosen ? Py_True : Py_False)
                                 : NULL;
        int failed = !item || PyList_Append(list, item) < 0;
        Py_XDECREF(item);
        if (failed)
            return -1;
    }
    return 0;
}

PyDoc_STRVAR(kernel_variants_doc, "kernel_variants(disable, /)\n--\n\n"
                                  "All variants this CPU has, as (op, variant, address, chosen), "
                                  "weakest first; `chosen` is the choice\n"
                                  "without the sets of `disable` (comma-separated names, or None). "
                                  " ValueError names an unknown set.");

static PyObject *kernel_variants(PyObject *module, PyObject *disable) {
    (void)module;
    const char *names = NULL;
    if (disable != Py_None && !(names = PyUnicode_AsUTF8(disable)))
        return NULL;
    struct dsv4_kernels table;
    const struct dsv4_variant *chosen[DSV4_OP_COUNT];
    const char *unknown;
    Py_BEGIN_ALLOW_THREADS
    unknown = dsv4k_cpu_init(&table, chosen, names);
    Py_END_ALLOW_THREADS
    if (unknown) {
        raise_unknown_set(unknown);
        return NULL;
    }
    PyObject *list = PyList_New(0);
    for (int op = 0; list && op < DSV4_OP_COUNT; op++)
        if (append_variants(list, (enum dsv4_op)op, chosen[op]) < 0)
            Py_CLEAR(list);
    return list;
}

PyDoc_STRVAR(
    cpu_sets_doc,
    "cpu_sets()\n--\n\n"
    "The instruction sets that have kernels, as (name, whether this CPU has it), weakest first.");

static PyObject *cpu_sets(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && dsv4k_cpu_set_names[i]; i++) {
        const char *name = dsv4k_cpu_set_names[i];
        PyObject *item = Py_BuildValue("(sO)", name, dsv4k_cpu_has(name) ? Py_True : Py_False);
        int failed = !item || PyList_Append(list, item) < 0;
        Py_XDECREF(item);
        if (failed)
            Py_CLEAR(list);
    }
    return list;
}

static PyMethodDef functions[] = {
    {"kernel_variants", kernel_variants, METH_O, kernel_variants_doc},
    {"cpu_sets", cpu_sets, METH_NOARGS, cpu_sets_doc},
    {NULL, NULL, 0, NULL},
};

int dsv4_py_add_kernels(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}
