/* SPDX-License-Identifier: Apache-2.0 */
/* dsv4._core.Sampler: the parameters and counts of one answer, csrc/gen/sampler.h. */
#include "module.h"

static const struct field sampling_fields[] = {
#define FIELD(name, type) {#name, offsetof(struct dsv4_sampling, name), type}
    FIELD(seed, FIELD_U64),
    FIELD(temperature, FIELD_F32),
    FIELD(top_p, FIELD_F32),
    FIELD(min_p, FIELD_F32),
    FIELD(presence_penalty, FIELD_F32),
    FIELD(frequency_penalty, FIELD_F32),
    FIELD(repetition_penalty, FIELD_F32),
    FIELD(top_k, FIELD_I32),
    FIELD(logprobs, FIELD_I32),
    FIELD(min_new_tokens, FIELD_I32),
    FIELD(max_new_tokens, FIELD_I32),
    FIELD(choice, FIELD_U32),
#undef FIELD
};

/* The lists of a dsv4_sampling while a sampler is created. */
struct lists {
    int32_t *stop_ids, *bias_ids, *force;
    float *bias_values;
};

/* logit_bias: a tuple of (id, value) pairs. */
static int bias_from_pairs(struct dsv4_sampling *params, struct lists *lists, PyObject *pairs,
                           int32_t vocab) {
    if (!PyTuple_Check(pairs)) {
        PyErr_Format(PyExc_TypeError, "logit_bias: got %s, wanted a tuple of (id, value) pairs",
                     Py_TYPE(pairs)->tp_name);
        return -1;
    }
    const Py_ssize_t n = PyTuple_GET_SIZE(pairs);
    PyObject *ids = PyTuple_New(n);
    int status = -1;
    lists->bias_values = PyMem_New(float, (size_t)n + 1);
    if (!ids || !lists->bias_values) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *id, *pair = PyTuple_GET_ITEM(pairs, i);
        if (!PyTuple_Check(pair)) {
            PyErr_Format(PyExc_TypeError, "logit_bias[%zd]: wanted a pair (id, value)", i);
            goto done;
        }
        if (!PyArg_ParseTuple(pair, "Of:logit_bias", &id, &lists->bias_values[i]))
            goto done;
        PyTuple_SET_ITEM(ids, i, Py_NewRef(id));
    }
    status = convert_ids(ids, "logit_bias", vocab, &lists->bias_ids, &params->n_bias);
done:
    Py_XDECREF(ids);
    return status;
}

static int sampling_from_dict(struct dsv4_sampling *params, struct lists *lists, PyObject *dict,
                              int32_t vocab) {
    if (fields_from_dict(params, sampling_fields, Py_ARRAY_LENGTH(sampling_fields), dict,
                         "sampling") < 0)
        return -1;
    PyObject *stop = PyDict_GetItemString(dict, "stop_ids"); /* borrowed, as the next two */
    PyObject *force = PyDict_GetItemString(dict, "force_tokens");
    PyObject *bias = PyDict_GetItemString(dict, "logit_bias");
    if (!stop || !force || !bias) {
        PyErr_SetString(PyExc_ValueError, "sampling: needs stop_ids, force_tokens and logit_bias");
        return -1;
    }
    if (convert_ids(stop, "stop_token_ids", vocab, &lists->stop_ids, &params->n_stop_ids) < 0 ||
        convert_ids(force, "force_tokens", vocab, &lists->force, &params->n_force) < 0 ||
        bias_from_pairs(params, lists, bias, vocab) < 0)
        return -1;
    params->stop_ids = lists->stop_ids;
    params->force = lists->force;
    params->bias_ids = lists->bias_ids;
    params->bias_values = lists->bias_values;
    return 0;
}

static PyObject *sampler_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    int vocab;
    PyObject *dict;
    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Sampler takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "iO!:Sampler", &vocab, &PyDict_Type, &dict))
        return NULL;
    if (vocab < 1) {
        PyErr_Format(PyExc_ValueError, "vocab: got %d, wanted a positive number", vocab);
        return NULL;
    }
    struct dsv4_sampling params = {0};
    struct lists lists = {0};
    dsv4_error err = {0};
    SamplerObject *self = (SamplerObject *)type->tp_alloc(type, 0);
    if (self && sampling_from_dict(&params, &lists, dict, vocab) == 0) {
        self->vocab = vocab;
        const dsv4_status status = dsv4_sampler_create(&self->sampler, vocab, &params, &err);
        if (status)
            raise_status(state_of(type), status, &err);
    }
    PyMem_Free(lists.stop_ids);
    PyMem_Free(lists.bias_ids);
    PyMem_Free(lists.bias_values);
    PyMem_Free(lists.force);
    if (self && !self->sampler)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void sampler_dealloc(SamplerObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    dsv4_sampler_destroy(self->sampler);
    type->tp_free(self);
    Py_DECREF(type);
}

static int refuse_busy(const SamplerObject *self) {
    if (self->in_use)
        PyErr_SetString(PyExc_RuntimeError, "the sampler is in use by a running step");
    return self->in_use ? -1 : 0;
}

