/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The measuring door: how fast N threads together read memory, run one multiply-add instruction,
 * or call one linear kernel over its weights.  Wall time; each thread has its contiguous share.
 * With py_kernels.c the one place of the bindings that includes kernel headers.
 */
#include "module.h"
#include "py_kernels.h"

#include <stdatomic.h>

#include "backend/stopwatch.h"
#include "cpu/dispatch.h"

enum { MAX_LIMITS = 64, MAX_REPEATS = 1000, MAX_TEAM = 4096 };

static const char *const kind_names[DSV4_LIMIT_KINDS] = {"read", "f32 fma", "bf16 dot", "byte dot"};

PyDoc_STRVAR(limits_doc,
             "limits(disable, /)\n--\n\n"
             "The walks and peaks this CPU can run, as (kind, name, set, address), weakest set "
             "first; kind is \"read\",\n"
             "\"f32 fma\", \"bf16 dot\" or \"byte dot\".  `disable` is as for kernel_variants.");

static PyObject *limits(PyObject *module, PyObject *disable) {
    (void)module;
    const struct dsv4_limit *found[MAX_LIMITS];
    const char *names = NULL;
    int n = 0;
    if (disable != Py_None && !(names = PyUnicode_AsUTF8(disable)))
        return NULL;
    const char *unknown = dsv4k_cpu_limits(found, &n, MAX_LIMITS, names);
    if (unknown) {
        raise_unknown_set(unknown);
        return NULL;
    }
    PyObject *list = PyList_New(n);
    for (int i = 0; list && i < n; i++) {
        PyObject *item = Py_BuildValue("(sssK)", kind_names[found[i]->kind], found[i]->name,
                                       found[i]->set, (unsigned long long)(uintptr_t)found[i]);
        if (item)
            PyList_SET_ITEM(list, i, item);
        else
            Py_CLEAR(list);
    }
    return list;
}

/* The limit that limits() gave this address, a walk or not; NULL with an exception set. */
static const struct dsv4_limit *limit_at(unsigned long long address, int read) {
    const struct dsv4_limit *found[MAX_LIMITS];
    int n = 0;
    dsv4k_cpu_limits(found, &n, MAX_LIMITS, NULL);
    for (int i = 0; i < n; i++)
        if ((uintptr_t)found[i] == address && (found[i]->kind == DSV4_LIMIT_READ) == read)
            return found[i];
    PyErr_Format(PyExc_ValueError, "limit: got %llu, wanted the address of a %s in limits()",
                 address, read ? "walk" : "peak");
    return NULL;
}

/* Runs a job on a team of its own, without the GIL; the list of its times. */
static PyObject *timed(PyObject *module, int threads, int repeats, dsv4_job_fn *fn, void *ctx) {
    dsv4_error err = {0};
    if (threads < 1 || threads > MAX_TEAM || repeats < 1 || repeats > MAX_REPEATS) {
        PyErr_Format(PyExc_ValueError,
                     "got %d threads and %d repeats, wanted 1 to %d threads and 1 to %d repeats",
                     threads, repeats, MAX_TEAM, MAX_REPEATS);
        return NULL;
    }
    double *seconds = PyMem_New(double, (size_t)repeats);
    if (!seconds)
        return PyErr_NoMemory();
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_stopwatch(seconds, repeats, threads, fn, ctx, &err);
    Py_END_ALLOW_THREADS
    PyObject *list = NULL;
    if (status)
        raise_status(PyModule_GetState(module), status, &err);
    else
        list = PyList_New(repeats);
    for (int i = 0; list && i < repeats; i++) {
        PyObject *item = PyFloat_FromDouble(seconds[i]);
        if (item)
            PyList_SET_ITEM(list, i, item);
        else
            Py_CLEAR(list);
    }
    PyMem_Free(seconds);
    return list;
}

/* ---- reading ---- */

struct reading {
    dsv4k_read_fn *fn;
    const uint8_t *data;
    int64_t bytes;
    atomic_ullong sum; /* somebody must want it, or the compiler reads nothing */
};

static void read_job(dsv4_worker *w, void *ctx) {
    struct reading *r = ctx;
    int64_t lo, hi;
    dsv4_share(w, r->bytes, 4096, &lo, &hi);
    atomic_fetch_add(&r->sum, r->fn(r->data + lo, (size_t)(hi - lo)));
}

PyDoc_STRVAR(time_read_doc, "time_read(threads, limit, buffer, repeats, /)\n--\n\n"
                            "Seconds of each reading of a buffer by a walk of limits(), each "
                            "thread its share.");

