/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dsv4._core.Model: loading, closing, and what a model can tell about itself.  Steps are in
 * py_step.c.
 */
#include "py_step.h"
#include "py_trace.h"

#include <string.h>
#include <unistd.h>

/* ---- handle ---- */

static const char handle_name[] = "dsv4._core.handle";

struct handle *handle_of(PyObject *capsule) {
    return PyCapsule_GetPointer(capsule, handle_name);
}

static void handle_destroy(PyObject *capsule) {
    struct handle *handle = handle_of(capsule);
    /* The threads of the model do not exist in a forked child: waiting for them would never end. */
    if (handle->pid == getpid()) {
        Py_BEGIN_ALLOW_THREADS
        dsv4_model_destroy(handle->model);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(handle);
}

/* An empty handle; NULL with an exception set. */
static PyObject *handle_new(void) {
    struct handle *handle = PyMem_Calloc(1, sizeof *handle);
    if (!handle)
        return PyErr_NoMemory();
    handle->pid = getpid();
    PyObject *capsule = PyCapsule_New(handle, handle_name, handle_destroy);
    if (!capsule)
        PyMem_Free(handle);
    return capsule;
}

/* ---- parameters ---- */

static const struct field config_fields[] = {
#define FIELD(name, type) {#name, offsetof(struct dsv4_config, name), type}
    FIELD(vocab_size, FIELD_I32),
    FIELD(hidden_size, FIELD_I32),
    FIELD(num_hidden_layers, FIELD_I32),
    FIELD(num_attention_heads, FIELD_I32),
    FIELD(head_dim, FIELD_I32),
    FIELD(qk_rope_head_dim, FIELD_I32),
    FIELD(q_lora_rank, FIELD_I32),
    FIELD(o_groups, FIELD_I32),
    FIELD(o_lora_rank, FIELD_I32),
    FIELD(moe_intermediate_size, FIELD_I32),
    FIELD(n_routed_experts, FIELD_I32),
    FIELD(num_experts_per_tok, FIELD_I32),
    FIELD(num_hash_layers, FIELD_I32),
    FIELD(sliding_window, FIELD_I32),
    FIELD(index_n_heads, FIELD_I32),
    FIELD(index_head_dim, FIELD_I32),
    FIELD(index_topk, FIELD_I32),
    FIELD(hc_mult, FIELD_I32),
    FIELD(hc_sinkhorn_iters, FIELD_I32),
    FIELD(max_position_embeddings, FIELD_I32),
    FIELD(rope_theta, FIELD_F64),
    FIELD(compress_rope_theta, FIELD_F64),
    FIELD(yarn_factor, FIELD_F64),
    FIELD(yarn_beta_fast, FIELD_F64),
    FIELD(yarn_beta_slow, FIELD_F64),
    FIELD(yarn_original_positions, FIELD_I32),
    FIELD(rms_norm_eps, FIELD_F32),
    FIELD(hc_eps, FIELD_F32),
    FIELD(routed_scaling_factor, FIELD_F32),
    FIELD(swiglu_limit, FIELD_F32),
#undef FIELD
};

static const struct field option_fields[] = {
#define FIELD(name, type) {#name, offsetof(struct dsv4_options, name), type}
    FIELD(numerics, FIELD_I32),     FIELD(april_kv, FIELD_I32),      FIELD(april_shared, FIELD_I32),
    FIELD(n_thread, FIELD_I32),     FIELD(chunk_tok, FIELD_I32),     FIELD(use_mmap, FIELD_I32),
    FIELD(expert_bytes, FIELD_U64), FIELD(copy_to_nodes, FIELD_I32), FIELD(use_cuda, FIELD_I32),
    FIELD(tensor_cores, FIELD_I32), FIELD(gpu_bytes, FIELD_U64),
#undef FIELD
};

/* Everything dsv4_model_create reads, and the Python objects whose strings it points into. */
struct load_args {
    struct dsv4_config config;
    struct dsv4_options options;
    int32_t *ratios; /* owned, as the next five */
    int32_t *cuda_devices;
    struct dsv4_shard_desc *shards;
    struct dsv4_tensor_desc *tensors;
    PyObject *shard_list, *tensor_list; /* tuples of tuples: they keep the strings */
    PyObject *strings[4];               /* of the options, or NULL */
    Py_buffer hot;                      /* of the options; obj NULL: none */
};

static void load_args_free(struct load_args *a) {
    PyMem_Free(a->ratios);
    PyMem_Free(a->cuda_devices);
    PyMem_Free(a->shards);
    PyMem_Free(a->tensors);
    Py_XDECREF(a->shard_list);
    Py_XDECREF(a->tensor_list);
    for (size_t i = 0; i < Py_ARRAY_LENGTH(a->strings); i++)
        Py_XDECREF(a->strings[i]);
    PyBuffer_Release(&a->hot);
}

static int parse_config(struct load_args *a, PyObject *dict) {
    if (fields_from_dict(&a->config, config_fields, Py_ARRAY_LENGTH(config_fields), dict,
                         "config") < 0)
        return -1;
    PyObject *ratios = PyDict_GetItemString(dict, "compress_ratios"); /* borrowed */
    int32_t n = 0;
    if (!ratios) {
        PyErr_SetString(PyExc_ValueError, "config: no key compress_ratios");
        return -1;
    }
    if (convert_ids(ratios, "compress_ratios", INT32_MAX, &a->ratios, &n) < 0)
        return -1;
    if (n < a->config.num_hidden_layers) {
        PyErr_Format(PyExc_ValueError,
                     "compress_ratios: got %d entries, wanted at least num_hidden_layers = %d",
                     (int)n, (int)a->config.num_hidden_layers);
        return -1;
    }
    a->config.compress_ratios = a->ratios;
    return 0;
}

static int parse_options(struct load_args *a, PyObject *dict) {
    static const char *const names[] = {"disable", "cuda_plugin", "cuda_driver", "nccl"};
    const char **fields[] = {&a->options.disable, &a->options.cuda_plugin, &a->options.cuda_driver,
                             &a->options.nccl};
    if (fields_from_dict(&a->options, option_fields, Py_ARRAY_LENGTH(option_fields), dict,
                         "options") < 0)
        return -1;
    PyObject *devices = PyDict_GetItemString(dict, "cuda_devices"); /* borrowed */
    if (!devices) {
        PyErr_SetString(PyExc_ValueError, "options: no key cuda_devices");
        return -1;
    }
    if (convert_ids(devices, "cuda_devices", INT32_MAX, &a->cuda_devices,
                    &a->options.n_cuda_device) < 0)
        return -1;
    a->options.cuda_devices = a->cuda_devices;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(a->strings); i++) {
        PyObject *value = PyDict_GetItemString(dict, names[i]); /* borrowed */
        if (!value || value == Py_None)
            continue;
        a->strings[i] = Py_NewRef(value);
        if (!(*fields[i] = PyUnicode_AsUTF8(value)))
            return -1;
    }
    PyObject *hot = PyDict_GetItemString(dict, "hot"); /* borrowed */
    if (!hot || hot == Py_None)
        return 0;
    if (PyObject_GetBuffer(hot, &a->hot, PyBUF_CONTIG_RO) < 0)
        return -1;
    a->options.hot = a->hot.buf;
    a->options.n_hot = (int32_t)(a->hot.len / (Py_ssize_t)sizeof *a->options.hot);
    return 0;
}

