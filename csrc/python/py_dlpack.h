/* SPDX-License-Identifier: Apache-2.0 */
#ifndef DSV4_PY_DLPACK_H
#define DSV4_PY_DLPACK_H

#include "module.h"

/* dlpack(bytes, shape, code, bits, versioned): see module.c */
PyObject *dlpack_function(PyObject *module, PyObject *args);

#endif
