/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps and single layers: arguments in, the wait that answers Ctrl-C, results out.
 *
 * A call owns everything its run points to, on the heap (module.h says why), and holds a reference
 * to the model's handle and to every session and sampler until the run is finished.
 */
#include "py_step.h"

#include "py_trace.h"

/* ---- wait ---- */

dsv4_status finish_run(const struct module_state *state, dsv4_run *run) {
    int running = 1, interrupted = 0;
    dsv4_error err = {0};
    dsv4_status status;
    while (running) {
        Py_BEGIN_ALLOW_THREADS
        running = dsv4_run_wait(run, TICK_MS);
        Py_END_ALLOW_THREADS
        if (running == 2 && interrupted)
            dsv4_run_resume(run, NULL);
        else if (running == 2)
            interrupted = edit_call(run) < 0;
        else if (running && !interrupted && PyErr_CheckSignals() < 0) {
            interrupted = 1;
            dsv4_run_cancel(run);
        }
    }
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_run_finish(run, &err);
    Py_END_ALLOW_THREADS
    if (interrupted)
        return DSV4_E_CANCELLED;
    if (status)
        raise_status(state, status, &err);
    return status;
}

/* ---- step ---- */

/* One segment's Python side. */
struct holder {
    SessionObject *session; /* owned, in_step counted */
    SamplerObject *sampler; /* owned, in_use counted, or NULL */
    PyObject *logits;       /* owned, or NULL */
    struct taps taps;
    int32_t *ids; /* owned */
};

struct step_args {
    PyObject *handle; /* owned */
    Py_ssize_t n;
    struct dsv4_segment *segments; /* owned [n] */
    struct dsv4_sample *samples;   /* owned [n] */
    struct holder *holders;        /* owned [n] */
    PyObject *seconds;             /* owned array, or NULL */
    float *seconds_data;
};

static void step_args_free(struct step_args *a) {
    for (Py_ssize_t i = 0; a->holders && i < a->n; i++) {
        struct holder *holder = &a->holders[i];
        if (holder->session)
            holder->session->in_step--;
        if (holder->sampler)
            holder->sampler->in_use--;
        Py_XDECREF(holder->session);
        Py_XDECREF(holder->sampler);
        Py_XDECREF(holder->logits);
        PyMem_Free(holder->ids);
        taps_free(&holder->taps);
    }
    Py_XDECREF(a->seconds);
    PyMem_Free(a->segments);
    PyMem_Free(a->samples);
    PyMem_Free(a->holders);
    Py_XDECREF(a->handle);
    PyMem_Free(a);
}

/* Reads segments[i]: takes references first, so that step_args_free undoes exactly what was done.
 */
static int parse_segment(struct step_args *a, Py_ssize_t i, PyObject *item,
                         const struct module_state *state, int32_t vocab) {
    struct holder *holder = &a->holders[i];
    struct dsv4_segment *segment = &a->segments[i];
    SessionObject *session;
    PyObject *ids, *sampler, *trace = Py_None;
    int prompt = -1;
    char name[40];
    if (!PyTuple_Check(item)) {
        PyErr_Format(PyExc_TypeError, "segments[%zd]: got %s, wanted a tuple", i,
                     Py_TYPE(item)->tp_name);
        return -1;
    }
    if (!PyArg_ParseTuple(item, "O!OiO|Oi", state->session_type, &session, &ids, &segment->want,
                          &sampler, &trace, &prompt))
        return -1;
    PyOS_snprintf(name, sizeof name, "segments[%zd]: ids", i);
    if (convert_ids(ids, name, vocab, &holder->ids, &segment->n) < 0)
        return -1;
    segment->ids = holder->ids;
    segment->prompt = prompt < 0 ? segment->n > 1 : prompt;
    if (session->handle != a->handle) {
        PyErr_Format(PyExc_ValueError, "segments[%zd]: the session belongs to another model", i);
        return -1;
    }
    segment->session = session_of(state, session);
    if (!segment->session)
        return -1;
    holder->session = (SessionObject *)Py_NewRef(session);
    session->in_step++;
    if (sampler != Py_None) {
        SamplerObject *object = (SamplerObject *)sampler;
        if (!PyObject_TypeCheck(sampler, state->sampler_type) || object->vocab != vocab ||
            object->in_use) {
            PyErr_Format(PyExc_ValueError,
                         "segments[%zd]: wanted a sampler of this vocabulary that no step uses", i);
            return -1;
        }
        holder->sampler = (SamplerObject *)Py_NewRef(sampler);
        object->in_use++;
        segment->sampler = object->sampler;
        segment->sample = &a->samples[i];
    }
    if (taps_parse(&holder->taps, trace, a->handle, state) < 0)
        return -1;
    segment->taps = holder->taps.taps;
    segment->taps_on_device = holder->taps.on_device;
    return 0;
}

