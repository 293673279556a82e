/* SPDX-License-Identifier: Apache-2.0 */
/* Where a step copies internals to: arrays of the caller, held until the step is done. */
#ifndef DSV4_PY_TRACE_H
#define DSV4_PY_TRACE_H

#include "module.h"

struct taps {
    struct dsv4_tap *taps; /* owned [layers][DSV4_VALUES], or NULL */
    PyObject *items;       /* owned tuple that holds the arrays, or NULL */
    int any, on_device;    /* some were read; they are Memory */
};

/* From None or a sequence of (layer, value, array), or of (layer, value, (Memory, first byte, rows,
 * width)) with a width as in struct dsv4_tap; -1 with an exception set, still to be freed. */
int taps_parse(struct taps *t, PyObject *trace, PyObject *handle, const struct module_state *state);
void taps_free(struct taps *t);

/* A method of Model: the shape of a value. */
PyObject *model_value(ModelObject *self, PyObject *args);
/* The names of all values, in the order of their numbers. */
PyObject *value_names(void);

#endif
