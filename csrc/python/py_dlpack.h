/* SPDX-License-Identifier: Apache-2.0 */
#ifndef DSV4_PY_DLPACK_H
#define DSV4_PY_DLPACK_H

#include "module.h"

enum { DLPACK_CPU = 1, DLPACK_CUDA = 2, DLPACK_READ_ONLY = 1, DLPACK_COPIED = 2 };

/* Elements of memory that lives as long as `owner`. */
struct dlpack_view {
    PyObject *owner; /* borrowed; the capsule takes a reference */
    void *data;
    int32_t device_type, device;
    int code, bits; /* of DLDataType */
    uint64_t flags;
};

/* A capsule of a tuple of dimensions; strides in elements, or NULL for C order.  The elements must
 * lie within nbytes of data; in C order they are all of them.  NULL with an exception set. */
PyObject *dlpack_capsule(const struct dlpack_view *view, PyObject *shape, PyObject *strides,
                         int versioned, uint64_t nbytes);

/* dlpack(bytes, shape, code, bits, versioned): see module.c */
PyObject *dlpack_function(PyObject *module, PyObject *args);

#endif