static int parse_shards(struct load_args *a, PyObject *object) {
    a->shard_list = PySequence_Tuple(object);
    if (!a->shard_list)
        return -1;
    const Py_ssize_t n = PyTuple_GET_SIZE(a->shard_list);
    a->shards = PyMem_Calloc((size_t)n + 1, sizeof *a->shards);
    if (!a->shards) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        struct dsv4_shard_desc *shard = &a->shards[i];
        PyObject *item = PyTuple_GET_ITEM(a->shard_list, i);
        unsigned long long size;
        if (!PyTuple_Check(item)) {
            PyErr_Format(PyExc_TypeError, "shards[%zd]: wanted a tuple (name, fd, size)", i);
            return -1;
        }
        if (!PyArg_ParseTuple(item, "siK", &shard->path, &shard->fd, &size))
            return -1;
        shard->size = size;
    }
    return 0;
}

static int parse_tensor(struct dsv4_tensor_desc *tensor, PyObject *item, Py_ssize_t i) {
    PyObject *shape;
    unsigned long long offset, nbytes;
    if (!PyTuple_Check(item)) {
        PyErr_Format(PyExc_TypeError,
                     "tensors[%zd]: wanted a tuple (name, dtype, shape, shard, offset, nbytes)", i);
        return -1;
    }
    if (!PyArg_ParseTuple(item, "siO!iKK", &tensor->name, &tensor->dtype, &PyTuple_Type, &shape,
                          &tensor->shard, &offset, &nbytes))
        return -1;
    tensor->offset = offset;
    tensor->nbytes = nbytes;
    const Py_ssize_t rank = PyTuple_GET_SIZE(shape);
    if (rank > (Py_ssize_t)Py_ARRAY_LENGTH(tensor->shape)) {
        PyErr_Format(PyExc_ValueError, "tensors[%zd]: got %zd dimensions, wanted at most 4", i,
                     rank);
        return -1;
    }
    tensor->rank = (int32_t)rank;
    for (Py_ssize_t k = 0; k < rank; k++) {
        tensor->shape[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, k));
        if (tensor->shape[k] < 0) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "tensors[%zd]: negative dimension", i);
            return -1;
        }
    }
    return 0;
}

