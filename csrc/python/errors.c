/* SPDX-License-Identifier: Apache-2.0 */
/* The one place where a status of the engine becomes an exception. */
#include "module.h"

#include <string.h>
#include <unistd.h>

static const char forked_message[] =
    "this model was loaded by another process and its threads are not in this forked child; start "
    "child processes "
    "with the method \"spawn\" or \"forkserver\", or load the model in the child";

int check_process(const struct module_state *state, const struct handle *handle) {
    if (getpid() == handle->pid)
        return 0;
    PyErr_SetString(state->forked_error, forked_message);
    return -1;
}

static PyObject *raise_nonfinite(const struct module_state *state, PyObject *message, int layer) {
    PyObject *where = layer >= 0 ? PyLong_FromLong(layer) : Py_NewRef(Py_None);
    PyObject *error =
        where ? PyObject_CallFunctionObjArgs(state->nonfinite_error, message, where, NULL) : NULL;
    if (error)
        PyErr_SetObject(state->nonfinite_error, error);
    Py_XDECREF(error);
    Py_XDECREF(where);
    return NULL;
}

PyObject *raise_status(const struct module_state *state, dsv4_status status,
                       const dsv4_error *err) {
    PyObject *class = PyExc_SystemError;
    /* Messages may quote bytes of a file. */
    PyObject *message =
        PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)strlen(err->message), "backslashreplace");
    if (!message)
        return NULL;
    switch (status) {
    case DSV4_OK: /* a caller's mistake: the engine did not fail */
        break;
    case DSV4_E_ARGUMENT:
        class = PyExc_ValueError;
        break;
    case DSV4_E_FORMAT:
        class = state->format_error;
        break;
    case DSV4_E_MEMORY:
        class = PyExc_MemoryError;
        break;
    case DSV4_E_IO:
        class = PyExc_OSError;
        break;
    case DSV4_E_CANCELLED:
        class = PyExc_KeyboardInterrupt;
        break;
    case DSV4_E_NONFINITE:
        raise_nonfinite(state, message, err->layer);
        Py_DECREF(message);
        return NULL;
    case DSV4_E_STATE:
        class = PyExc_RuntimeError;
        break;
    case DSV4_E_UNAVAILABLE:
        class = state->unavailable_error;
        break;
    case DSV4_E_DEVICE:
        class = state->device_error;
        break;
    }
    PyErr_SetObject(class, message);
    Py_DECREF(message);
    return NULL;
}

PyObject *made_or_raised(const struct module_state *state, dsv4_status status,
                         const dsv4_error *err, PyObject *made) {
    if (!status)
        return made;
    Py_DECREF(made);
    return raise_status(state, status, err);
}
