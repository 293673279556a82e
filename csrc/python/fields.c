/* SPDX-License-Identifier: Apache-2.0 */
/* Dicts of numbers into C structs.  Refuses missing keys, other types, and integers that do not
 * fit. */
#include "module.h"

#include <string.h>

static int integer_field(unsigned char *at, const struct field *field, PyObject *value,
                         const char *what) {
    if (PyBool_Check(value) || !PyLong_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s[%s]: got %s, wanted an int", what, field->name,
                     Py_TYPE(value)->tp_name);
        return -1;
    }
    int fits = 0;
    if (field->type == FIELD_U64) {
        const uint64_t number = PyLong_AsUnsignedLongLong(value);
        fits = !PyErr_Occurred();
        memcpy(at, &number, sizeof number);
    } else {
        const int64_t number = PyLong_AsLongLong(value);
        const int64_t low = field->type == FIELD_U32 ? 0 : INT32_MIN;
        const int64_t high = field->type == FIELD_U32 ? UINT32_MAX : INT32_MAX;
        fits = !PyErr_Occurred() && number >= low && number <= high;
        const uint32_t bits = (uint32_t)number; /* two's complement: the same bytes as int32 */
        memcpy(at, &bits, sizeof bits);
    }
    if (fits)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s[%s]: %S is out of range", what, field->name, value);
    return -1;
}

static int real_field(unsigned char *at, const struct field *field, PyObject *value,
                      const char *what) {
    if (PyBool_Check(value) || (!PyFloat_Check(value) && !PyLong_Check(value))) {
        PyErr_Format(PyExc_TypeError, "%s[%s]: got %s, wanted a number", what, field->name,
                     Py_TYPE(value)->tp_name);
        return -1;
    }
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred())
        return -1;
    const float narrow = (float)number;
    if (field->type == FIELD_F64)
        memcpy(at, &number, sizeof number);
    else
        memcpy(at, &narrow, sizeof narrow);
    return 0;
}

int fields_from_dict(void *out, const struct field *fields, size_t n, PyObject *dict,
                     const char *what) {
    for (size_t i = 0; i < n; i++) {
        PyObject *value = PyDict_GetItemString(
            dict, fields[i].name); /* borrowed: nothing below runs Python code */
        if (!value) {
            PyErr_Format(PyExc_ValueError, "%s: no key %s", what, fields[i].name);
            return -1;
        }
        unsigned char *at = (unsigned char *)out + fields[i].offset;
        const int real = fields[i].type == FIELD_F32 || fields[i].type == FIELD_F64;
        if ((real ? real_field : integer_field)(at, &fields[i], value, what) < 0)
            return -1;
    }
    return 0;
}