static int parse_logits(struct step_args *a, Py_ssize_t i, int32_t vocab) {
    struct dsv4_segment *segment = &a->segments[i];
    if (segment->want < DSV4_LOGITS_NONE || segment->want > DSV4_LOGITS_ALL) {
        PyErr_Format(PyExc_ValueError, "segments[%zd]: want: got %d, wanted 0, 1 or 2", i,
                     (int)segment->want);
        return -1;
    }
    if (segment->want == DSV4_LOGITS_NONE)
        return 0;
    const int64_t shape[2] = {segment->want == DSV4_LOGITS_ALL ? segment->n : 1, vocab};
    a->holders[i].logits = array_new(ARRAY_F32, 2, shape, (void **)&segment->logits);
    return a->holders[i].logits ? 0 : -1;
}

static int parse_step(struct step_args *a, const struct module_state *state, ModelObject *self,
                      PyObject *segments, PyObject *seconds) {
    PyObject *tuple = PySequence_Tuple(segments);
    int status = -1;
    if (!tuple)
        return -1;
    const Py_ssize_t n = PyTuple_GET_SIZE(tuple);
    if (n < 1 || n > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "segments: got %zd, wanted at least one", n);
        goto done;
    }
    a->n = n;
    a->segments = PyMem_Calloc((size_t)n, sizeof *a->segments);
    a->samples = PyMem_Calloc((size_t)n, sizeof *a->samples);
    a->holders = PyMem_Calloc((size_t)n, sizeof *a->holders);
    if (!a->segments || !a->samples || !a->holders) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        if (parse_segment(a, i, PyTuple_GET_ITEM(tuple, i), state, self->vocab) < 0 ||
            parse_logits(a, i, self->vocab) < 0)
            goto done;
    }
    if (seconds != Py_None) {
        int64_t shape[1] = {DSV4_PHASES};
        a->seconds_data = array_out(seconds, "seconds", ARRAY_F32, 1, shape);
        if (!a->seconds_data)
            goto done;
        a->seconds = Py_NewRef(seconds);
    }
    status = 0;
done:
    Py_DECREF(tuple);
    return status;
}

static PyObject *step_results(const struct step_args *a) {
    PyObject *list = PyList_New(a->n);
    for (Py_ssize_t i = 0; list && i < a->n; i++) {
        const struct holder *holder = &a->holders[i];
        PyObject *sample = holder->sampler ? sample_to_python(&a->samples[i]) : Py_NewRef(Py_None);
        PyObject *pair =
            sample ? Py_BuildValue("(ON)", holder->logits ? holder->logits : Py_None, sample)
                   : NULL;
        if (!pair)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, pair);
    }
    return list;
}

PyObject *model_step(ModelObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    PyObject *segments, *seconds, *result = NULL;
    dsv4_run *run = NULL;
    dsv4_error err = {0};
    dsv4_status status;
    if (!PyArg_ParseTuple(args, "OO:step", &segments, &seconds) || !open_handle(state, self))
        return NULL;
    struct step_args *a = PyMem_Calloc(1, sizeof *a);
    if (!a)
        return PyErr_NoMemory();
    a->handle = Py_NewRef(self->handle);
    if (parse_step(a, state, self, segments, seconds) < 0)
        goto done;
    if (queue_enter(&handle_of(a->handle)->queue) < 0)
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_step_start(&run, handle_of(a->handle)->model, a->segments, (int32_t)a->n,
                             a->seconds_data, &err);
    Py_END_ALLOW_THREADS
    if (status)
        raise_status(state, status, &err);
    else
        status = finish_run(state, run);
    queue_leave(&handle_of(a->handle)->queue);
    if (status == DSV4_OK)
        result = step_results(a);
done:
    step_args_free(a);
    return result;
}

/* ---- layer ---- */

struct layer_args {
    PyObject *handle;  /* owned */
    uint16_t *streams; /* owned */
    int32_t *ids;      /* owned */
    PyObject *out;     /* owned */
    uint16_t *out_data;
    struct taps taps;
};

