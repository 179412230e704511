/* The Python object around a table, and what its methods share. */
#ifndef VSWA_OBJECT_H
#define VSWA_OBJECT_H

#include "plan.h"

#define MAX_BIT (1 << 20)
#define MAX_GROUPS (1 << 12)
#define SCRATCH_KEPT ((size_t)1 << 22)

typedef struct {
    PyObject_HEAD
    vswa_table table;
    u64 *scratch; /* for walks; kept between calls while it is small */
    size_t scratch_bytes;
    need_class *classes; /* [groups], as all below: of a score */
    group_need *needs;
    u32 *class_of;
    const u64 **masks;
} KernelTable;

static void *scratch(KernelTable *self, size_t bytes) {
    if (bytes > self->scratch_bytes) {
        free(self->scratch);
        self->scratch_bytes = 0;
        self->scratch = malloc(bytes);
        if (self->scratch == NULL) return PyErr_NoMemory();
        self->scratch_bytes = bytes;
    }
    return self->scratch;
}

static void scratch_done(KernelTable *self) {
    if (self->scratch_bytes <= SCRATCH_KEPT) return;
    free(self->scratch);
    self->scratch = NULL;
    self->scratch_bytes = 0;
}

static int expect_count(const char *method, Py_ssize_t expected, Py_ssize_t got) {
    if (expected == got) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", method, expected, got);
    return -1;
}

/* A number in [0, limit). */
static int small_number(PyObject *o, const char *what, long limit, u32 *out) {
    long value = PyLong_AsLong(o);
    if (value == -1 && PyErr_Occurred()) return -1;
    if (value < 0 || value >= limit) {
        PyErr_Format(PyExc_ValueError, "expected a %s of 0 to %ld, got %ld", what, limit - 1, value);
        return -1;
    }
    *out = (u32)value;
    return 0;
}

/* A mask of ranks given as little-endian bytes, cut or filled with zeros to the table's words. */
static u64 *mask_words(KernelTable *self, PyObject *source, u64 *out) {
    char *bytes;
    Py_ssize_t length, wanted = (Py_ssize_t)(self->table.words * sizeof(u64));
    if (PyBytes_AsStringAndSize(source, &bytes, &length) < 0) return NULL;
    memset(out, 0, (size_t)wanted);
    memcpy(out, bytes, (size_t)(length < wanted ? length : wanted));
    return out;
}

#endif
