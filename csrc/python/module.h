/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the bindings share: the module's state, the objects, errors and arrays.
 *
 * The entry points of dsv4._core are private and positional: defaults, keywords and coercion live
 * in Python.  The bindings do no math.  Rules of this folder:
 *  - the GIL is released around every engine call that can take more than a few microseconds, and
 * engine locks are taken only after that;
 *  - whatever a running step points to is on the heap and owned by the call, so a thread that never
 * returns (the interpreter exits) leaves valid memory behind;
 *  - every object remembers the process that made it: in a forked child nothing of the engine is
 * called.
 */
#ifndef DSV4_PYTHON_MODULE_H
#define DSV4_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sys/types.h>

#include "dsv4.h"

struct module_state {
    PyTypeObject *model_type, *session_type, *sampler_type, *edit_type, *memory_type; /* owned */
    /* owned: classes of dsv4.errors */
    PyObject *format_error, *nonfinite_error, *forked_error, *unavailable_error, *device_error;
};

/* The state of the module that made a type of ours (none of them can be subclassed). */
static inline struct module_state *state_of(PyTypeObject *type) {
    return (struct module_state *)PyType_GetModuleState(type);
}

/* ---- objects ---- */

enum { TICK_MS = 50 }; /* between two looks at pending signals; a fifth of the 250 ms of a Ctrl-C */

/* Who may run a step of a model now, and who waits for it (queue.c). */
struct queue {
    struct waiter *first, *last;
    unsigned long owner; /* thread whose turn it is */
    int busy;
};

/* The engine's model with one owner count: a PyCapsule around this.  The Model object, its
 * sessions, array views and running steps each hold the capsule, so that close() never takes memory
 * away from under them. */
struct handle {
    dsv4_model *model; /* owned */
    pid_t pid;         /* the process that loaded it */
    struct queue queue;
};

typedef struct {
    PyObject_HEAD
    PyObject *handle; /* owned capsule; NULL once closed */
    int32_t vocab;
} ModelObject;

typedef struct {
    PyObject_HEAD
    PyObject *handle;      /* owned capsule of its model */
    dsv4_session *session; /* owned; NULL once closed */
    PyObject *edit;        /* owned: the Edit whose functions its steps may call, or NULL */
    Py_ssize_t in_step;    /* steps that run or wait with it */
    Py_ssize_t in_call;    /* other calls; close() is refused while either is positive */
} SessionObject;

typedef struct {
    PyObject_HEAD
    dsv4_sampler *sampler; /* owned */
    int32_t vocab;
    Py_ssize_t in_use; /* steps that run with it now: a second one is refused */
} SamplerObject;

extern PyType_Spec model_spec, session_spec, sampler_spec, edit_spec;

/* Waits for this thread's turn to run a step; -1 with an exception set (Ctrl-C), then without it.
 * Between enter and leave no other thread is inside dsv4_step_start or holds a session's lock for
 * long. */
int queue_enter(struct queue *queue);
void queue_leave(struct queue *queue);

/* The handle inside a capsule of ours. */
struct handle *handle_of(PyObject *capsule);

/* 0, or -1 with ForkedProcessError set when this is another process than the one that loaded the
 * model. */
int check_process(const struct module_state *state, const struct handle *handle);

/* The capsule of an open model of this process (borrowed), or NULL with an exception set. */
PyObject *open_handle(const struct module_state *state, const ModelObject *model);

/* The engine's session, or NULL with an exception set: closed, or a forked child. */
dsv4_session *session_of(const struct module_state *state, SessionObject *session);

/*
 * Engine calls that take a session's lock, which a running step holds to its end: between enter and
 * leave they wait for their turn after it, where Ctrl-C reaches them.  NULL with an exception set.
 */
dsv4_session *call_enter(const struct module_state *state, SessionObject *self, int *queued);
void call_leave(SessionObject *self, int queued);

