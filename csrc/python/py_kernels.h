/* SPDX-License-Identifier: Apache-2.0 */
/* The doors for tests and measurements: single table entries by address, and the machine's limits.
 */
#ifndef DSV4_PY_KERNELS_H
#define DSV4_PY_KERNELS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Adds kernel_variants() and cpu_sets() to the module; -1 with an exception set on failure. */
int dsv4_py_add_kernels(PyObject *module);

/* ValueError: `disable` names a set that does not exist, at `unknown`. */
void raise_unknown_set(const char *unknown);

/* Adds limits() and the functions that time: time_read(), time_peak(), time_linear(). */
int dsv4_py_add_limits(PyObject *module);

#endif
