/* SPDX-License-Identifier: Apache-2.0 */
/* Traces: the caller's arrays become taps of a segment.  Refuses values a layer does not have, and
 * arrays of another type or shape. */
#include "py_trace.h"

#include "py_device_array.h"

/* Rows in memory of the layer's device. */
static int parse_memory(struct dsv4_tap *tap, PyObject *rows, const struct dsv4_value_shape *s,
                        int layer, PyObject *handle, const struct module_state *state) {
    MemoryObject *memory;
    unsigned long long at, n;
    int width;
    if (!PyArg_ParseTuple(rows, "O!KKi", state->memory_type, &memory, &at, &n, &width))
        return -1;
    if (memory->handle != handle || !memory->mine ||
        memory->memory.device != dsv4_model_device(handle_of(handle)->model, layer)) {
        PyErr_Format(PyExc_ValueError, "trace: wanted memory of its own on the device of layer %d",
                     layer);
        return -1;
    }
    const uint64_t outer = s->rank == 1 ? 1 : (uint64_t)s->dims[0];
    const uint64_t row = 4 * outer * (uint64_t)(s->dims[s->rank - 1] + (width < 0 ? 0 : width));
    const uint64_t nbytes = memory->memory.nbytes;
    if (width < 0 || at > nbytes || at % 4 || (row && n > (nbytes - at) / row)) {
        PyErr_Format(PyExc_ValueError,
                     "trace: got %llu rows of %d entries from byte %llu on of %llu", n, width, at,
                     (unsigned long long)nbytes);
        return -1;
    }
    tap->out = (uint8_t *)memory->memory.data + at;
    tap->rows = (int64_t)n;
    tap->width = width;
    return 0;
}

static int parse_tap(struct taps *t, PyObject *item, PyObject *handle,
                     const struct module_state *state) {
    const dsv4_model *model = handle_of(handle)->model;
    int layer, value;
    PyObject *array;
    struct dsv4_value_shape s;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "iiO", &layer, &value, &array)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "trace: wanted tuples of layer, value and array");
        return -1;
    }
    if (!dsv4_model_value(model, layer, value, &s)) {
        PyErr_Format(PyExc_ValueError, "trace: there is no value %d in layer %d", value, layer);
        return -1;
    }
    int64_t shape[3] = {-1, s.dims[0], s.dims[1]};
    if (s.widens)
        shape[s.rank] = -1;
    struct dsv4_tap *tap = &t->taps[layer * DSV4_VALUES + value];
    const int on_device = PyTuple_Check(array);
    if (t->any && on_device != t->on_device) {
        PyErr_SetString(PyExc_ValueError, "trace: wanted arrays, or memory of the device, alone");
        return -1;
    }
    t->any = 1;
    t->on_device = on_device;
    if (on_device)
        return parse_memory(tap, array, &s, layer, handle, state);
    tap->out = array_out(array, dsv4_value_names[value], s.integer ? ARRAY_I32 : ARRAY_F32,
                         s.rank + 1, shape);
    if (!tap->out)
        return -1;
    tap->rows = shape[0];
    const int64_t width = shape[s.rank] - s.dims[s.rank - 1];
    if (width < 0 || width > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: dimension %d is %lld long, wanted at least %lld",
                     dsv4_value_names[value], (int)s.rank, (long long)shape[s.rank],
                     (long long)s.dims[s.rank - 1]);
        return -1;
    }
    tap->width = (int32_t)width;
    return 0;
}

int taps_parse(struct taps *t, PyObject *trace, PyObject *handle,
               const struct module_state *state) {
    if (trace == Py_None)
        return 0;
    t->items = PySequence_Tuple(trace);
    if (!t->items)
        return -1;
    const size_t layers = (size_t)dsv4_model_config(handle_of(handle)->model)->num_hidden_layers;
    t->taps = PyMem_Calloc(layers * DSV4_VALUES, sizeof *t->taps);
    if (!t->taps) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(t->items); i++) {
        if (parse_tap(t, PyTuple_GET_ITEM(t->items, i), handle, state) < 0)
            return -1;
    }
    return 0;
}

void taps_free(struct taps *t) {
    PyMem_Free(t->taps);
    Py_XDECREF(t->items);
}

PyObject *model_value(ModelObject *self, PyObject *args) {
    int layer, value;
    struct dsv4_value_shape s;
    if (!PyArg_ParseTuple(args, "ii:value", &layer, &value) ||
        !open_handle(state_of(Py_TYPE(self)), self))
        return NULL;
    if (!dsv4_model_value(handle_of(self->handle)->model, layer, value, &s))
        Py_RETURN_NONE;
    PyObject *dims = s.rank == 1
                         ? Py_BuildValue("(L)", (long long)s.dims[0])
                         : Py_BuildValue("(LL)", (long long)s.dims[0], (long long)s.dims[1]);
    return dims ? Py_BuildValue("(NNNN)", PyBool_FromLong(s.integer), dims,
                                PyBool_FromLong(s.per_entry), PyBool_FromLong(s.widens))
                : NULL;
}

PyObject *value_names(void) {
    PyObject *names = PyTuple_New(DSV4_VALUES);
    for (int i = 0; names && i < DSV4_VALUES; i++) {
        PyObject *name = PyUnicode_FromString(dsv4_value_names[i]);
        if (name)
            PyTuple_SET_ITEM(names, i, name);
        else
            Py_CLEAR(names);
    }
    return names;
}
