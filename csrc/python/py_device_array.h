/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of a GPU as an object. */
#ifndef DSV4_PY_DEVICE_ARRAY_H
#define DSV4_PY_DEVICE_ARRAY_H

#include "module.h"

typedef struct {
    PyObject_HEAD
    PyObject *handle; /* owned capsule of the model, which keeps the device */
    struct dsv4_memory memory;
    int mine; /* made for this object; otherwise where the model keeps a tensor, for reading */
} MemoryObject;

extern PyType_Spec memory_spec;

/* Functions of the module: where a tensor lies, and the bytes that are free. */
PyObject *tensor_memory_function(PyObject *module, PyObject *args);
PyObject *memory_room_function(PyObject *module, PyObject *args);

#endif
