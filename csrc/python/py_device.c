/* SPDX-License-Identifier: Apache-2.0 */
/* _core.devices: the GPUs of this machine. */
#include "module.h"

enum { MAX_DEVICES = 64 };

static PyObject *device_to_python(const struct dsv4_device_facts *d) {
    PyObject *why = d->why[0] ? PyUnicode_DecodeUTF8(d->why, (Py_ssize_t)strlen(d->why),
                                                     "backslashreplace")
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
