/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dsv4._core: multi-phase initialisation, types on the heap, all state in the module.  Refuses
 * subinterpreters, as NumPy's core does.
 */
#include "module.h"
#include "py_device_array.h"
#include "py_dlpack.h"
#include "py_kernels.h"
#include "py_part.h"
#include "py_trace.h"

static int add_type(PyObject *module, PyTypeObject **slot, PyType_Spec *spec) {
    *slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot ? PyModule_AddType(module, *slot) : -1;
}

static int module_exec(PyObject *module) {
    struct module_state *state = PyModule_GetState(module);
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) != 0) {
        PyErr_SetString(PyExc_ImportError, "dsv4 does not work in subinterpreters");
        return -1;
    }
    if (convert_init() < 0 || dsv4_py_add_kernels(module) < 0 || dsv4_py_add_limits(module) < 0 ||
        add_type(module, &state->model_type, &model_spec) < 0 ||
        add_type(module, &state->session_type, &session_spec) < 0 ||
        add_type(module, &state->sampler_type, &sampler_spec) < 0 ||
        add_type(module, &state->edit_type, &edit_spec) < 0 ||
        add_type(module, &state->memory_type, &memory_spec) < 0)
        return -1;
    /* enum dsv4_phase */
    PyObject *phases = Py_BuildValue("(ssssssss)", "fp8", "fp4", "bf16", "f32", "attention",
                                     "indexer", "other", "wait");
    if (!phases || PyModule_AddObject(module, "PHASES", phases) < 0) {
        Py_XDECREF(phases);
        return -1;
    }
    PyObject *values = value_names();
    if (!values || PyModule_AddObject(module, "VALUES", values) < 0) {
        Py_XDECREF(values);
        return -1;
    }
    int32_t layout, numerics;
    dsv4_state_versions(&layout, &numerics);
    if (PyModule_AddIntConstant(module, "STATE_LAYOUT", layout) < 0 ||
        PyModule_AddIntConstant(module, "NUMERICS_VERSION", numerics) < 0 ||
        PyModule_AddIntConstant(module, "BLOCK_ROWS", DSV4_STATE_BLOCK) < 0)
        return -1;
    PyObject *errors = PyImport_ImportModule("dsv4.errors");
    if (!errors)
        return -1;
    state->format_error = PyObject_GetAttrString(errors, "FormatError");
    state->nonfinite_error = PyObject_GetAttrString(errors, "NonFiniteLogitsError");
    state->forked_error = PyObject_GetAttrString(errors, "ForkedProcessError");
    state->unavailable_error = PyObject_GetAttrString(errors, "BackendUnavailable");
    state->device_error = PyObject_GetAttrString(errors, "DeviceError");
    Py_DECREF(errors);
    return state->format_error && state->nonfinite_error && state->forked_error &&
                   state->unavailable_error && state->device_error
               ? 0
               : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    struct module_state *state = PyModule_GetState(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->session_type);
    Py_VISIT(state->sampler_type);
    Py_VISIT(state->edit_type);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->format_error);
    Py_VISIT(state->nonfinite_error);
    Py_VISIT(state->forked_error);
    Py_VISIT(state->unavailable_error);
    Py_VISIT(state->device_error);
    return 0;
}

static int module_clear(PyObject *module) {
    struct module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->session_type);
    Py_CLEAR(state->sampler_type);
    Py_CLEAR(state->edit_type);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->format_error);
    Py_CLEAR(state->nonfinite_error);
    Py_CLEAR(state->forked_error);
    Py_CLEAR(state->unavailable_error);
    Py_CLEAR(state->device_error);
    return 0;
}

static void module_free(void *module) {
    module_clear(module);
}

static PyMethodDef module_methods[] = {
    {"token_ids", token_ids_function, METH_VARARGS,
     PyDoc_STR(
         "token_ids(ids, name, limit, /)\n--\n\n"
         "A new int32 array of ids, each 0 <= id < limit; errors name `name` and the index.")},
    {"logprobs", logprobs_function, METH_VARARGS,
     PyDoc_STR("logprobs(logits, ids, k, /)\n--\n\n"
               "[(logprob of ids[i], [(id, logprob) of the k best]), ...] for float32 logits [n, "
               "vocab].")},
    {"dlpack", dlpack_function, METH_VARARGS,
     PyDoc_STR("dlpack(bytes, shape, code, bits, versioned, /)\n--\n\n"
               "A DLPack capsule over a contiguous buffer, which it keeps; code and bits are those "
               "of DLDataType.")},
    {"stores", stores_function, METH_VARARGS,
     PyDoc_STR("stores(model, position, /)\n--\n\n"
               "(bytes of the fixed state, [(layer, kind, rows, row bytes), ...]) of a state.")},
    {"load_session", load_session_function, METH_VARARGS,
     PyDoc_STR("load_session(model, most_kept, file, use_mmap, ids, fixed, rows, /)\n--\n\n"
               "A session whose rows lie in a file (name, descriptor, size): [((layer, kind, rows, "
               "row bytes), offset, CRC-32C of the blocks), ...].")},
    {"devices", devices_function, METH_VARARGS,
     PyDoc_STR(
         "devices(plugin, driver, /)\n--\n\n"
         "(CUDA version, architectures the plugin has code for, [(name, major, minor, "
         "multiprocessors, total bytes, free bytes,\n"
         "why it cannot be used or None), ...]) of the plugin at a path, with a driver library "
         "of that name.")},
    {"tensor_memory", tensor_memory_function, METH_VARARGS,
     PyDoc_STR("tensor_memory(model, name, /)\n--\n\n"
               "The Memory where a GPU has the bytes of a tensor, for reading.")},
    {"memory_room", memory_room_function, METH_VARARGS,
     PyDoc_STR("memory_room(model, layer, /)\n--\n\n"
               "(CUDA's number, free bytes) of the GPU that computes a layer; None on the CPU.")},
    {"split", split_function, METH_VARARGS,
     PyDoc_STR("split(layers, each, rooms, /)\n--\n\n"
               "Where each stage ends when layers of so many bytes are cut over devices with so "
               "much room, each of which also holds `each` bytes.")},
    {"part", part_function, METH_VARARGS,
     PyDoc_STR("part(model, kind, layer, number, state, token_ids, inputs, /)\n--\n\n"
               "One part of a layer (enum dsv4_part_kind) on arrays: the outputs as a tuple.  "
               "number is the site or the expert.")},
    {"layer_state", layer_state_function, METH_VARARGS,
     PyDoc_STR("layer_state(model, layer, /)\n--\n\n"
               "A Session that is the state of one layer's attention.")},
    {"crc32c", checksum_function, METH_VARARGS,
     PyDoc_STR("crc32c(data, value, /)\n--\n\nLike zlib.crc32, of the Castagnoli polynomial.")},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "dsv4._core",
    .m_doc = PyDoc_STR("The engine: private, positional entry points.  Use `import dsv4`."),
    .m_size = sizeof(struct module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&module_def);
}
