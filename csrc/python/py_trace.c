/* SPDX-License-Identifier: Apache-2.0 */
/* Traces: the caller's arrays become taps of a segment.  Refuses values a layer does not have, and
 * arrays of another type or shape. */
#include "py_trace.h"

#include "py_step.h"

static int parse_tap(struct taps *t, PyObject *item, const dsv4_model *model) {
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

int taps_parse(struct taps *t, PyObject *trace, const dsv4_model *model) {
    if (trace == Py_None)
        return 0;
    t->items = PySequence_Tuple(trace);
    if (!t->items)
        return -1;
    const size_t layers = (size_t)dsv4_model_config(model)->num_hidden_layers;
    t->taps = PyMem_Calloc(layers * DSV4_VALUES, sizeof *t->taps);
    if (!t->taps) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(t->items); i++) {
        if (parse_tap(t, PyTuple_GET_ITEM(t->items, i), model) < 0)
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
