/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Arrays in and out, the only file that knows NumPy.  Everything that comes in is copied, so that
 * nothing another thread does to an array can reach a running step; everything that goes out is new
 * or read-only.
 */
#include "module.h"

#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

static const int numpy_type[] = {[ARRAY_U8] = NPY_UINT8,
                                 [ARRAY_U16] = NPY_UINT16,
                                 [ARRAY_I32] = NPY_INT32,
                                 [ARRAY_F32] = NPY_FLOAT32};
static const char *const type_name[] = {
    [ARRAY_U8] = "uint8", [ARRAY_U16] = "uint16", [ARRAY_I32] = "int32", [ARRAY_F32] = "float32"};

int convert_init(void) {
    import_array1(-1);
    return 0;
}

PyObject *array_new(enum array_type type, int rank, const int64_t *shape, void **data) {
    npy_intp dims[4];
    for (int i = 0; i < rank; i++)
        dims[i] = (npy_intp)shape[i];
    PyObject *array = PyArray_SimpleNew(rank, dims, numpy_type[type]);
    if (array && data)
        *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

void *array_out(PyObject *object, const char *name, enum array_type type, int rank,
                int64_t *shape) {
    if (!PyArray_Check(object) || PyArray_TYPE((PyArrayObject *)object) != numpy_type[type] ||
        PyArray_NDIM((PyArrayObject *)object) != rank ||
        !PyArray_ISCARRAY((PyArrayObject *)object)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: wanted a writeable contiguous array of %s with %d dimensions", name,
                     type_name[type], rank);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    for (int i = 0; i < rank; i++) {
        if (shape[i] >= 0 && shape[i] != PyArray_DIM(array, i)) {
            PyErr_Format(PyExc_ValueError, "%s: dimension %d is %zd long, wanted %lld", name, i,
                         (Py_ssize_t)PyArray_DIM(array, i), (long long)shape[i]);
            return NULL;
        }
        shape[i] = PyArray_DIM(array, i);
    }
    return PyArray_DATA(array);
}

PyObject *array_view(const void *data, uint64_t nbytes, PyObject *owner) {
    npy_intp dims[1] = {(npy_intp)nbytes};
    /* NumPy wants a mutable pointer; without NPY_ARRAY_WRITEABLE it never writes through it. */
    void *start = (void *)(uintptr_t)data;
    PyObject *array = PyArray_New(&PyArray_Type, 1, dims, NPY_UINT8, NULL, start, 0,
                                  NPY_ARRAY_C_CONTIGUOUS, NULL);
    if (!array)
        return NULL;
    if (PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(owner)) < 0) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

/* ---- ids ---- */

static int id_out_of_range(const char *name, Py_ssize_t i, PyObject *got, int64_t limit) {
    if (got)
        PyErr_Format(PyExc_ValueError, "%s[%zd]: got %S, wanted 0 <= id < %lld", name, i, got,
                     (long long)limit);
    return -1;
}

static int ids_from_array(PyObject *object, const char *name, int64_t limit, int32_t *out) {
    int is_signed = PyTypeNum_ISSIGNED(PyArray_TYPE((PyArrayObject *)object));
    PyObject *array =
        PyArray_FROMANY(object, is_signed ? NPY_INT64 : NPY_UINT64, 1, 1, NPY_ARRAY_CARRAY_RO);
    if (!array)
        return -1;
    const npy_intp n = PyArray_DIM((PyArrayObject *)array, 0);
    /* Read as unsigned, a negative id is larger than any limit. */
    const uint64_t *values = PyArray_DATA((PyArrayObject *)array);
    int status = 0;
    for (npy_intp i = 0; i < n && status == 0; i++) {
        if (values[i] >= (uint64_t)limit) {
            PyObject *got = is_signed ? PyLong_FromLongLong((int64_t)values[i])
                                      : PyLong_FromUnsignedLongLong(values[i]);
            status = id_out_of_range(name, i, got, limit);
            Py_XDECREF(got);
        } else {
            out[i] = (int32_t)values[i];
        }
    }
    Py_DECREF(array);
    return status;
}

static int ids_from_tuple(PyObject *tuple, const char *name, int64_t limit, int32_t *out) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
        PyObject *item = PyTuple_GET_ITEM(tuple, i);
        if (PyBool_Check(item) || !PyIndex_Check(item)) {
            PyErr_Format(PyExc_TypeError, "%s[%zd]: got %s, wanted an int", name, i,
                         Py_TYPE(item)->tp_name);
            return -1;
        }
        PyObject *number = PyNumber_Index(item);
        if (!number)
            return -1;
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
        if (overflow || value < 0 || value >= limit) {
            id_out_of_range(name, i, number, limit);
            Py_DECREF(number);
            return -1;
        }
        Py_DECREF(number);
        out[i] = (int32_t)value;
    }
    return 0;
}

