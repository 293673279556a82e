/* SPDX-License-Identifier: Apache-2.0 */
/* dsv4._core.Session: one timeline.  Thread-safe: the engine locks the session, after the GIL is
 * released. */
#include "module.h"

#include <unistd.h>

dsv4_session *session_of(const struct module_state *state, SessionObject *self) {
    if (!self->session) {
        PyErr_SetString(PyExc_ValueError, "the session is closed");
        return NULL;
    }
    return check_process(state, handle_of(self->handle)) < 0 ? NULL : self->session;
}

SessionObject *session_alloc(PyTypeObject *type, PyObject *handle) {
    SessionObject *self = (SessionObject *)type->tp_alloc(type, 0);
    if (self)
        self->handle = Py_NewRef(handle);
    return self;
}

static PyObject *session_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    struct module_state *state = state_of(type);
    ModelObject *model;
    int most_kept;
    dsv4_error err = {0};
    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Session takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!i:Session", state->model_type, &model, &most_kept))
        return NULL;
    PyObject *handle = open_handle(state, model);
    SessionObject *self = handle ? session_alloc(type, handle) : NULL;
    if (!self)
        return NULL;
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_create(&self->session, handle_of(self->handle)->model, most_kept, &err);
    Py_END_ALLOW_THREADS
    return made_or_raised(state, status, &err, (PyObject *)self);
}

static void session_release(SessionObject *self) {
    dsv4_session *session = self->session;
    self->session = NULL;
    /* In a forked child the locks of the engine may be held for ever: its memory goes with the
     * process. */
    if (!session || handle_of(self->handle)->pid != getpid())
        return;
    Py_BEGIN_ALLOW_THREADS
    dsv4_session_destroy(session);
    Py_END_ALLOW_THREADS
}

static int session_traverse(SessionObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->edit);
    return 0;
}

static int session_clear(SessionObject *self) {
    Py_CLEAR(self->edit);
    return 0;
}

static void session_dealloc(SessionObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    session_release(self);
    session_clear(self);
    Py_XDECREF(self->handle);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *session_close(SessionObject *self, PyObject *Py_UNUSED(ignored)) {
    if (self->in_step || self->in_call) {
        PyErr_SetString(PyExc_RuntimeError,
                        "the session is in use by a running step of another thread");
        return NULL;
    }
    session_release(self);
    Py_RETURN_NONE;
}

/* `in_call` keeps a close() of another thread away meanwhile. */
dsv4_session *call_enter(const struct module_state *state, SessionObject *self, int *queued) {
    dsv4_session *session = session_of(state, self);
    if (!session)
        return NULL;
    *queued = self->in_step > 0;
    self->in_call++;
    if (*queued && queue_enter(&handle_of(self->handle)->queue) < 0) {
        self->in_call--;
        return NULL;
    }
    return session;
}

void call_leave(SessionObject *self, int queued) {
    self->in_call--;
    if (queued)
        queue_leave(&handle_of(self->handle)->queue);
}

static PyObject *session_position(SessionObject *self, void *Py_UNUSED(closure)) {
    int queued;
    dsv4_session *session = call_enter(state_of(Py_TYPE(self)), self, &queued);
    if (!session)
        return NULL;
    int32_t position;
    Py_BEGIN_ALLOW_THREADS
    position = dsv4_session_position(session);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    return PyLong_FromLong(position);
}

static PyObject *session_bytes(SessionObject *self, void *Py_UNUSED(closure)) {
    int queued;
    dsv4_session *session = call_enter(state_of(Py_TYPE(self)), self, &queued);
    if (!session)
        return NULL;
    uint64_t fixed, grown;
    Py_BEGIN_ALLOW_THREADS
    dsv4_session_bytes(session, &fixed, &grown);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    return Py_BuildValue("(KK)", (unsigned long long)fixed, (unsigned long long)grown);
}

static PyObject *session_fork(SessionObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    int at, most_kept = DSV4_AS_MANY;
    if (!PyArg_ParseTuple(args, "i|i:fork", &at, &most_kept))
        return NULL;
    SessionObject *fork = session_alloc(Py_TYPE(self), self->handle);
    if (!fork)
        return NULL;
    int queued;
    dsv4_session *session = call_enter(state, self, &queued);
    if (!session) {
        Py_DECREF(fork);
        return NULL;
    }
    dsv4_error err = {0};
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_fork(&fork->session, session, at, most_kept, &err);
    Py_END_ALLOW_THREADS
    fork->edit = Py_XNewRef(self->edit);
    call_leave(self, queued);
    return made_or_raised(state, status, &err, (PyObject *)fork);
}

static PyObject *session_swap(SessionObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    SessionObject *other;
    if (!PyArg_ParseTuple(args, "O!:swap", state->session_type, &other))
        return NULL;
    dsv4_session *b = session_of(state, other);
    if (!b)
        return NULL;
    if (other->handle != self->handle || other->in_step || other->in_call) {
        PyErr_SetString(PyExc_ValueError, "swap: wanted an idle session of the same model");
        return NULL;
    }
    int queued;
    dsv4_session *a = call_enter(state, self, &queued);
    if (!a)
        return NULL;
    other->in_call++;
    Py_BEGIN_ALLOW_THREADS
    dsv4_session_swap(a, b);
    Py_END_ALLOW_THREADS
    other->in_call--;
    call_leave(self, queued);
    Py_RETURN_NONE;
}

static PyObject *session_tokens(SessionObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    int first, n;
    if (!PyArg_ParseTuple(args, "ii:tokens", &first, &n))
        return NULL;
    if (n < 0) {
        PyErr_Format(PyExc_ValueError, "n: got %d, wanted 0 or more", n);
        return NULL;
    }
    int64_t shape[1] = {n};
    void *out;
    PyObject *array = array_new(ARRAY_I32, 1, shape, &out);
    if (!array)
        return NULL;
    int queued;
    dsv4_session *session = call_enter(state, self, &queued);
    if (!session) {
        Py_DECREF(array);
        return NULL;
    }
    dsv4_error err = {0};
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_tokens(session, out, first, n, &err);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    return made_or_raised(state, status, &err, array);
}

static PyObject *session_rows(SessionObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    int layer, kind, first, n;
    if (!PyArg_ParseTuple(args, "iiii:rows", &layer, &kind, &first, &n))
        return NULL;
    if (n < 0 || kind < DSV4_ROWS_WINDOW || kind > DSV4_ROWS_INDEX) {
        PyErr_Format(PyExc_ValueError, "rows: got kind %d and n %d, wanted kind 0 to 2 and n >= 0",
                     kind, n);
        return NULL;
    }
    const struct dsv4_config *config = dsv4_model_config(handle_of(self->handle)->model);
    int64_t shape[2] = {n, kind == DSV4_ROWS_INDEX ? config->index_head_dim : config->head_dim};
    void *out;
    PyObject *array = array_new(ARRAY_U16, 2, shape, &out);
    if (!array)
        return NULL;
    int queued;
    dsv4_session *session = call_enter(state, self, &queued);
    if (!session) {
        Py_DECREF(array);
        return NULL;
    }
    dsv4_error err = {0};
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_rows(session, layer, kind, out, first, n, &err);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    return made_or_raised(state, status, &err, array);
}

static PyObject *session_fill(SessionObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    int position;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "iK:fill", &position, &seed))
        return NULL;
    int queued;
    dsv4_session *session = call_enter(state, self, &queued);
    if (!session)
        return NULL;
    dsv4_error err = {0};
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_fill(session, position, seed, &err);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    return made_or_raised(state, status, &err, Py_NewRef(Py_None));
}

