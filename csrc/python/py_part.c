/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parts of a layer: arrays in, a run, arrays out, as one table says.  Like a step, a call owns
 * everything its run points to, on the heap.
 */
#include "py_part.h"

#include "py_step.h"

/* Sizes that shapes are made of. */
enum size {
    ROWS,
    WIDTH,
    STREAMS,
    HEADS,
    HEAD_DIM,
    EXPERTS,
    CHOSEN,
    TOPK,
    INDEX_DIM,
    CLOSED, /* entries that close */
    SEEN,   /* entries that the last row sees */
    SIZES
};

struct value {
    const char *name; /* NULL ends a list */
    size_t offset;    /* of its pointer in struct dsv4_part */
    enum array_type type;
    int rank;
    enum size dims[3];
};

#define VALUE(field, type, rank, ...)                                                              \
    {                                                                                              \
        #field, offsetof(struct dsv4_part, field), type, rank, {                                   \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    }
#define X VALUE(x, ARRAY_U16, 2, ROWS, WIDTH)
#define IN_STREAMS VALUE(streams, ARRAY_U16, 3, ROWS, STREAMS, WIDTH)
#define OUT_STREAMS VALUE(streams_out, ARRAY_U16, 3, ROWS, STREAMS, WIDTH)
#define POST VALUE(post, ARRAY_F32, 2, ROWS, STREAMS)
#define COMB VALUE(comb, ARRAY_F32, 3, ROWS, STREAMS, STREAMS)
#define Y VALUE(y, ARRAY_U16, 2, ROWS, WIDTH)
#define PART_HEADS VALUE(heads, ARRAY_U16, 3, ROWS, HEADS, HEAD_DIM)
#define SELECTED VALUE(selected, ARRAY_I32, 2, ROWS, TOPK)

enum { MOST_VALUES = 6 };

static const struct part_spec {
    const char *name;
    int has_state;
    struct value in[MOST_VALUES], out[MOST_VALUES];
} specs[DSV4_PARTS] = {
    [DSV4_PART_COLLAPSE] = {"collapse",
                            0,
                            {IN_STREAMS},
                            {VALUE(pre, ARRAY_F32, 2, ROWS, STREAMS), POST, COMB,
                             VALUE(collapsed, ARRAY_U16, 2, ROWS, WIDTH), Y}},
    [DSV4_PART_SPREAD] = {"spread", 0, {X, IN_STREAMS, POST, COMB}, {OUT_STREAMS}},
    [DSV4_PART_ROUTE] = {"route",
                         0,
                         {X},
                         {VALUE(experts, ARRAY_I32, 2, ROWS, CHOSEN),
                          VALUE(weights, ARRAY_F32, 2, ROWS, CHOSEN),
                          VALUE(scores, ARRAY_F32, 2, ROWS, EXPERTS)}},
    [DSV4_PART_MOE] = {"moe", 0, {X}, {Y}},
    [DSV4_PART_EXPERT] = {"expert", 0, {X, VALUE(weights, ARRAY_F32, 1, ROWS)}, {Y}},
    [DSV4_PART_COMPRESS] = {"compress",
                            1,
                            {X},
                            {VALUE(entries, ARRAY_U16, 2, CLOSED, HEAD_DIM),
                             VALUE(index_entries, ARRAY_U16, 2, CLOSED, INDEX_DIM)}},
    [DSV4_PART_INDEX] = {"index",
                         1,
                         {X},
                         {SELECTED, VALUE(index_scores, ARRAY_F32, 2, ROWS, SEEN)}},
    [DSV4_PART_ATTEND] = {"attend", 1, {X, SELECTED}, {PART_HEADS}},
    [DSV4_PART_OUTPUT] = {"output", 0, {PART_HEADS}, {Y}},
    [DSV4_PART_ATTENTION] = {"attention", 1, {X}, {Y}},
};

struct part_args {
    struct dsv4_part part;
    PyObject *handle;          /* owned */
    SessionObject *state;      /* owned, in_step counted, or NULL */
    void *inputs[MOST_VALUES]; /* owned */
    int32_t *ids;              /* owned */
    PyObject *outputs;         /* owned */
    int64_t sizes[SIZES];
};

static void part_args_free(struct part_args *a) {
    if (a->state)
        a->state->in_step--;
    Py_XDECREF(a->state);
    for (int i = 0; i < MOST_VALUES; i++)
        PyMem_Free(a->inputs[i]);
    PyMem_Free(a->ids);
    Py_XDECREF(a->outputs);
    Py_XDECREF(a->handle);
    PyMem_Free(a);
}

static void put_pointer(struct dsv4_part *part, const struct value *value, void *data) {
    *(void **)(void *)((char *)part + value->offset) = data;
}

/* Arrays of the tuple in the order of the table; only one that follows the first may be None. */
static int parse_inputs(struct part_args *a, const struct part_spec *spec, PyObject *tuple) {
    Py_ssize_t n = 0;
    while (n < MOST_VALUES && spec->in[n].name)
        n++;
    if (PyTuple_GET_SIZE(tuple) != n) {
        PyErr_Format(PyExc_ValueError, "%s: got %zd inputs, wanted %zd", spec->name,
                     PyTuple_GET_SIZE(tuple), n);
        return -1;
    }
    a->sizes[ROWS] = -1;
    for (Py_ssize_t i = 0; i < n; i++) {
        const struct value *value = &spec->in[i];
        PyObject *object = PyTuple_GET_ITEM(tuple, i);
        int64_t shape[3];
        if (i > 0 && object == Py_None)
            continue;
        for (int k = 0; k < value->rank; k++)
            shape[k] = a->sizes[value->dims[k]];
        a->inputs[i] = convert_array(object, value->name, value->type, value->rank, shape);
        if (!a->inputs[i])
            return -1;
        a->sizes[ROWS] = shape[0];
        put_pointer(&a->part, value, a->inputs[i]);
    }
    if (a->sizes[ROWS] < 1 || a->sizes[ROWS] > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: got %lld rows, wanted 1 to %d", spec->in[0].name,
                     (long long)a->sizes[ROWS], INT32_MAX);
        return -1;
    }
    a->part.n = (int32_t)a->sizes[ROWS];
    return 0;
}

