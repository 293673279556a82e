/* SPDX-License-Identifier: Apache-2.0 */
/* _core.devices: the GPUs of this machine; _core.split: how layers are cut over them. */
#include "module.h"

static PyObject *device_to_python(const struct dsv4_device_facts *d) {
    PyObject *why =
        d->why[0] ? PyUnicode_DecodeUTF8(d->why, (Py_ssize_t)strlen(d->why), "backslashreplace")
                  : Py_NewRef(Py_None);
    return why ? Py_BuildValue("(siiiKKN)", d->name, (int)d->major, (int)d->minor,
                               (int)d->multiprocessors, (unsigned long long)d->total_bytes,
                               (unsigned long long)d->free_bytes, why)
               : NULL;
}

PyObject *devices_function(PyObject *module, PyObject *args) {
    struct module_state *state = PyModule_GetState(module);
    struct dsv4_plugin_facts facts;
    const char *plugin, *driver;
    dsv4_error err = {0};
    int32_t n = 0;
    if (!PyArg_ParseTuple(args, "ss:devices", &plugin, &driver))
        return NULL;
    struct dsv4_device_facts *found = PyMem_Calloc(MAX_DEVICES, sizeof *found);
    if (!found)
        return PyErr_NoMemory();
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS /* a driver takes its time to start */
    status = dsv4_devices(found, MAX_DEVICES, &n, &facts, plugin, driver, &err);
    Py_END_ALLOW_THREADS
    n = n < MAX_DEVICES ? n : MAX_DEVICES;
    PyObject *list = status ? raise_status(state, status, &err) : PyList_New(n);
    for (int32_t i = 0; list && i < n; i++) {
        PyObject *device = device_to_python(&found[i]);
        if (!device)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, device);
    }
    PyMem_Free(found);
    return list ? Py_BuildValue("(isN)", (int)facts.cuda_version, facts.built_for, list) : NULL;
}

/* Numbers of bytes; the caller frees them.  NULL with an exception set. */
static uint64_t *byte_counts(PyObject *list, Py_ssize_t n) {
    uint64_t *bytes = PyMem_Calloc((size_t)n + 1, sizeof *bytes);
    if (!bytes)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; bytes && i < n; i++) {
        bytes[i] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(list, i));
        if (PyErr_Occurred()) {
            PyMem_Free(bytes);
            return NULL;
        }
    }
    return bytes;
}

PyObject *split_function(PyObject *module, PyObject *args) {
    PyObject *layers, *rooms, *list = NULL;
    unsigned long long each;
    int32_t ends[MAX_DEVICES];
    struct module_state *state = PyModule_GetState(module);
    dsv4_error err = {0};
    if (!PyArg_ParseTuple(args, "O!KO!:split", &PyList_Type, &layers, &each, &PyList_Type, &rooms))
        return NULL;
    const Py_ssize_t n_layer = PyList_GET_SIZE(layers), n = PyList_GET_SIZE(rooms);
    if (n < 1 || n > n_layer || n > MAX_DEVICES || n_layer > INT32_MAX) {
        PyErr_Format(PyExc_ValueError,
                     "rooms: got %zd, wanted 1 to %d, and no more than %zd layers", n,
                     (int)MAX_DEVICES, n_layer);
        return NULL;
    }
    uint64_t *bytes = byte_counts(layers, n_layer),
             *free_bytes = bytes ? byte_counts(rooms, n) : NULL;
    if (free_bytes) {
        const dsv4_status status =
            dsv4_split_layers(ends, bytes, (int32_t)n_layer, each, free_bytes, (int32_t)n, &err);
        list = status ? raise_status(state, status, &err) : PyList_New(n);
    }
    for (Py_ssize_t i = 0; list && i < n; i++)
        PyList_SET_ITEM(list, i, PyLong_FromLong(ends[i]));
    PyMem_Free(bytes);
    PyMem_Free(free_bytes);
    return list;
}
