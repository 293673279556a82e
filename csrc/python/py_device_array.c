/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dsv4._core.Memory: memory of a GPU, held as long as somebody has the object or a DLPack capsule
 * of it, also after the model is closed.  Refuses what lies outside of it.
 */
#include "py_device_array.h"

#include <unistd.h>

#include "py_dlpack.h"

static dsv4_model *model_of(const MemoryObject *self) {
    return handle_of(self->handle)->model;
}

/* ---- making ---- */

static MemoryObject *memory_alloc(PyTypeObject *type, PyObject *handle) {
    MemoryObject *self = (MemoryObject *)type->tp_alloc(type, 0);
    if (self)
        self->handle = Py_NewRef(handle);
    return self;
}

static PyObject *memory_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    struct module_state *state = state_of(type);
    ModelObject *model;
    int layer;
    unsigned long long nbytes;
    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Memory takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!iK:Memory", state->model_type, &model, &layer, &nbytes))
        return NULL;
    PyObject *handle = open_handle(state, model);
    MemoryObject *self = handle ? memory_alloc(type, handle) : NULL;
    if (!self)
        return NULL;
    dsv4_error err = {0};
    dsv4_status status;
    dsv4_model *engine = model_of(self);
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_memory_create(&self->memory, engine, layer, nbytes, &err);
    Py_END_ALLOW_THREADS
    self->mine = !status;
    return made_or_raised(state, status, &err, (PyObject *)self);
}

