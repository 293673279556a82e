/* SPDX-License-Identifier: Apache-2.0 */
/* The state of a session in pieces, for files: dsv4/state_file.py knows how they lie in one. */
#include "module.h"

#include <string.h>

PyObject *session_fixed(SessionObject *self, PyObject *Py_UNUSED(ignored)) {
    int queued;
    dsv4_session *session = call_enter(state_of(Py_TYPE(self)), self, &queued);
    if (!session)
        return NULL;
    uint64_t nbytes;
    const uint8_t *fixed;
    Py_BEGIN_ALLOW_THREADS
    fixed = dsv4_session_fixed(session, &nbytes);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    return array_view(fixed, nbytes, (PyObject *)self);
}

enum { MOST_BLOCKS = 256, MOST_PARTS = MOST_BLOCKS * DSV4_STATE_PARTS };

PyObject *session_blocks(SessionObject *self, PyObject *args) {
    struct module_state *state = state_of(Py_TYPE(self));
    int layer, kind, first, n;
    if (!PyArg_ParseTuple(args, "iiii:blocks", &layer, &kind, &first, &n))
        return NULL;
    if (n < 0 || n > MOST_BLOCKS) {
        PyErr_Format(PyExc_ValueError, "n: got %d, wanted 0 to %d", n, MOST_BLOCKS);
        return NULL;
    }
    const uint8_t *data[MOST_PARTS];
    uint64_t nbytes[MOST_PARTS];
    uint32_t crcs[MOST_BLOCKS];
    int queued;
    int32_t parts;
    dsv4_session *session = call_enter(state, self, &queued);
    if (!session)
        return NULL;
    dsv4_error err = {0};
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_blocks(session, layer, kind, data, nbytes, &parts, crcs, first, n, &err);
    Py_END_ALLOW_THREADS
    call_leave(self, queued);
    if (status)
        return raise_status(state, status, &err);
    PyObject *views = PyList_New(parts);
    for (int i = 0; views && i < parts; i++) {
        PyObject *view = array_view(data[i], nbytes[i], (PyObject *)self);
        if (view)
            PyList_SET_ITEM(views, i, view);
        else
            Py_CLEAR(views);
    }
    if (!views)
        return NULL;
    return Py_BuildValue("(Ny#)", views, (const char *)crcs,
                         (Py_ssize_t)((size_t)n * sizeof *crcs));
}

PyObject *stores_function(PyObject *module, PyObject *args) {
    struct module_state *state = PyModule_GetState(module);
    ModelObject *model;
    int position;
    if (!PyArg_ParseTuple(args, "O!i:stores", state->model_type, &model, &position))
        return NULL;
    PyObject *handle = open_handle(state, model);
    if (!handle)
        return NULL;
    const dsv4_model *m = handle_of(handle)->model;
    if (position < 0) {
        PyErr_Format(PyExc_ValueError, "position: got %d, wanted 0 or more", position);
        return NULL;
    }
    struct dsv4_store *stores =
        PyMem_New(struct dsv4_store, 2 * (size_t)dsv4_model_config(m)->num_hidden_layers);
    if (!stores)
        return PyErr_NoMemory();
    const int32_t n = dsv4_model_stores(m, position, stores);
    PyObject *list = PyList_New(n);
    for (int32_t i = 0; list && i < n; i++) {
        const struct dsv4_store *s = &stores[i];
        PyObject *item = Py_BuildValue("(iiii)", s->layer, s->kind, s->rows, s->row_bytes);
        if (item)
            PyList_SET_ITEM(list, i, item);
        else
            Py_CLEAR(list);
    }
    PyMem_Free(stores);
    if (!list)
        return NULL;
    return Py_BuildValue("(KN)", (unsigned long long)dsv4_model_state_bytes(m), list);
}

/* [((layer, kind, rows, row bytes), offset, crcs), ...]; the checksums are copied, into *crcs. */
static struct dsv4_saved_rows *parse_rows(PyObject *list, uint32_t **crcs) {
    const Py_ssize_t n = PyList_GET_SIZE(list);
    struct dsv4_saved_rows *rows = PyMem_New(struct dsv4_saved_rows, (size_t)n + 1);
    size_t total = 0, at = 0;
    for (Py_ssize_t i = 0; rows && i < n; i++) {
        struct dsv4_saved_rows *r = &rows[i];
        unsigned long long offset;
        const char *bytes;
        Py_ssize_t length;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "(iiii)Ky#:rows", &r->store.layer,
                              &r->store.kind, &r->store.rows, &r->store.row_bytes, &offset, &bytes,
                              &length)) {
            PyMem_Free(rows);
            return NULL;
        }
        r->offset = offset;
        r->n_crc = (int32_t)(length / 4);
        total += (size_t)r->n_crc;
    }
    *crcs = rows ? PyMem_New(uint32_t, total + 1) : NULL;
    if (!*crcs) {
        PyMem_Free(rows);
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        const char *bytes = PyBytes_AS_STRING(PyTuple_GET_ITEM(PyList_GET_ITEM(list, i), 2));
        memcpy(*crcs + at, bytes, (size_t)rows[i].n_crc * sizeof **crcs);
        rows[i].crcs = *crcs + at;
        at += (size_t)rows[i].n_crc;
    }
    return rows;
}

PyObject *load_session_function(PyObject *module, PyObject *args) {
    struct module_state *state = PyModule_GetState(module);
    ModelObject *model;
    PyObject *path = NULL, *list, *result = NULL;
    int most_kept, fd, use_mmap;
    unsigned long long size;
    Py_buffer ids, fixed;
    if (!PyArg_ParseTuple(args, "O!i(O&iK)py*y*O!:load_session", state->model_type, &model,
                          &most_kept, PyUnicode_FSConverter, &path, &fd, &size, &use_mmap, &ids,
                          &fixed, &PyList_Type, &list))
        return NULL;
    SessionObject *session = NULL;
    struct dsv4_saved_rows *rows = NULL;
    uint32_t *crcs = NULL;
    PyObject *handle = open_handle(state, model);
    if (!handle)
        goto done;
    rows = parse_rows(list, &crcs);
    session = rows ? session_alloc(state->session_type, handle) : NULL;
    if (!session)
        goto done;
    const struct dsv4_saved_state saved = {
        .file = {PyBytes_AS_STRING(path), fd, size},
        .use_mmap = use_mmap,
        .position = ids.len / 4 <= INT32_MAX ? (int32_t)(ids.len / 4) : -1,
        .ids = ids.buf,
        .fixed = fixed.buf,
        .fixed_bytes = (uint64_t)fixed.len,
        .rows = rows,
        .n_rows = (int32_t)PyList_GET_SIZE(list),
    };
    dsv4_error err = {0};
    dsv4_status status;
    Py_BEGIN_ALLOW_THREADS
    status = dsv4_session_load(&session->session, handle_of(session->handle)->model, most_kept,
                               &saved, &err);
    Py_END_ALLOW_THREADS
    if (status)
        raise_status(state, status, &err);
    else
        result = Py_NewRef(session);
done:
    Py_XDECREF(session);
    PyMem_Free(rows);
    PyMem_Free(crcs);
    PyBuffer_Release(&ids);
    PyBuffer_Release(&fixed);
    Py_XDECREF(path);
    return result;
}

PyObject *checksum_function(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer data;
    unsigned int value;
    if (!PyArg_ParseTuple(args, "y*I:crc32c", &data, &value))
        return NULL;
    uint32_t crc;
    Py_BEGIN_ALLOW_THREADS
    crc = dsv4_checksum(value, data.buf, (size_t)data.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}