/* A session of this model's handle, without an engine's session yet. */
SessionObject *session_alloc(PyTypeObject *type, PyObject *handle);

/* py_state.c: state in pieces; methods of Session, and functions of the module. */
PyObject *session_fixed(SessionObject *self, PyObject *ignored);
PyObject *session_blocks(SessionObject *self, PyObject *args);
PyObject *stores_function(PyObject *module, PyObject *args);
PyObject *load_session_function(PyObject *module, PyObject *args);
PyObject *checksum_function(PyObject *module, PyObject *args);

/* py_edit.c: a method of Session; and what a run waits for when dsv4_run_wait gave 2: the function
 * is called and the run goes on, or is cancelled and -1 returned with an exception set. */
PyObject *session_edit(SessionObject *self, PyObject *edit);
int edit_call(dsv4_run *run);

/* A step's result of one sampler: (token, logprob, finish, [(id, logprob), ...]); finish is enum
 * dsv4_finish. */
PyObject *sample_to_python(const struct dsv4_sample *sample);

/* Number fields of a struct by name, for values that come in a dict. */
struct field {
    const char *name;
    size_t offset;
    enum { FIELD_I32, FIELD_U32, FIELD_U64, FIELD_F32, FIELD_F64 } type;
};

/* Fills `out` from a dict that has every field (and may have more keys); `what` names the dict in
 * messages. */
int fields_from_dict(void *out, const struct field *fields, size_t n, PyObject *dict,
                     const char *what);

/* _core.logprobs, a function of the module: log-softmax of rows of logits. */
PyObject *logprobs_function(PyObject *module, PyObject *args);

/* py_device.c, functions of the module: _core.devices, what the CUDA plugin finds; _core.split. */
enum { MAX_DEVICES = 64 }; /* those a model may use, too */
PyObject *devices_function(PyObject *module, PyObject *args);
PyObject *split_function(PyObject *module, PyObject *args);

/* ---- errors ---- */

/* Sets the exception of a failed status (never DSV4_OK) and returns NULL. */
PyObject *raise_status(const struct module_state *state, dsv4_status status, const dsv4_error *err);

/* What a call that succeeded made, or NULL with the exception of one that failed, after giving
 * `made` up. */
PyObject *made_or_raised(const struct module_state *state, dsv4_status status,
                         const dsv4_error *err, PyObject *made);

/* ---- arrays ---- */

enum array_type { ARRAY_U8, ARRAY_U16, ARRAY_I32, ARRAY_F32 };

/* Readies NumPy for this file set; -1 with an exception set. */
int convert_init(void);

/* A new C-contiguous array of undefined contents; *data is its first element.  NULL with an
 * exception set. */
PyObject *array_new(enum array_type type, int rank, const int64_t *shape, void **data);

/* The data of a writeable C-contiguous array of exactly this shape, for a call to fill; -1 in shape
 * matches any length, which is then stored there.  The caller holds the array.  NULL with an
 * exception set. */
void *array_out(PyObject *array, const char *name, enum array_type type, int rank, int64_t *shape);

/* A read-only uint8 view of memory that lives as long as `owner`. */
PyObject *array_view(const void *data, uint64_t nbytes, PyObject *owner);

/*
 * A copy of a one-dimensional sequence or integer array as int32, each 0 <= id < limit; *ids is
 * freed with PyMem_Free. ValueError and TypeError name `name`, the index and the limit; bool,
 * float, str and bytes are refused.
 */
int convert_ids(PyObject *object, const char *name, int64_t limit, int32_t **ids, int32_t *n);

/* _core.token_ids, a function of the module: convert_ids to a new int32 array. */
PyObject *token_ids_function(PyObject *module, PyObject *args);

/* A copy of a float32 or uint16 array of exactly this shape, freed with PyMem_Free; -1 in shape
 * matches any length, which is then stored there. */
void *convert_array(PyObject *object, const char *name, enum array_type type, int rank,
                    int64_t *shape);

#endif