static int parse_ids(struct part_args *a, PyObject *ids, int32_t vocab) {
    int32_t n = a->part.n;
    if (ids == Py_None)
        a->ids = PyMem_Calloc((size_t)n, sizeof *a->ids);
    else if (convert_ids(ids, "token_ids", vocab, &a->ids, &n) < 0)
        return -1;
    if (!a->ids) {
        PyErr_NoMemory();
        return -1;
    }
    if (n != a->part.n) {
        PyErr_Format(PyExc_ValueError, "token_ids: got %d, wanted one for each of the %d rows",
                     (int)n, (int)a->part.n);
        return -1;
    }
    a->part.token_ids = a->ids;
    return 0;
}

static int parse_part(struct part_args *a, const struct module_state *state, ModelObject *model,
                      PyObject *object, PyObject *ids, PyObject *inputs) {
    const struct dsv4_config *c = dsv4_model_config(handle_of(a->handle)->model);
    if (a->part.kind < 0 || a->part.kind >= DSV4_PARTS || a->part.layer < 0 ||
        a->part.layer >= c->num_hidden_layers) {
        PyErr_Format(PyExc_ValueError, "part: got kind %d of layer %d, wanted [0, %d) of [0, %d)",
                     (int)a->part.kind, (int)a->part.layer, DSV4_PARTS, (int)c->num_hidden_layers);
        return -1;
    }
    a->sizes[WIDTH] = c->hidden_size;
    a->sizes[STREAMS] = c->hc_mult;
    a->sizes[HEADS] = c->num_attention_heads;
    a->sizes[HEAD_DIM] = c->head_dim;
    a->sizes[EXPERTS] = c->n_routed_experts;
    a->sizes[CHOSEN] = c->num_experts_per_tok;
    a->sizes[TOPK] = c->index_topk;
    a->sizes[INDEX_DIM] = c->index_head_dim;
    if (object != Py_None) {
        if (!PyObject_TypeCheck(object, state->session_type) ||
            ((SessionObject *)object)->handle != a->handle) {
            PyErr_SetString(PyExc_ValueError, "state: wanted a state of this model's layer");
            return -1;
        }
        a->part.state = session_of(state, (SessionObject *)object);
        if (!a->part.state)
            return -1;
        a->state = (SessionObject *)Py_NewRef(object);
        a->state->in_step++;
    }
    if (parse_inputs(a, &specs[a->part.kind], inputs) < 0)
        return -1;
    return parse_ids(a, ids, model->vocab);
}