static PyObject *time_read(PyObject *module, PyObject *args) {
    int threads, repeats;
    unsigned long long address;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "iKy*i:time_read", &threads, &address, &buffer, &repeats))
        return NULL;
    const struct dsv4_limit *walk = limit_at(address, 1);
    PyObject *list = NULL;
    if (walk) {
        struct reading r = {.fn = walk->read, .data = buffer.buf, .bytes = buffer.len};
        list = timed(module, threads, repeats, read_job, &r);
    }
    PyBuffer_Release(&buffer);
    return list;
}

/* ---- instructions ---- */

struct peaking {
    dsv4k_peak_fn *fn;
    int64_t rounds;
    double operations; /* of one thread, the same for all */
};

static void peak_job(dsv4_worker *w, void *ctx) {
    struct peaking *p = ctx;
    double operations = p->fn(p->rounds);
    if (w->id == 0)
        p->operations = operations;
}

PyDoc_STRVAR(time_peak_doc,
             "time_peak(threads, limit, rounds, repeats, /)\n--\n\n"
             "(operations of all threads, seconds of each repeat) of a peak of limits().");

static PyObject *time_peak(PyObject *module, PyObject *args) {
    int threads, repeats;
    unsigned long long address;
    long long rounds;
    if (!PyArg_ParseTuple(args, "iKLi:time_peak", &threads, &address, &rounds, &repeats))
        return NULL;
    const struct dsv4_limit *peak = limit_at(address, 0);
    if (!peak)
        return NULL;
    struct peaking p = {.fn = peak->peak, .rounds = rounds};
    PyObject *list = timed(module, threads, repeats, peak_job, &p);
    return list ? Py_BuildValue("(dN)", p.operations * threads, list) : NULL;
}

/* ---- linear layers ---- */

struct calling {
    dsv4k_linear_fn *fn;
    const struct dsv4_linear_args *calls; /* [n] */
    int64_t n;
    uint8_t *scratch; /* scratch_bytes for each worker */
    size_t scratch_bytes;
    int32_t tile;
};

/* This worker's rows of each call, in tiles, as a step makes them. */
static void linear_job(dsv4_worker *w, void *ctx) {
    struct calling *c = ctx;
    for (int64_t i = 0; i < c->n; i++) {
        struct dsv4_linear_args a = c->calls[i];
        int64_t lo, hi;
        dsv4_share(w, a.w->rows, 4, &lo, &hi);
        a.scratch = c->scratch + (size_t)w->id * c->scratch_bytes;
        for (int32_t row = (int32_t)lo; row < hi; row = a.row1) {
            a.row0 = row;
            a.row1 = hi - row > c->tile ? row + c->tile : (int32_t)hi;
            c->fn(&a);
        }
    }
}

PyDoc_STRVAR(time_linear_doc,
             "time_linear(threads, function, calls, scratch, tile, repeats, /)\n--\n\n"
             "Seconds of each run of a linear kernel, by its address, over the calls: a buffer of "
             "struct\n"
             "dsv4_linear_args.  Each thread has its share of every call's rows, in calls of at "
             "most `tile` rows, and\n"
             "its share of the scratch: equal parts, each what the kernels ask for.");

static PyObject *time_linear(PyObject *module, PyObject *args) {
    int threads, tile, repeats;
    unsigned long long function;
    Py_buffer calls, scratch;
    if (!PyArg_ParseTuple(args, "iKy*w*ii:time_linear", &threads, &function, &calls, &scratch,
                          &tile, &repeats))
        return NULL;
    PyObject *list = NULL;
    if (!function || tile < 1 || threads < 1 ||
        calls.len % (Py_ssize_t)sizeof(struct dsv4_linear_args)) {
        PyErr_SetString(PyExc_ValueError, "wanted a function, a positive number of threads and of "
                                          "rows a tile, and whole dsv4_linear_args");
    } else {
        struct calling c = {.fn = (dsv4k_linear_fn *)(uintptr_t)function,
                            .calls = calls.buf,
                            .n = calls.len / (Py_ssize_t)sizeof(struct dsv4_linear_args),
                            .scratch = scratch.buf,
                            .scratch_bytes = (size_t)scratch.len / (size_t)threads / 64 * 64,
                            .tile = tile};
        list = timed(module, threads, repeats, linear_job, &c);
    }
    PyBuffer_Release(&calls);
    PyBuffer_Release(&scratch);
    return list;
}

static PyMethodDef functions[] = {
    {"limits", limits, METH_O, limits_doc},
    {"time_read", time_read, METH_VARARGS, time_read_doc},
    {"time_peak", time_peak, METH_VARARGS, time_peak_doc},
    {"time_linear", time_linear, METH_VARARGS, time_linear_doc},
    {NULL, NULL, 0, NULL},
};

int dsv4_py_add_limits(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}