static PyObject *sampler_seen(SamplerObject *self, PyObject *args) {
    PyObject *object;
    int is_prompt;
    int32_t *ids, n;
    if (!PyArg_ParseTuple(args, "Op:seen", &object, &is_prompt) ||
        convert_ids(object, "ids", self->vocab, &ids, &n) < 0)
        return NULL;
    const int busy = refuse_busy(self); /* after the conversion, which may have run other threads */
    if (!busy)
        dsv4_sampler_seen(self->sampler, ids, n, is_prompt);
    PyMem_Free(ids);
    if (busy)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *sampler_sample(SamplerObject *self, PyObject *args) {
    PyObject *object;
    long long position;
    int64_t shape[1] = {self->vocab};
    struct dsv4_sample sample;
    if (!PyArg_ParseTuple(args, "OL:sample", &object, &position))
        return NULL;
    float *logits = convert_array(object, "logits", ARRAY_F32, 1, shape);
    if (!logits)
        return NULL;
    PyObject *result = NULL;
    if (refuse_busy(self) == 0) {
        self->in_use++;
        Py_BEGIN_ALLOW_THREADS
        dsv4_sampler_sample(self->sampler, logits, position, &sample);
        Py_END_ALLOW_THREADS
        result = sample_to_python(&sample);
        self->in_use--;
    }
    PyMem_Free(logits);
    return result;
}

/* [(id, logprob), ...], best first. */
static PyObject *top_list(const int32_t *ids, const float *logprobs, int32_t n) {
    PyObject *list = PyList_New(n);
    for (int32_t i = 0; list && i < n; i++) {
        PyObject *pair = Py_BuildValue("(id)", (int)ids[i], (double)logprobs[i]);
        if (!pair)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, pair);
    }
    return list;
}

PyObject *sample_to_python(const struct dsv4_sample *sample) {
    PyObject *top = top_list(sample->top_ids, sample->top_logprobs, sample->n_top);
    return top ? Py_BuildValue("(idiN)", (int)sample->token, (double)sample->logprob,
                               (int)sample->finish, top)
               : NULL;
}

PyObject *logprobs_function(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *object, *ids_object, *result = NULL;
    int k;
    int32_t *ids = NULL, *top_ids = NULL, n = 0;
    float *top = NULL;
    int64_t shape[2] = {-1, -1};
    if (!PyArg_ParseTuple(args, "OOi:logprobs", &object, &ids_object, &k))
        return NULL;
    float *logits = convert_array(object, "logits", ARRAY_F32, 2, shape);
    if (!logits || convert_ids(ids_object, "ids", shape[1], &ids, &n) < 0)
        goto done;
    if (n != shape[0] || k < 0 || k > shape[1] || shape[1] > DSV4_SAMPLER_MAX_VOCAB) {
        PyErr_Format(PyExc_ValueError,
                     "logprobs: got %d ids and k = %d for logits of shape (%lld, %lld)", (int)n, k,
                     (long long)shape[0], (long long)shape[1]);
        goto done;
    }
    top_ids = PyMem_New(int32_t, (size_t)k + 1);
    top = PyMem_New(float, (size_t)k + 1);
    if (!top_ids || !top) {
        PyErr_NoMemory();
        goto done;
    }
    result = PyList_New(n);
    for (int32_t i = 0; result && i < n; i++) {
        const float *row = logits + (size_t)i * (size_t)shape[1];
        float logprob;
        Py_BEGIN_ALLOW_THREADS
        logprob = dsv4_logprobs(top_ids, top, row, (int32_t)shape[1], ids[i], k);
        Py_END_ALLOW_THREADS
        PyObject *list = top_list(top_ids, top, k);
        PyObject *pair = list ? Py_BuildValue("(dN)", (double)logprob, list) : NULL;
        if (!pair)
            Py_CLEAR(result);
        else
            PyList_SET_ITEM(result, i, pair);
    }
done:
    PyMem_Free(logits);
    PyMem_Free(ids);
    PyMem_Free(top_ids);
    PyMem_Free(top);
    return result;
}

static PyMethodDef sampler_methods[] = {
    {"seen", (PyCFunction)(void (*)(void))sampler_seen, METH_VARARGS,
     PyDoc_STR("seen($self, ids, is_prompt, /)\n--\n\nTake note of tokens that this sampler did "
               "not produce.")},
    {"sample", (PyCFunction)(void (*)(void))sampler_sample, METH_VARARGS,
     PyDoc_STR("sample($self, logits, position, /)\n--\n\n"
               "(token, logprob, finish, [(id, logprob), ...]) for float32 logits [vocab].")},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot sampler_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR(
                    "Sampler(vocab, sampling, /)\n--\n\nThe sampling parameters of one answer.")},
    {Py_tp_new, sampler_new},
    {Py_tp_dealloc, sampler_dealloc},
    {Py_tp_methods, sampler_methods},
    {0, NULL},
};

PyType_Spec sampler_spec = {
    .name = "dsv4._core.Sampler",
    .basicsize = sizeof(SamplerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = sampler_slots,
};
