/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dsv4._core.Edit: what sessions change in their passes, as the engine has it.  Immutable, shared
 * by any number of sessions.  It owns the Python functions of its callbacks, which may reach back
 * to a session: edits and sessions take part in garbage collection.
 */
#include "module.h"

#include <unistd.h>

typedef struct {
    PyObject_HEAD
    PyObject *handle;    /* owned capsule of its model */
    dsv4_edit *edit;     /* owned */
    PyObject *functions; /* owned tuple: dsv4_edit_op.function points to its items */
} EditObject;

static int edit_traverse(EditObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->functions);
    return 0;
}

static int edit_clear(EditObject *self) {
    Py_CLEAR(self->functions);
    return 0;
}

static void edit_dealloc(EditObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    dsv4_edit_release(self->edit);
    edit_clear(self);
    Py_XDECREF(self->handle);
    type->tp_free(self);
    Py_DECREF(type);
}

enum { BUFFERS = 3 }; /* positions, ids, values */

struct edit_args {
    Py_ssize_t n;
    struct dsv4_edit_op *ops;      /* owned [n] */
    Py_buffer (*buffers)[BUFFERS]; /* owned [n] */
};

static void edit_args_free(struct edit_args *a) {
    for (Py_ssize_t i = 0; a->buffers && i < a->n; i++) {
        for (int j = 0; j < BUFFERS; j++)
            PyBuffer_Release(&a->buffers[i][j]); /* of a zeroed one: nothing */
    }
    PyMem_Free(a->buffers);
    PyMem_Free(a->ops);
}

static int parse_op(struct edit_args *a, Py_ssize_t i, PyObject *item, PyObject *functions,
                    Py_ssize_t *used) {
    struct dsv4_edit_op *op = &a->ops[i];
    Py_buffer *b = a->buffers[i];
    if (!PyTuple_Check(item)) {
        PyErr_Format(PyExc_TypeError, "ops[%zd]: got %s, wanted a tuple", i,
                     Py_TYPE(item)->tp_name);
        return -1;
    }
    if (!PyArg_ParseTuple(item, "iiiiy*y*y*", &op->kind, &op->site, &op->layer, &op->n_row, &b[0],
                          &b[1], &b[2]))
        return -1;
    if (b[0].len % 8 || b[1].len % 4 || b[2].len % 4 || b[0].len / 8 > INT32_MAX ||
        b[1].len / 4 > INT32_MAX) {
        PyErr_Format(PyExc_ValueError,
                     "ops[%zd]: wanted int32 pairs, int32 and float32; got %zd, %zd and %zd bytes",
                     i, b[0].len, b[1].len, b[2].len);
        return -1;
    }
    op->positions = b[0].buf;
    op->n_range = (int32_t)(b[0].len / 8);
    op->ids = b[1].buf;
    op->n_id = (int32_t)(b[1].len / 4);
    op->values = b[2].buf;
    op->n_value = b[2].len / 4;
    if (op->kind == DSV4_EDIT_CALL) {
        if (*used == PyTuple_GET_SIZE(functions)) {
            PyErr_Format(PyExc_ValueError, "functions: got %zd, wanted one for each callback",
                         *used);
            return -1;
        }
        op->function = PyTuple_GET_ITEM(functions, (*used)++);
    }
    return 0;
}

static int parse_ops(struct edit_args *a, PyObject *ops, PyObject *functions) {
    Py_ssize_t used = 0;
    a->n = PyTuple_GET_SIZE(ops);
    if (a->n > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "ops: got %zd, wanted fewer", a->n);
        return -1;
    }
    a->ops = PyMem_Calloc((size_t)a->n + 1, sizeof *a->ops);
    a->buffers = PyMem_Calloc((size_t)a->n + 1, sizeof *a->buffers);
    if (!a->ops || !a->buffers) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < a->n; i++) {
        if (parse_op(a, i, PyTuple_GET_ITEM(ops, i), functions, &used) < 0)
            return -1;
    }
    return 0;
}

static PyObject *edit_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    struct module_state *state = state_of(type);
    ModelObject *model;
    PyObject *ops, *functions;
    struct edit_args a = {0};
    dsv4_error err = {0};
    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Edit takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!O!O!:Edit", state->model_type, &model, &PyTuple_Type, &ops,
                          &PyTuple_Type, &functions))
        return NULL;
    PyObject *handle = open_handle(state, model);
    EditObject *self = handle ? (EditObject *)type->tp_alloc(type, 0) : NULL;
    if (!self)
        return NULL;
    self->handle = Py_NewRef(handle);
    self->functions = Py_NewRef(functions);
    int failed = parse_ops(&a, ops, functions) < 0;
    if (!failed) {
        dsv4_status status = dsv4_edit_create(&self->edit, handle_of(self->handle)->model, a.ops,
                                              (int32_t)a.n, &err);
        failed = status != DSV4_OK;
        if (failed)
            raise_status(state, status, &err);
    }
    edit_args_free(&a);
    if (failed)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static PyType_Slot edit_slots[] = {
    {Py_tp_doc,
     (void *)PyDoc_STR("Edit(model, ops, functions, /)\n--\n\nWhat sessions change: ops are "
                       "(kind, site, layer, rows, positions, ids, values) "
                       "as struct dsv4_edit_op has them, functions those of its callbacks in "
                       "their order.")},
    {Py_tp_new, edit_new},
    {Py_tp_dealloc, edit_dealloc},
    {Py_tp_traverse, edit_traverse},
    {Py_tp_clear, edit_clear},
    {0, NULL},
};

PyType_Spec edit_spec = {
    .name = "dsv4._core.Edit",
    .basicsize = sizeof(EditObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = edit_slots,
};

/* ---- sessions ---- */

PyObject *session_edit(SessionObject *self, PyObject *object) {
    struct module_state *state = state_of(Py_TYPE(self));
    EditObject *edit = NULL;
    int queued;
    dsv4_error err = {0};
    dsv4_status status;
    if (object != Py_None) {
        if (!PyObject_TypeCheck(object, state->edit_type) ||
            ((EditObject *)object)->handle != self->handle) {
            PyErr_SetString(PyExc_ValueError, "edit: wanted an Edit of the same model, or None");
            return NULL;
        }
        edit = (EditObject *)object;
    }
    dsv4_session *session = call_enter(state, self, &queued);
    if (!session)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_edit(session, edit ? edit->edit : NULL, &err);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    if (status)
        return raise_status(state, status, &err);
    Py_XSETREF(self->edit, Py_XNewRef((PyObject *)edit));
    Py_RETURN_NONE;
}

/* ---- callbacks ---- */

int edit_call(dsv4_run *run) {
    struct dsv4_call call;
    void *rows, *at;
    float *changed = NULL;
    dsv4_run_call(run, &call);
    int64_t shape[3] = {call.n, call.hc_mult, call.hidden_size};
    PyObject *streams = array_new(ARRAY_F32, 3, shape, &rows);
    PyObject *positions = array_new(ARRAY_I32, 1, shape, &at);
    if (streams && positions) {
        dsv4_run_read(run, rows, at);
        PyObject *result =
            PyObject_CallFunctionObjArgs((PyObject *)call.function, streams, positions, NULL);
        if (result)
            changed = convert_array(result, "callback", ARRAY_F32, 3, shape);
        Py_XDECREF(result);
    }
    if (!changed)
        dsv4_run_cancel(run);
    dsv4_run_resume(run, changed);
    const int failed = changed ? 0 : -1;
    PyMem_Free(changed);
    Py_XDECREF(streams);
    Py_XDECREF(positions);
    return failed;
}
