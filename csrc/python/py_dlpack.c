/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of the host or of a GPU as a DLPack capsule, with element types that NumPy does not have
 * (bf16, FP8).  The structures are those of DLPack 1.1 (dmlc/dlpack, dlpack.h), written down here
 * because they are an ABI.
 */
#include "py_dlpack.h"

enum { MOST_RANK = 8 };

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

/* What both forms own; the owner keeps the elements. */
struct export {
    union {
        struct dl_managed old;
        struct dl_versioned versioned;
    } as;
    PyObject *owner; /* owned */
    int64_t shape[MOST_RANK], strides[MOST_RANK];
};

static void export_free(struct export *e) {
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(e->owner);
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

/* As parse_shape: what lies behind one another from the first element to the last. */
static int64_t parse_strides(struct export *e, PyObject *strides, int32_t ndim) {
    int64_t last = 0;
    if (PyTuple_GET_SIZE(strides) != ndim) {
        PyErr_Format(PyExc_ValueError, "strides: got %zd, wanted %d", PyTuple_GET_SIZE(strides),
                     (int)ndim);
        return -1;
    }
    for (int32_t i = 0; i < ndim; i++) {
        e->strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        if (e->shape[i] == 0)
            return 0;
        if (e->strides[i] < 0 || e->strides[i] > INT64_MAX / 64 / e->shape[i]) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "strides: got one that is out of range");
            return -1;
        }
        last += (e->shape[i] - 1) * e->strides[i];
        if (last > INT64_MAX / 64) {
            PyErr_SetString(PyExc_ValueError, "strides: got more elements than memory has bytes");
            return -1;
        }
    }
    return last + 1;
}

/* The tensor over the view; -1 with an exception set. */
static int fill(struct export *e, struct dl_tensor *tensor, const struct dlpack_view *view,
                PyObject *shape, PyObject *strides, uint64_t nbytes) {
    int64_t count = parse_shape(e, shape, &tensor->ndim);
    if (count > 0 && strides)
        count = parse_strides(e, strides, tensor->ndim);
    if (count < 0)
        return -1;
    const uint64_t wanted = (uint64_t)count * (uint64_t)(view->bits / 8);
    if (view->bits < 8 || view->bits % 8 || (strides ? wanted > nbytes : wanted != nbytes)) {
        PyErr_Format(PyExc_ValueError, "dlpack: got %llu bytes for %lld elements of %d bits",
                     (unsigned long long)nbytes, (long long)count, view->bits);
        return -1;
    }
    tensor->data = view->data;
    tensor->device.type = view->device_type;
    tensor->device.id = view->device;
    tensor->dtype.code = (uint8_t)view->code;
    tensor->dtype.bits = (uint8_t)view->bits;
    tensor->dtype.lanes = 1;
    tensor->shape = e->shape;
    tensor->strides = e->strides;
    return 0;
}

PyObject *dlpack_capsule(const struct dlpack_view *view, PyObject *shape, PyObject *strides,
                         int versioned, uint64_t nbytes) {
    PyObject *capsule;
    struct export *e = PyMem_RawCalloc(1, sizeof *e);
    if (!e)
        return PyErr_NoMemory();
    e->owner = Py_NewRef(view->owner);
    struct dl_tensor *tensor = versioned ? &e->as.versioned.tensor : &e->as.old.tensor;
    if (fill(e, tensor, view, shape, strides, nbytes) < 0) {
        export_free(e);
        return NULL;
    }
    if (versioned) {
        e->as.versioned.major = 1;
        e->as.versioned.minor = 1;
        e->as.versioned.flags = view->flags;
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

PyObject *dlpack_function(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *bytes, *shape;
    struct dlpack_view view = {.device_type = DLPACK_CPU};
    int versioned;
    if (!PyArg_ParseTuple(args, "OO!iip:dlpack", &bytes, &PyTuple_Type, &shape, &view.code,
                          &view.bits, &versioned))
        return NULL;
    view.owner = PyMemoryView_FromObject(bytes);
    if (!view.owner)
        return NULL;
    PyObject *capsule = NULL;
    const Py_buffer *buffer = PyMemoryView_GET_BUFFER(view.owner);
    if (PyBuffer_IsContiguous(buffer, 'C')) {
        view.data = buffer->buf;
        view.flags = buffer->readonly ? DLPACK_READ_ONLY : 0;
        capsule = dlpack_capsule(&view, shape, NULL, versioned, (uint64_t)buffer->len);
    } else {
        PyErr_SetString(PyExc_ValueError, "dlpack: wanted a contiguous buffer");
    }
    Py_DECREF(view.owner);
    return capsule;
}