static int parse_tensors(struct load_args *a, PyObject *object) {
    a->tensor_list = PySequence_Tuple(object);
    if (!a->tensor_list)
        return -1;
    const Py_ssize_t n = PyTuple_GET_SIZE(a->tensor_list);
    a->tensors = PyMem_Calloc((size_t)n + 1, sizeof *a->tensors);
    if (!a->tensors) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        if (parse_tensor(&a->tensors[i], PyTuple_GET_ITEM(a->tensor_list, i), i) < 0)
            return -1;
    }
    if (n > INT32_MAX || PyTuple_GET_SIZE(a->shard_list) > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "tensors: more than 2^31");
        return -1;
    }
    return 0;
}

/* ---- load ---- */

struct progress {
    PyObject *callable;   /* borrowed from the call, or NULL */
    PyThreadState *saved; /* of the loading thread, while it runs without the GIL */
    int failed;           /* an exception is set and waits for the end of the load */
};

/* Called by the engine from the loading thread: shows progress and answers Ctrl-C. */
static int report_progress(void *arg, uint64_t done, uint64_t total) {
    struct progress *progress = arg;
    if (progress->failed)
        return 1;
    PyEval_RestoreThread(progress->saved);
    if (PyErr_CheckSignals() < 0) {
        progress->failed = 1;
    } else if (progress->callable) {
        PyObject *result = PyObject_CallFunction(progress->callable, "KK", (unsigned long long)done,
                                                 (unsigned long long)total);
        progress->failed = result == NULL;
        Py_XDECREF(result);
    }
    progress->saved = PyEval_SaveThread();
    return progress->failed;
}

