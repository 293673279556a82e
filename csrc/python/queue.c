/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whose step it is.  The engine queues steps of one model too, but its callers cannot be
 * interrupted while they wait; here they wait in ticks and leave the queue when a signal handler
 * raises.  First come, first served.  The GIL guards the queue.
 */
#include "module.h"

#include <pythread.h>

struct waiter {
    struct waiter *next;
    PyThread_type_lock lock; /* owned; held until it is this waiter's turn */
};

static struct waiter *waiter_new(void) {
    struct waiter *w = PyMem_Calloc(1, sizeof *w);
    if (w)
        w->lock = PyThread_allocate_lock();
    if (!w || !w->lock) {
        PyMem_Free(w);
        PyErr_NoMemory();
        return NULL;
    }
    PyThread_acquire_lock(w->lock, WAIT_LOCK);
    return w;
}

static void waiter_free(struct waiter *w) {
    PyThread_release_lock(w->lock);
    PyThread_free_lock(w->lock);
    PyMem_Free(w);
}

/* Takes a waiter out of the queue; 0 if it is not in it any more: it has its turn. */
static int unlink_waiter(struct queue *queue, struct waiter *w) {
    struct waiter *previous = NULL, *at = queue->first;
    while (at && at != w) {
        previous = at;
        at = at->next;
    }
    if (!at)
        return 0;
    *(previous ? &previous->next : &queue->first) = w->next;
    if (queue->last == w)
        queue->last = previous;
    return 1;
}

int queue_enter(struct queue *queue) {
    const unsigned long thread = PyThread_get_thread_ident();
    if (!queue->busy) {
        queue->busy = 1;
        queue->owner = thread;
        return 0;
    }
    if (queue->owner == thread) {
        PyErr_SetString(PyExc_RuntimeError,
                        "a step of this model is running in this thread: a signal handler or "
                        "callback cannot start another");
        return -1;
    }
    struct waiter *w = waiter_new();
    if (!w)
        return -1;
    *(queue->last ? &queue->last->next : &queue->first) = w;
    queue->last = w;
    for (;;) {
        PyLockStatus status;
        Py_BEGIN_ALLOW_THREADS
        status = PyThread_acquire_lock_timed(w->lock, (PY_TIMEOUT_T)TICK_MS * 1000, 0);
        Py_END_ALLOW_THREADS
        if (status == PY_LOCK_ACQUIRED)
            break;
        if (PyErr_CheckSignals() < 0) {
            if (unlink_waiter(queue, w) == 0) /* its turn came while the handler ran */
                queue_leave(queue);
            waiter_free(w);
            return -1;
        }
    }
    queue->owner = thread;
    waiter_free(w);
    return 0;
}

void queue_leave(struct queue *queue) {
    struct waiter *w = queue->first;
    queue->owner = 0;
    if (!w) {
        queue->busy = 0;
        return;
    }
    queue->first = w->next;
    if (!queue->first)
        queue->last = NULL;
    PyThread_release_lock(w->lock);
}