static PyMethodDef session_methods[] = {
    {"tokens", (PyCFunction)(void (*)(void))session_tokens, METH_VARARGS,
     PyDoc_STR("tokens($self, first, n, /)\n--\n\nint32 [n]: the tokens from `first` on.")},
    {"rows", (PyCFunction)(void (*)(void))session_rows, METH_VARARGS,
     PyDoc_STR(
         "rows($self, layer, kind, first, n, /)\n--\n\n"
         "uint16 [n, dim]: bf16 codes of window (kind 0), compressed (1) or index (2) rows.")},
    {"fill", (PyCFunction)(void (*)(void))session_fill, METH_VARARGS,
     PyDoc_STR(
         "fill($self, position, seed, /)\n--\n\n"
         "For measuring: move on to `position` with pseudo-random state, computing nothing.")},
    {"fork", (PyCFunction)(void (*)(void))session_fork, METH_VARARGS,
     PyDoc_STR("fork($self, at, most_kept=-1, /)\n--\n\n"
               "A session that begins at the newest state at or before `at` (-1: what it is now) "
               "and keeps up to most_kept states (-1: as many as this one); nothing is copied.")},
    {"swap", (PyCFunction)(void (*)(void))session_swap, METH_VARARGS,
     PyDoc_STR("swap($self, other, /)\n--\n\nExchange timelines with an idle session.")},
    {"edit", (PyCFunction)(void (*)(void))session_edit, METH_O,
     PyDoc_STR("edit($self, edit, /)\n--\n\n"
               "From now on its steps, and those of forks made later, are edited; None: not.")},
    {"fixed", (PyCFunction)(void (*)(void))session_fixed, METH_NOARGS,
     PyDoc_STR("fixed($self, /)\n--\n\n"
               "uint8 [n]: the fixed state where it lies, until the session moves on.")},
    {"blocks", (PyCFunction)(void (*)(void))session_blocks, METH_VARARGS,
     PyDoc_STR("blocks($self, layer, kind, first, n, /)\n--\n\n"
               "([uint8 views of blocks of rows where they lie, until the session moves on], "
               "bytes of their CRC-32C).")},
    {"close", (PyCFunction)(void (*)(void))session_close, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\nFree the state now; refused while a step runs.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef session_getset[] = {
    {"position", (getter)(void (*)(void))session_position, NULL, PyDoc_STR("int: tokens so far."),
     NULL},
    {"bytes", (getter)(void (*)(void))session_bytes, NULL,
     PyDoc_STR("(int, int): bytes of the fixed state and of the rows that grew."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot session_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Session(model, most_kept, /)\n--\n\nOne timeline: tokens and "
                                  "the KV state that belongs to "
                                  "them; it keeps so many earlier states.")},
    {Py_tp_new, session_new},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_traverse, session_traverse},
    {Py_tp_clear, session_clear},
    {Py_tp_methods, session_methods},
    {Py_tp_getset, session_getset},
    {0, NULL},
};

PyType_Spec session_spec = {
    .name = "dsv4._core.Session",
    .basicsize = sizeof(SessionObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = session_slots,
};