static void layer_args_free(struct layer_args *a) {
    PyMem_Free(a->streams);
    PyMem_Free(a->ids);
    Py_XDECREF(a->out);
    taps_free(&a->taps);
    Py_XDECREF(a->handle);
    PyMem_Free(a);
}

static int parse_layer(struct layer_args *a, int32_t *n, ModelObject *self, PyObject *streams,
                       PyObject *ids, PyObject *trace) {
    const struct dsv4_config *config = dsv4_model_config(handle_of(a->handle)->model);
    int64_t shape[3] = {-1, config->hc_mult, config->hidden_size};
    a->streams = convert_array(streams, "streams", ARRAY_U16, 3, shape);
    if (!a->streams || convert_ids(ids, "token_ids", self->vocab, &a->ids, n) < 0)
        return -1;
    if (shape[0] != *n) {
        PyErr_Format(PyExc_ValueError,
                     "token_ids: got %d, wanted one for each of the %lld rows of streams", (int)*n,
                     (long long)shape[0]);
        return -1;
    }
    a->out = array_new(ARRAY_U16, 3, shape, (void **)&a->out_data);
    if (!a->out)
        return -1;
    if (taps_parse(&a->taps, trace, a->handle, state_of(Py_TYPE(self))) < 0)
        return -1;
    if (a->taps.on_device) {
        PyErr_SetString(PyExc_ValueError, "trace: got one on the device of a layer called alone, "
                                          "which the CPU computes");
        return -1;
    }
    return 0;
}

PyObject *model_layer(ModelObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    PyObject *streams, *ids, *trace, *result = NULL;
    int layer;
    int32_t n;
    dsv4_run *run = NULL;
    dsv4_error err = {0};
    dsv4_status status;
    if (!PyArg_ParseTuple(args, "iOOO:layer", &layer, &streams, &ids, &trace) ||
        !open_handle(state, self))
        return NULL;
    struct layer_args *a = PyMem_Calloc(1, sizeof *a);
    if (!a)
        return PyErr_NoMemory();
    a->handle = Py_NewRef(self->handle);
    if (parse_layer(a, &n, self, streams, ids, trace) < 0)
        goto done;
    if (queue_enter(&handle_of(a->handle)->queue) < 0)
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_layer_start(&run, handle_of(a->handle)->model, layer, a->out_data, a->streams,
                              a->ids, n, a->taps.taps, &err);
    Py_END_ALLOW_THREADS
    if (status)
        raise_status(state, status, &err);
    else
        status = finish_run(state, run);
    queue_leave(&handle_of(a->handle)->queue);
    if (status == DSV4_OK)
        result = Py_NewRef(a->out);
done:
    layer_args_free(a);
    return result;
}

/* ---- head ---- */

struct head_args {
    PyObject *handle;  /* owned */
    uint16_t *streams; /* owned */
    PyObject *out;     /* owned */
    float *logits;
};

PyObject *model_head(ModelObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    PyObject *streams, *result = NULL;
    dsv4_run *run = NULL;
    dsv4_error err = {0};
    dsv4_status status;
    if (!PyArg_ParseTuple(args, "O:head", &streams) || !open_handle(state, self))
        return NULL;
    struct head_args *a = PyMem_Calloc(1, sizeof *a);
    if (!a)
        return PyErr_NoMemory();
    a->handle = Py_NewRef(self->handle);
    const struct dsv4_config *config = dsv4_model_config(handle_of(a->handle)->model);
    int64_t shape[3] = {-1, config->hc_mult, config->hidden_size};
    a->streams = convert_array(streams, "streams", ARRAY_U16, 3, shape);
    if (!a->streams)
        goto done;
    if (shape[0] > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "streams: got %lld rows, wanted at most %d",
                     (long long)shape[0], INT32_MAX);
        goto done;
    }
    const int64_t rows[2] = {shape[0], self->vocab};
    a->out = array_new(ARRAY_F32, 2, rows, (void **)&a->logits);
    if (!a->out || queue_enter(&handle_of(a->handle)->queue) < 0)
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_head_start(&run, handle_of(a->handle)->model, a->logits, a->streams,
                             (int32_t)shape[0], &err);
    Py_END_ALLOW_THREADS
    if (status)
        raise_status(state, status, &err);
    else
        status = finish_run(state, run);
    queue_leave(&handle_of(a->handle)->queue);
    if (status == DSV4_OK)
        result = Py_NewRef(a->out);
done:
    PyMem_Free(a->streams);
    Py_XDECREF(a->out);
    Py_XDECREF(a->handle);
    PyMem_Free(a);
    return result;
}