/* 0, or -1 with an exception set. */
static int load(struct module_state *state, struct handle *handle, struct load_args *a,
                PyObject *callable) {
    struct progress progress = {.callable = callable == Py_None ? NULL : callable};
    dsv4_error err = {0};
    a->options.progress = report_progress;
    a->options.progress_arg = &progress;
    progress.saved = PyEval_SaveThread();
    const dsv4_status status = dsv4_model_create(
        &handle->model, &a->config, a->shards, (int32_t)PyTuple_GET_SIZE(a->shard_list), a->tensors,
        (int32_t)PyTuple_GET_SIZE(a->tensor_list), &a->options, &err);
    PyEval_RestoreThread(progress.saved);
    if (progress.failed)
        return -1;
    if (status)
        raise_status(state, status, &err);
    return status ? -1 : 0;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *config, *shards, *tensors, *options, *progress;
    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Model takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!OOO!O:Model", &PyDict_Type, &config, &shards, &tensors,
                          &PyDict_Type, &options, &progress))
        return NULL;
    ModelObject *self = (ModelObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    struct load_args a = {0};
    int status = -1;
    self->handle = handle_new();
    if (!self->handle || parse_config(&a, config) < 0 || parse_shards(&a, shards) < 0 ||
        parse_tensors(&a, tensors) < 0 || parse_options(&a, options) < 0)
        goto done;
    self->vocab = a.config.vocab_size;
    status = load(state_of(type), handle_of(self->handle), &a, progress);
done:
    load_args_free(&a);
    if (status < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void model_dealloc(ModelObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_CLEAR(self->handle);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- methods ---- */

PyObject *open_handle(const struct module_state *state, const ModelObject *self) {
    if (!self->handle) {
        PyErr_SetString(PyExc_ValueError, "the model is closed");
        return NULL;
    }
    return check_process(state, handle_of(self->handle)) < 0 ? NULL : self->handle;
}

static PyObject *model_close(ModelObject *self, PyObject *Py_UNUSED(ignored)) {
    Py_CLEAR(self->handle);
    Py_RETURN_NONE;
}

static PyObject *model_kernels(ModelObject *self, PyObject *Py_UNUSED(ignored)) {
    PyObject *handle = open_handle(state_of(Py_TYPE(self)), self);
    PyObject *list = handle ? PyList_New(dsv4_kernel_count()) : NULL;
    for (int32_t i = 0; list && i < dsv4_kernel_count(); i++) {
        const char *op, *variant;
        dsv4_model_kernel(handle_of(handle)->model, i, &op, &variant);
        PyObject *pair = Py_BuildValue("(ss)", op, variant);
        if (!pair)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, pair);
    }
    return list;
}

static PyObject *model_tensor(ModelObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    const char *name;
    const void *data;
    uint64_t nbytes;
    dsv4_error err = {0};
    if (!PyArg_ParseTuple(args, "s:tensor", &name))
        return NULL;
    PyObject *handle = open_handle(state, self);
    if (!handle)
        return NULL;
    const dsv4_status status =
        dsv4_model_tensor(handle_of(handle)->model, name, &data, &nbytes, &err);
    return status ? raise_status(state, status, &err) : array_view(data, nbytes, handle);
}

static PyObject *model_int(ModelObject *self, void *closure) {
    PyObject *handle = open_handle(state_of(Py_TYPE(self)), self);
    if (!handle)
        return NULL;
    const dsv4_model *model = handle_of(handle)->model;
    return PyLong_FromLong(closure ? dsv4_model_chunk(model) : dsv4_model_threads(model));
}

static PyObject *model_experts(ModelObject *self, void *Py_UNUSED(closure)) {
    PyObject *handle = open_handle(state_of(Py_TYPE(self)), self);
    if (!handle)
        return NULL;
    struct dsv4_expert_counts n;
    dsv4_model_experts(handle_of(handle)->model, &n);
    return Py_BuildValue("{s:i,s:K,s:K,s:K,s:K,s:K}", "slots", (int)n.slots, "slot_bytes",
                         (unsigned long long)n.slot_bytes, "kept", (unsigned long long)n.kept,
                         "read", (unsigned long long)n.read, "mapped", (unsigned long long)n.mapped,
                         "bytes", (unsigned long long)n.bytes);
}

static PyObject *model_placement(ModelObject *self, void *Py_UNUSED(closure)) {
    PyObject *handle = open_handle(state_of(Py_TYPE(self)), self);
    if (!handle)
        return NULL;
    struct dsv4_placement p;
    dsv4_model_placement(handle_of(handle)->model, &p);
    return Py_BuildValue(
        "{s:i,s:i,s:K,s:K,s:K}", "experts", (int)p.experts, "experts_on_device",
        (int)p.experts_on_device, "weight_bytes", (unsigned long long)p.weight_bytes, "pass_bytes",
        (unsigned long long)p.pass_bytes, "shared_bytes", (unsigned long long)p.shared_bytes);
}

static PyObject *model_uses(ModelObject *self, PyObject *out) {
    struct module_state *state = state_of(Py_TYPE(self));
    PyObject *handle = open_handle(state, self);
    Py_buffer view;
    dsv4_error err = {0};
    if (!handle || PyObject_GetBuffer(out, &view, PyBUF_CONTIG) < 0)
        return NULL;
    dsv4_model *model = handle_of(handle)->model;
    const struct dsv4_config *c = dsv4_model_config(model);
    const Py_ssize_t wanted = (Py_ssize_t)c->num_hidden_layers * c->n_routed_experts * 8;
    dsv4_status status = DSV4_OK;
    if (view.len != wanted) {
        PyErr_Format(PyExc_ValueError, "out: got %zd bytes, wanted %zd", view.len, wanted);
    } else {
        Py_INCREF(handle); /* it may be closed meanwhile */
        Py_BEGIN_ALLOW_THREADS
        status = dsv4_model_uses(model, view.buf, &err);
        Py_END_ALLOW_THREADS
        Py_DECREF(handle);
        if (status)
            raise_status(state, status, &err);
    }
    PyBuffer_Release(&view);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *model_stages(ModelObject *self, void *Py_UNUSED(closure)) {
    PyObject *handle = open_handle(state_of(Py_TYPE(self)), self);
    if (!handle)
        return NULL;
    struct dsv4_stage stages[MAX_DEVICES];
    const int32_t n = dsv4_model_stages(handle_of(handle)->model, stages, MAX_DEVICES);
    PyObject *list = PyList_New(n);
    for (int32_t i = 0; list && i < n; i++) {
        const struct dsv4_stage *s = &stages[i];
        PyObject *item =
            Py_BuildValue("(iiiKK)", (int)s->device, (int)s->first, (int)s->end,
                          (unsigned long long)s->weight_bytes, (unsigned long long)s->work_bytes);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, item);
    }
    return list;
}

static PyObject *model_closed(ModelObject *self, void *Py_UNUSED(closure)) {
    return PyBool_FromLong(self->handle == NULL);
}

static PyMethodDef model_methods[] = {
    {"step", (PyCFunction)(void (*)(void))model_step, METH_VARARGS,
     PyDoc_STR("step($self, segments, seconds, /)\n--\n\n"
               "One forward pass over [(session, ids, want, sampler or None[, trace]), ...].\n\n"
               "want is 0 (no logits), 1 (last row) or 2 (all rows).  Returns [(float32 [rows, "
               "vocab] or None, sample or\n"
               "None), ...].  trace is None or [(layer, index in VALUES, array), ...], each of "
               "which receives one row for\n"
               "each token (entry) as `value` says.  seconds is None or float32 [len(PHASES)], "
               "which receives the time spent.")},
    {"layer", (PyCFunction)(void (*)(void))model_layer, METH_VARARGS,
     PyDoc_STR("layer($self, layer, streams, ids, trace, /)\n--\n\n"
               "One layer alone from position 0: uint16 bf16 codes [n, hc_mult, hidden_size] in "
               "and out.")},
    {"head", (PyCFunction)(void (*)(void))model_head, METH_VARARGS,
     PyDoc_STR("head($self, streams, /)\n--\n\n"
               "Logits float32 [n, vocab] of streams after a layer: uint16 bf16 codes [n, hc_mult, "
               "hidden_size].")},
    {"value", (PyCFunction)(void (*)(void))model_value, METH_VARARGS,
     PyDoc_STR("value($self, layer, value, /)\n--\n\n"
               "Rows of a traced value: (int32 rather than float32, shape of a row, one for each "
               "entry rather than\n"
               "token, last dimension grows by the visible entries); None where the layer has "
               "none.")},
    {"kernels", (PyCFunction)(void (*)(void))model_kernels, METH_NOARGS,
     PyDoc_STR("kernels($self, /)\n--\n\n[(operation, variant), ...] that this model runs.")},
    {"tensor", (PyCFunction)(void (*)(void))model_tensor, METH_VARARGS,
     PyDoc_STR("tensor($self, name, /)\n--\n\nRead-only uint8 view of a tensor's bytes, valid as "
               "long as it is held.")},
    {"uses", (PyCFunction)(void (*)(void))model_uses, METH_O,
     PyDoc_STR("uses($self, out, /)\n--\n\n"
               "Fills uint64 [layers, routed experts]: how often tokens chose each on devices.")},
    {"close", (PyCFunction)(void (*)(void))model_close, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\nGive up the weights; they go when steps, sessions and views "
               "are done too.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_getset[] = {
    {"threads", (getter)(void (*)(void))model_int, NULL, PyDoc_STR("int: threads of its team."),
     NULL},
    {"chunk", (getter)(void (*)(void))model_int, NULL, PyDoc_STR("int: most tokens per pass."),
     &model_getset},
    {"experts", (getter)(void (*)(void))model_experts, NULL,
     PyDoc_STR("dict: struct dsv4_expert_counts."), NULL},
    {"placement", (getter)(void (*)(void))model_placement, NULL,
     PyDoc_STR("dict: struct dsv4_placement."), NULL},
    {"stages", (getter)(void (*)(void))model_stages, NULL,
     PyDoc_STR("list of (device, first layer, end layer, bytes of weights, bytes of a pass): on "
               "GPUs."),
     NULL},
    {"closed", (getter)(void (*)(void))model_closed, NULL, PyDoc_STR("bool: close() was called."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Model(config, shards, tensors, options, progress, /)\n--\n\n"
                                  "Loaded weights: immutable, shared freely between threads.")},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_getset},
    {0, NULL},
};

PyType_Spec model_spec = {
    .name = "dsv4._core.Model",
    .basicsize = sizeof(ModelObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};
