/* Fast conversions between Python ints and machine words. */
#ifndef VSWA_NUMBERS_H
#define VSWA_NUMBERS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#ifndef __SIZEOF_INT128__
#error "the kernel needs 128-bit products; without it the pure-Python path serves"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernel is written for little-endian machines; without it the pure-Python path serves"
#endif

typedef uint64_t u64;
typedef uint32_t u32;

/* Reading the digits takes a fifth of the time of PyLong_AsUnsignedLongLong, which walks bytes. */
#if PYLONG_BITS_IN_DIGIT == 30 && PY_VERSION_HEX < 0x030C0000
#define VSWA_DIGITS(o) (((PyLongObject *)(o))->ob_digit)
#define VSWA_DIGIT_COUNT(o) ((size_t)Py_SIZE(o)) /* negative: enormous, so out of range */
#elif PYLONG_BITS_IN_DIGIT == 30 && PY_VERSION_HEX < 0x030F0000
#define VSWA_DIGITS(o) (((PyLongObject *)(o))->long_value.ob_digit)
#define VSWA_SIGN_BITS 3
#define VSWA_TAG(o) (((PyLongObject *)(o))->long_value.lv_tag)
#define VSWA_DIGIT_COUNT(o) ((VSWA_TAG(o) & 2) ? SIZE_MAX : (size_t)(VSWA_TAG(o) >> VSWA_SIGN_BITS))
#endif

static int vswa_not_int(PyObject *o) {
    PyErr_Format(PyExc_TypeError, "expected an int, got %.100s", Py_TYPE(o)->tp_name);
    return -1;
}

static int vswa_out_of_range(PyObject *o, int bits) {
    PyErr_Format(PyExc_OverflowError, "expected 0 <= number < 2**%d, got %R", bits, o);
    return -1;
}

/* 0, or -1 with TypeError or OverflowError set. */
static inline int vswa_as_u64(PyObject *o, u64 *out) {
    if (!PyLong_CheckExact(o) && !PyLong_Check(o)) return vswa_not_int(o);
#ifdef VSWA_DIGITS
    const digit *d = VSWA_DIGITS(o);
    size_t count = VSWA_DIGIT_COUNT(o);
    if (count == 3 && d[2] < 16) {
        *out = (u64)d[0] | (u64)d[1] << 30 | (u64)d[2] << 60;
        return 0;
    }
    switch (count) {
    case 0: *out = 0; return 0;
    case 1: *out = d[0]; return 0;
    case 2: *out = (u64)d[0] | (u64)d[1] << 30; return 0;
    default: return vswa_out_of_range(o, 64);
    }
#else
    *out = PyLong_AsUnsignedLongLong(o);
    if (*out != (u64)-1 || !PyErr_Occurred()) return 0;
    PyErr_Clear();
    return vswa_out_of_range(o, 64);
#endif
}

static inline int vswa_as_u32(PyObject *o, u32 *out) {
    u64 wide;
#ifdef VSWA_DIGITS
    if (PyLong_CheckExact(o) && VSWA_DIGIT_COUNT(o) == 1) {
        *out = VSWA_DIGITS(o)[0];
        return 0;
    }
#endif
    if (!PyLong_CheckExact(o) && !PyLong_Check(o)) return vswa_not_int(o);
    if (vswa_as_u64(o, &wide) < 0 || wide > UINT32_MAX) {
        PyErr_Clear();
        return vswa_out_of_range(o, 32);
    }
    *out = (u32)wide;
    return 0;
}

/* Hashes as given by the caller: a sequence of ints, or u64 in memory, as an array("Q") has them. */
typedef struct {
    PyObject *sequence; /* owned; NULL where they are in memory */
    Py_buffer buffer;
    Py_ssize_t count;
} vswa_hashes;

static inline int vswa_is_packed(const Py_buffer *buffer) {
    return buffer->itemsize == sizeof(u64) && buffer->format != NULL && strcmp(buffer->format, "Q") == 0;
}

static int vswa_hashes_open(vswa_hashes *h, PyObject *source) {
    h->sequence = NULL;
    if (PyObject_CheckBuffer(source) &&
        PyObject_GetBuffer(source, &h->buffer, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) == 0) {
        h->count = h->buffer.len / (Py_ssize_t)sizeof(u64);
        if (vswa_is_packed(&h->buffer)) return 0;
        PyBuffer_Release(&h->buffer);
    }
    PyErr_Clear(); /* a view with gaps is a sequence as any */
    h->sequence = PySequence_Fast(source, "expected a sequence of hashes");
    if (h->sequence == NULL) return -1;
    h->count = PySequence_Fast_GET_SIZE(h->sequence);
    return 0;
}

static void vswa_hashes_close(vswa_hashes *h) {
    if (h->sequence != NULL)
        Py_CLEAR(h->sequence);
    else
        PyBuffer_Release(&h->buffer);
}

/* `count` hashes, of every `stride`th from `from` on. */
static inline int vswa_hashes_read(const vswa_hashes *h, Py_ssize_t from, Py_ssize_t stride, Py_ssize_t count,
                                   u64 *out) {
    if (h->sequence == NULL) {
        const char *packed = (const char *)h->buffer.buf + from * (Py_ssize_t)sizeof(u64);
        if (stride == 1)
            memcpy(out, packed, (size_t)count * sizeof(u64));
        else
            for (Py_ssize_t i = 0; i < count; i++)
                memcpy(out + i, packed + i * stride * (Py_ssize_t)sizeof(u64), sizeof(u64));
        return 0;
    }
    PyObject **items = PySequence_Fast_ITEMS(h->sequence) + from;
    for (Py_ssize_t i = 0; i < count; i++)
        if (vswa_as_u64(items[i * stride], &out[i]) < 0) return -1;
    return 0;
}

#endif
