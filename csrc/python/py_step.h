/* SPDX-License-Identifier: Apache-2.0 */
/* The methods of dsv4._core.Model that run the engine. */
#ifndef DSV4_PYTHON_PY_STEP_H
#define DSV4_PYTHON_PY_STEP_H

#include "module.h"

/*
 * Waits for a run and frees it; DSV4_OK, or another status with an exception set.  When a signal
 * handler raises (Ctrl-C), or the function of an edit, the run is cancelled and that exception is
 * the result, once: later signals are left to the interpreter.
 */
dsv4_status finish_run(const struct module_state *state, dsv4_run *run);

PyObject *model_step(ModelObject *self, PyObject *args);
PyObject *model_layer(ModelObject *self, PyObject *args);
PyObject *model_head(ModelObject *self, PyObject *args);

#endif