static void memory_dealloc(MemoryObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->mine && handle_of(self->handle)->pid == getpid()) {
        dsv4_model *model = model_of(self);
        struct dsv4_memory memory = self->memory;
        Py_BEGIN_ALLOW_THREADS /* waits for what runs on the device */
        dsv4_memory_destroy(model, &memory);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(self->handle);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject *tensor_memory_function(PyObject *module, PyObject *args) {
    struct module_state *state = PyModule_GetState(module);
    ModelObject *model;
    const char *name;
    dsv4_error err = {0};
    if (!PyArg_ParseTuple(args, "O!s:tensor_memory", state->model_type, &model, &name))
        return NULL;
    PyObject *handle = open_handle(state, model);
    MemoryObject *self = handle ? memory_alloc(state->memory_type, handle) : NULL;
    if (!self)
        return NULL;
    dsv4_status status = dsv4_memory_of_tensor(&self->memory, model_of(self), name, &err);
    return made_or_raised(state, status, &err, (PyObject *)self);
}

PyObject *memory_room_function(PyObject *module, PyObject *args) {
    struct module_state *state = PyModule_GetState(module);
    ModelObject *model;
    int layer;
    uint64_t nbytes = 0;
    dsv4_error err = {0};
    if (!PyArg_ParseTuple(args, "O!i:memory_room", state->model_type, &model, &layer))
        return NULL;
    PyObject *handle = open_handle(state, model);
    if (!handle)
        return NULL;
    int32_t device = dsv4_model_device(handle_of(handle)->model, layer);
    if (device < 0)
        Py_RETURN_NONE;
    dsv4_status status = dsv4_memory_room(&nbytes, handle_of(handle)->model, layer, &err);
    return status ? raise_status(state, status, &err)
                  : Py_BuildValue("(iK)", (int)device, (unsigned long long)nbytes);
}

/* ---- methods ---- */

static int check(const MemoryObject *self) {
    return check_process(state_of(Py_TYPE(self)), handle_of(self->handle));
}

static PyObject *memory_read(MemoryObject *self, PyObject *args) {
    unsigned long long at, nbytes;
    void *data;
    dsv4_error err = {0};
    dsv4_status status;
    if (!PyArg_ParseTuple(args, "KK:read", &at, &nbytes) || check(self) < 0)
        return NULL;
    if (nbytes > self->memory.nbytes || at > self->memory.nbytes - nbytes) {
        PyErr_Format(PyExc_ValueError, "read: got %llu bytes from %llu on, there are %llu", nbytes,
                     at, (unsigned long long)self->memory.nbytes);
        return NULL;
    }
    const int64_t shape[1] = {(int64_t)nbytes};
    PyObject *array = array_new(ARRAY_U8, 1, shape, &data);
    if (!array)
        return NULL;
    dsv4_model *model = model_of(self);
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_memory_read(model, data, &self->memory, at, nbytes, &err);
    Py_END_ALLOW_THREADS
    return made_or_raised(state_of(Py_TYPE(self)), status, &err, array);
}

static PyObject *memory_copy(MemoryObject *self, PyObject *args) {
    unsigned long long at, nbytes, reader;
    dsv4_error err = {0};
    dsv4_status status;
    if (!PyArg_ParseTuple(args, "KKK:copy", &at, &nbytes, &reader) || check(self) < 0)
        return NULL;
    MemoryObject *copy = memory_alloc(Py_TYPE(self), self->handle);
    if (!copy)
        return NULL;
    dsv4_model *model = model_of(self);
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_memory_copy(&copy->memory, model, &self->memory, at, nbytes,
                              (void *)(uintptr_t)reader, &err);
    Py_END_ALLOW_THREADS
    copy->mine = !status;
    return made_or_raised(state_of(Py_TYPE(self)), status, &err, (PyObject *)copy);
}

static PyObject *memory_widen(MemoryObject *self, PyObject *args) {
    MemoryObject *from;
    int n, width, from_width;
    unsigned int fill;
    dsv4_error err = {0};
    dsv4_status status;
    if (!PyArg_ParseTuple(args, "O!iiiI:widen", Py_TYPE(self), &from, &n, &width, &from_width,
                          &fill) ||
        check(self) < 0)
        return NULL;
    if (!self->mine || from->handle != self->handle) {
        PyErr_SetString(PyExc_ValueError, "widen: wanted memory of its own, of one model");
        return NULL;
    }
    dsv4_model *model = model_of(self);
    Py_BEGIN_ALLOW_THREADS
    status =
        dsv4_memory_widen(model, &self->memory, &from->memory, n, width, from_width, fill, &err);
    Py_END_ALLOW_THREADS
    return made_or_raised(state_of(Py_TYPE(self)), status, &err, Py_NewRef(Py_None));
}

static PyObject *memory_dlpack(MemoryObject *self, PyObject *args) {
    unsigned long long at;
    PyObject *shape, *strides;
    int versioned, flags;
    struct dlpack_view view = {.owner = (PyObject *)self, .device_type = DLPACK_CUDA};
    if (!PyArg_ParseTuple(args, "KO!O!iipi:dlpack", &at, &PyTuple_Type, &shape, &PyTuple_Type,
                          &strides, &view.code, &view.bits, &versioned, &flags) ||
        check(self) < 0)
        return NULL;
    if (at > self->memory.nbytes) {
        PyErr_Format(PyExc_ValueError, "dlpack: got byte %llu of %llu", at,
                     (unsigned long long)self->memory.nbytes);
        return NULL;
    }
    view.data = (uint8_t *)self->memory.data + at;
    view.device = self->memory.device;
    view.flags = (uint64_t)(self->mine ? 0 : DLPACK_READ_ONLY) | (uint64_t)flags;
    return dlpack_capsule(&view, shape, strides, versioned, self->memory.nbytes - at);
}

static PyObject *memory_int(MemoryObject *self, void *field) {
    return field ? PyLong_FromLong(self->memory.device)
                 : PyLong_FromUnsignedLongLong(self->memory.nbytes);
}

static PyObject *memory_read_only(MemoryObject *self, void *Py_UNUSED(ignored)) {
    return PyBool_FromLong(!self->mine);
}

static PyMethodDef memory_methods[] = {
    {"read", (PyCFunction)(void (*)(void))memory_read, METH_VARARGS,
     PyDoc_STR("read($self, at, nbytes, /)\n--\n\nBytes copied to the host, as a new uint8 "
               "array.")},
    {"copy", (PyCFunction)(void (*)(void))memory_copy, METH_VARARGS,
     PyDoc_STR("copy($self, at, nbytes, reader, /)\n--\n\n"
               "Bytes copied to new memory of the same device; what the stream `reader` gets from "
               "now on waits for it, with 0 this call does.")},
    {"widen", (PyCFunction)(void (*)(void))memory_widen, METH_VARARGS,
     PyDoc_STR("widen($self, old, n, width, from_width, fill, /)\n--\n\n"
               "n rows of four-byte elements of other memory to the start of this, with other "
               "elements behind each row.")},
    {"dlpack", (PyCFunction)(void (*)(void))memory_dlpack, METH_VARARGS,
     PyDoc_STR("dlpack($self, at, shape, strides, code, bits, versioned, flags, /)\n--\n\n"
               "A DLPack capsule of elements from byte `at` on, which keeps the memory; strides "
               "in elements.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef memory_getset[] = {
    {"nbytes", (getter)(void (*)(void))memory_int, NULL, PyDoc_STR("int"), NULL},
    {"device", (getter)(void (*)(void))memory_int, NULL, PyDoc_STR("int: CUDA's number."),
     &memory_getset},
    {"read_only", (getter)(void (*)(void))memory_read_only, NULL,
     PyDoc_STR("bool: a weight of the model."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_doc,
     (void *)PyDoc_STR("Memory(model, layer, nbytes, /)\n--\n\nMemory of the GPU that computes a "
                       "layer, undefined contents; it is held as long as this object.")},
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_tp_methods, memory_methods},
    {Py_tp_getset, memory_getset},
    {0, NULL},
};

PyType_Spec memory_spec = {
    .name = "dsv4._core.Memory",
    .basicsize = sizeof(MemoryObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};
