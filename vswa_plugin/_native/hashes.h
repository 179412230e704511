/* Block hashes of token ids, chained to sequence hashes: see vswa_plugin/hashing.py. */
#ifndef VSWA_HASHES_H
#define VSWA_HASHES_H

#include "xxh3.h"

#define SEED 1337

/* Hash the full blocks of `tokens` and chain them; `words` holds one block. */
static int chain_blocks(PyObject **tokens, Py_ssize_t blocks, Py_ssize_t size, u32 *words, u64 *out) {
    xxh3_seeded seeded;
    xxh3_seed(&seeded, SEED);
    u64 pair[2] = {0, 0};
    for (Py_ssize_t b = 0; b < blocks; b++, tokens += size) {
        for (Py_ssize_t i = 0; i < size; i++)
            if (vswa_as_u32(tokens[i], &words[i]) < 0) return -1;
        pair[1] = xxh3_64(&seeded, words, (size_t)size * sizeof(u32));
        pair[0] = b == 0 ? pair[1] : xxh3_9_to_16((const unsigned char *)pair, sizeof pair, SEED);
        out[b] = pair[0];
    }
    return 0;
}

/* Blocks of up to this many tokens are gathered on the stack. */
#define STACK_BLOCK 256

static PyObject *hash_tokens(PyObject *sequence, Py_ssize_t size) {
    Py_ssize_t blocks = PySequence_Fast_GET_SIZE(sequence) / size;
    PyObject *packed = PyBytes_FromStringAndSize(NULL, blocks * (Py_ssize_t)sizeof(u64));
    u64 *hashes = blocks > 0 ? malloc((size_t)blocks * sizeof(u64)) : NULL;
    u32 stack[STACK_BLOCK];
    u32 *words = size <= STACK_BLOCK || blocks == 0 ? stack : malloc((size_t)size * sizeof(u32));
    int failed = packed == NULL;
    if (!failed && (words == NULL || (blocks > 0 && hashes == NULL))) {
        PyErr_NoMemory();
        failed = 1;
    }
    if (!failed && blocks > 0) {
        failed = chain_blocks(PySequence_Fast_ITEMS(sequence), blocks, size, words, hashes) < 0;
        if (!failed) memcpy(PyBytes_AS_STRING(packed), hashes, (size_t)blocks * sizeof(u64));
    }
    if (words != stack) free(words);
    free(hashes);
    if (failed) Py_CLEAR(packed);
    return packed;
}

PyDoc_STRVAR(sequence_hashes_doc, "sequence_hashes(token_ids, block_size) -> bytes\n\n"
                                  "Sequence hashes of the full blocks, as native u64.");
static PyObject *sequence_hashes(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", nargs);
    Py_ssize_t size = PyLong_AsSsize_t(args[1]);
    if (size == -1 && PyErr_Occurred()) return NULL;
    if (size < 1) return PyErr_Format(PyExc_ValueError, "expected a positive block size, got %zd", size);
    PyObject *sequence = PySequence_Fast(args[0], "expected a sequence of token ids");
    if (sequence == NULL) return NULL;
    PyObject *result = hash_tokens(sequence, size);
    Py_DECREF(sequence);
    return result;
}

PyDoc_STRVAR(xxh3_doc, "xxh3_64(data, seed=0) -> int\n\nXXH3 of bytes.");
static PyObject *xxh3_method(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_buffer data;
    unsigned long long seed = 0;
    xxh3_seeded seeded;
    if (!PyArg_ParseTuple(args, "y*|K:xxh3_64", &data, &seed)) return NULL;
    xxh3_seed(&seeded, seed);
    u64 hash = xxh3_64(&seeded, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLongLong(hash);
}

#endif