/* New arrays for the outputs; None for what this kind of layer does not have. */
static int make_outputs(struct part_args *a) {
    const struct part_spec *spec = &specs[a->part.kind];
    const struct dsv4_config *c = dsv4_model_config(handle_of(a->handle)->model);
    const int64_t ratio = c->compress_ratios[a->part.layer];
    const int64_t before = a->part.position, after = before + a->part.n;
    a->sizes[CLOSED] = ratio ? after / ratio - before / ratio : 0;
    a->sizes[SEEN] = ratio ? after / ratio : 0;
    Py_ssize_t n = 0;
    while (n < MOST_VALUES && spec->out[n].name)
        n++;
    a->outputs = PyTuple_New(n);
    for (Py_ssize_t i = 0; a->outputs && i < n; i++) {
        const struct value *value = &spec->out[i];
        int64_t shape[3];
        void *data = NULL;
        for (int k = 0; k < value->rank; k++)
            shape[k] = a->sizes[value->dims[k]];
        PyObject *array = value->dims[1] == INDEX_DIM && ratio != 4
                              ? Py_NewRef(Py_None)
                              : array_new(value->type, value->rank, shape, &data);
        if (!array)
            return -1;
        put_pointer(&a->part, value, data);
        PyTuple_SET_ITEM(a->outputs, i, array);
    }
    return a->outputs ? 0 : -1;
}

/* Between queue_enter and queue_leave: the state stays where it is. */
static dsv4_status run_part(struct part_args *a, const struct module_state *state) {
    dsv4_run *run = NULL;
    dsv4_error err = {0};
    dsv4_status status;
    if (a->part.state) {
        Py_BEGIN_ALLOW_THREADS
        a->part.position = dsv4_session_position(a->part.state);
        Py_END_ALLOW_THREADS
    }
    if (make_outputs(a) < 0)
        return DSV4_E_MEMORY;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_part_start(&run, handle_of(a->handle)->model, &a->part, &err);
    Py_END_ALLOW_THREADS
    if (!status)
        return finish_run(state, run);
    raise_status(state, status, &err);
    return status;
}

PyObject *part_function(PyObject *module, PyObject *args) {
    struct module_state *state = PyModule_GetState(module);
    ModelObject *model;
    PyObject *object, *ids, *inputs, *handle, *result = NULL;
    int kind, layer, number;
    if (!PyArg_ParseTuple(args, "O!iiiOOO!:part", state->model_type, &model, &kind, &layer, &number,
                          &object, &ids, &PyTuple_Type, &inputs) ||
        !(handle = open_handle(state, model)))
        return NULL;
    struct part_args *a = PyMem_Calloc(1, sizeof *a);
    if (!a)
        return PyErr_NoMemory();
    a->handle = Py_NewRef(handle);
    a->part = (struct dsv4_part){.kind = kind, .layer = layer};
    *(kind == DSV4_PART_COLLAPSE ? &a->part.site : &a->part.expert) = number;
    if (parse_part(a, state, model, object, ids, inputs) < 0 ||
        queue_enter(&handle_of(a->handle)->queue) < 0)
        goto done;
    const dsv4_status status = run_part(a, state);
    queue_leave(&handle_of(a->handle)->queue);
    if (status == DSV4_OK)
        result = Py_NewRef(a->outputs);
done:
    part_args_free(a);
    return result;
}

PyObject *layer_state_function(PyObject *module, PyObject *args) {
    struct module_state *state = PyModule_GetState(module);
    ModelObject *model;
    PyObject *handle;
    int layer;
    if (!PyArg_ParseTuple(args, "O!i:layer_state", state->model_type, &model, &layer) ||
        !(handle = open_handle(state, model)))
        return NULL;
    SessionObject *self = session_alloc(state->session_type, handle);
    if (!self)
        return NULL;
    dsv4_error err = {0};
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_create_layer(&self->session, handle_of(self->handle)->model, layer, &err);
    Py_END_ALLOW_THREADS
    return made_or_raised(state, status, &err, (PyObject *)self);
}
