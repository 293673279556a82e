/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bytes of a buffer as a DLPack capsule with an element type that NumPy does not have (bf16,
 * FP8).  The structures are those of DLPack 1.1 (dmlc/dlpack, dlpack.h), written down here because
 * they are an ABI.
 */
#include "py_dlpack.h"

enum { DEVICE_CPU = 1, FLAG_READ_ONLY = 1, MOST_RANK = 8 };

struct dl_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct dl_managed {
    struct dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self);
};

struct dl_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_versioned *self);
    uint64_t flags;
    struct dl_tensor tensor;
};

/* What both forms own; the buffer keeps the bytes. */
struct export {
    union {
        struct dl_managed old;
        struct dl_versioned versioned;
    } as;
    Py_buffer buffer;
    int64_t shape[MOST_RANK], strides[MOST_RANK];
};

static void export_free(struct export *e) {
    PyGILState_STATE state = PyGILState_Ensure();
    PyBuffer_Release(&e->buffer);
    PyMem_RawFree(e);
    PyGILState_Release(state);
}

static void delete_old(struct dl_managed *self) {
    export_free(self->context);
}

static void delete_versioned(struct dl_versioned *self) {
    export_free(self->context);
}

/* A consumer renames the capsule and takes over; otherwise it is still ours. */
static void capsule_destroy(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor"))
        export_free(((struct dl_managed *)PyCapsule_GetPointer(capsule, "dltensor"))->context);
    else if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
        export_free(
            ((struct dl_versioned *)PyCapsule_GetPointer(capsule, "dltensor_versioned"))->context);
}

/* Fills the shape; the number of elements, or -1 with an exception set. */
static int64_t parse_shape(struct export *e, PyObject *shape, int32_t *ndim) {
    const Py_ssize_t n = PyTuple_GET_SIZE(shape);
    int64_t count = 1;
    if (n > MOST_RANK) {
        PyErr_Format(PyExc_ValueError, "shape: got %zd dimensions, wanted at most %d", n,
                     MOST_RANK);
        return -1;
    }
    for (Py_ssize_t i = n; i-- > 0;) {
        e->shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
        e->strides[i] = count;
        if (e->shape[i] < 0) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "shape: got a negative dimension");
            return -1;
        }
        if (e->shape[i] > 0 && count > INT64_MAX / 64 / e->shape[i]) {
            PyErr_SetString(PyExc_ValueError, "shape: got more elements than memory has bytes");
            return -1;
        }
        count *= e->shape[i];
    }
    *ndim = (int32_t)n;
    return count;
}

/* The tensor over the buffer; -1 with an exception set. */
static int fill(struct export *e, struct dl_tensor *tensor, PyObject *shape, int code, int bits) {
    const int64_t count = parse_shape(e, shape, &tensor->ndim);
    if (count < 0)
        return -1;
    if (bits < 8 || bits % 8 || count * (bits / 8) != (int64_t)e->buffer.len) {
        PyErr_Format(PyExc_ValueError, "dlpack: got %zd bytes for %lld elements of %d bits",
                     e->buffer.len, (long long)count, bits);
        return -1;
    }
    tensor->data = e->buffer.buf;
    tensor->device.type = DEVICE_CPU;
    tensor->dtype.code = (uint8_t)code;
    tensor->dtype.bits = (uint8_t)bits;
    tensor->dtype.lanes = 1;
    tensor->shape = e->shape;
    tensor->strides = e->strides;
    return 0;
}

PyObject *dlpack_function(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *bytes, *shape, *capsule;
    int code, bits, versioned;
    if (!PyArg_ParseTuple(args, "OO!iip:dlpack", &bytes, &PyTuple_Type, &shape, &code, &bits,
                          &versioned))
        return NULL;
    struct export *e = PyMem_RawCalloc(1, sizeof *e);
    if (!e)
        return PyErr_NoMemory();
    if (PyObject_GetBuffer(bytes, &e->buffer, PyBUF_SIMPLE) < 0) {
        PyMem_RawFree(e);
        return NULL;
    }
    if (fill(e, versioned ? &e->as.versioned.tensor : &e->as.old.tensor, shape, code, bits) < 0) {
        export_free(e);
        return NULL;
    }
    if (versioned) {
        e->as.versioned.major = 1;
        e->as.versioned.minor = 1;
        e->as.versioned.flags = e->buffer.readonly ? FLAG_READ_ONLY : 0;
        e->as.versioned.context = e;
        e->as.versioned.deleter = delete_versioned;
        capsule = PyCapsule_New(&e->as.versioned, "dltensor_versioned", capsule_destroy);
    } else {
        e->as.old.context = e;
        e->as.old.deleter = delete_old;
        capsule = PyCapsule_New(&e->as.old, "dltensor", capsule_destroy);
    }
    if (!capsule)
        export_free(e);
    return capsule;
}
