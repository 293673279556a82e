/* SPDX-License-Identifier: Apache-2.0 */
/* Functions of dsv4._core that run parts of a layer. */
#ifndef DSV4_PYTHON_PY_PART_H
#define DSV4_PYTHON_PY_PART_H

#include "module.h"

PyObject *part_function(PyObject *module, PyObject *args);
PyObject *layer_state_function(PyObject *module, PyObject *args);

#endif