int convert_ids(PyObject *object, const char *name, int64_t limit, int32_t **ids, int32_t *n) {
    PyObject *tuple = NULL;
    Py_ssize_t count;
    const int is_array = PyArray_Check(object);
    if (is_array) {
        PyArrayObject *array = (PyArrayObject *)object;
        if (!PyTypeNum_ISINTEGER(PyArray_TYPE(array)) || PyArray_NDIM(array) != 1) {
            PyErr_Format(
                PyExc_TypeError,
                "%s: got an array of %S with %d dimensions, wanted one dimension of integers", name,
                (PyObject *)PyArray_DESCR(array), PyArray_NDIM(array));
            return -1;
        }
        count = PyArray_DIM(array, 0);
    } else {
        if (!PySequence_Check(object) || PyUnicode_Check(object) || PyBytes_Check(object) ||
            PyByteArray_Check(object)) {
            PyErr_Format(PyExc_TypeError, "%s: got %s, wanted a sequence or array of ints", name,
                         Py_TYPE(object)->tp_name);
            return -1;
        }
        /* A tuple of our own: an __index__ that changes the list cannot move it under us. */
        tuple = PySequence_Tuple(object);
        if (!tuple)
            return -1;
        count = PyTuple_GET_SIZE(tuple);
    }
    int status = -1;
    int32_t *out = NULL;
    if (count > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: got %zd ids, wanted at most %d", name, count,
                     INT32_MAX);
        goto done;
    }
    out = PyMem_New(int32_t, (size_t)count + 1);
    if (!out) {
        PyErr_NoMemory();
        goto done;
    }
    status = is_array ? ids_from_array(object, name, limit, out)
                      : ids_from_tuple(tuple, name, limit, out);
done:
    Py_XDECREF(tuple);
    if (status < 0) {
        PyMem_Free(out);
        return -1;
    }
    *ids = out;
    *n = (int32_t)count;
    return 0;
}

PyObject *token_ids_function(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *object;
    const char *name;
    int limit;
    int32_t *ids, n;
    if (!PyArg_ParseTuple(args, "Osi:token_ids", &object, &name, &limit) ||
        convert_ids(object, name, limit, &ids, &n) < 0)
        return NULL;
    const int64_t shape[1] = {n};
    void *data;
    PyObject *array = array_new(ARRAY_I32, 1, shape, &data);
    if (array)
        memcpy(data, ids, (size_t)n * sizeof *ids);
    PyMem_Free(ids);
    return array;
}

/* ---- arrays ---- */

void *convert_array(PyObject *object, const char *name, enum array_type type, int rank,
                    int64_t *shape) {
    if (!PyArray_Check(object) || PyArray_TYPE((PyArrayObject *)object) != numpy_type[type] ||
        PyArray_NDIM((PyArrayObject *)object) != rank) {
        PyErr_Format(PyExc_TypeError, "%s: got %s, wanted an array of %s with %d dimensions", name,
                     Py_TYPE(object)->tp_name, type_name[type], rank);
        return NULL;
    }
    PyArrayObject *array =
        (PyArrayObject *)PyArray_FROMANY(object, numpy_type[type], rank, rank, NPY_ARRAY_CARRAY_RO);
    if (!array)
        return NULL;
    void *copy = NULL;
    for (int i = 0; i < rank; i++) {
        if (shape[i] >= 0 && shape[i] != PyArray_DIM(array, i)) {
            PyErr_Format(PyExc_ValueError, "%s: dimension %d is %zd long, wanted %lld", name, i,
                         (Py_ssize_t)PyArray_DIM(array, i), (long long)shape[i]);
            goto done;
        }
        shape[i] = PyArray_DIM(array, i);
    }
    const size_t nbytes = (size_t)PyArray_NBYTES(array);
    copy = PyMem_Malloc(nbytes ? nbytes : 1);
    if (copy)
        memcpy(copy, PyArray_DATA(array), nbytes);
    else
        PyErr_NoMemory();
done:
    Py_DECREF(array);
    return copy;
}
