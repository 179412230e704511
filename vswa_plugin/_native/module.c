/* vswa_plugin._kernel: the window index's table and the hashes, compiled. Optional: index/python_table.py and
 * hashing.py do the same without it, and are what it is tested against. The GIL is held throughout. */
#include "hashes.h"
#include "score.h"

/* Raised when what vswa_plugin.blocks.kernel relies on changes: an old build is then left aside. */
#define VSWA_KERNEL_VERSION 4

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"groups", NULL};
    int groups;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i:Table", names, &groups)) return NULL;
    if (groups < 1 || groups > MAX_GROUPS)
        return PyErr_Format(PyExc_ValueError, "expected 1 to %d cache groups, got %d", MAX_GROUPS, groups);
    KernelTable *self = (KernelTable *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->classes = calloc((size_t)groups, sizeof *self->classes);
    self->needs = calloc((size_t)groups, sizeof *self->needs);
    self->class_of = calloc((size_t)groups, sizeof *self->class_of);
    self->masks = calloc((size_t)groups, sizeof *self->masks);
    if (!self->classes || !self->needs || !self->class_of || !self->masks ||
        table_init(&self->table, (u32)groups) < 0) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void table_dealloc(KernelTable *self) {
    PyTypeObject *type = Py_TYPE(self);
    table_free(&self->table);
    free(self->scratch);
    free(self->classes);
    free(self->needs);
    free(self->class_of);
    free(self->masks);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* All keys, read before anything changes. */
static u64 *read_keys(KernelTable *self, PyObject *source, Py_ssize_t *count) {
    vswa_hashes hashes;
    if (vswa_hashes_open(&hashes, source) < 0) return NULL;
    u64 *keys = scratch(self, (size_t)(hashes.count + 1) * sizeof(u64));
    if (keys != NULL && vswa_hashes_read(&hashes, 0, 1, hashes.count, keys) < 0) keys = NULL;
    *count = hashes.count;
    vswa_hashes_close(&hashes);
    return keys;
}

#define PREFETCH_AHEAD 16

PyDoc_STRVAR(add_doc, "add(group, bit, hashes, room) -> (added, left_out)\n\n"
                      "Set the rank's bit for the group's hashes; at most `room` hashes new to the group\n"
                      "(negative: any number). On any error nothing has changed.");
static PyObject *table_add(KernelTable *self, PyObject *const *args, Py_ssize_t nargs) {
    vswa_table *t = &self->table;
    u32 group, bit, row = NO_ROW;
    Py_ssize_t count, added = 0, left_out = 0;
    if (expect_count("add", 4, nargs) < 0 || small_number(args[0], "group", (long)t->groups, &group) < 0 ||
        small_number(args[1], "bit", MAX_BIT, &bit) < 0)
        return NULL;
    Py_ssize_t room = PyLong_AsSsize_t(args[3]);
    if (room == -1 && PyErr_Occurred()) return NULL;
    u64 *keys = read_keys(self, args[2], &count);
    if (keys == NULL) return NULL;
    size_t more = room < 0 || room > count ? (size_t)count : (size_t)room;
    if ((bit / 64 >= t->words && table_rebuild(t, t->capacity, bit / 64 + 1) < 0) || table_reserve(t, more) < 0)
        return PyErr_NoMemory();
    size_t limit = room < 0 ? SIZE_MAX : t->resident[group] + (size_t)room;
    for (Py_ssize_t i = 0; i < count && i < PREFETCH_AHEAD; i++) index_prefetch(t, keys[i]);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + PREFETCH_AHEAD < count) index_prefetch(t, keys[i + PREFETCH_AHEAD]);
        set_result set = table_set(t, keys[i], group, bit, t->resident[group] < limit, &row);
        added += set == NEWLY_SET;
        left_out += set == LEFT_OUT;
    }
    scratch_done(self);
    return Py_BuildValue("(nn)", added, left_out);
}

PyDoc_STRVAR(discard_doc, "discard(group, bit, hashes) -> removed\n\n"
                          "Clear the rank's bit; hashes that it does not hold are passed over.");
static PyObject *table_discard(KernelTable *self, PyObject *const *args, Py_ssize_t nargs) {
    vswa_table *t = &self->table;
    u32 group, bit, row = NO_ROW;
    Py_ssize_t count, removed = 0;
    if (expect_count("discard", 3, nargs) < 0 || small_number(args[0], "group", (long)t->groups, &group) < 0 ||
        small_number(args[1], "bit", MAX_BIT, &bit) < 0)
        return NULL;
    u64 *keys = read_keys(self, args[2], &count);
    if (keys == NULL) return NULL;
    for (Py_ssize_t i = 0; i < count && i < PREFETCH_AHEAD; i++) index_prefetch(t, keys[i]);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + PREFETCH_AHEAD < count) index_prefetch(t, keys[i + PREFETCH_AHEAD]);
        removed += table_unset(t, keys[i], group, bit, &row);
    }
    table_shrink(t);
    scratch_done(self);
    return PyLong_FromSsize_t(removed);
}

static PyObject *mask_as_int(const u64 *words, u32 count) {
    if (count == 1) return PyLong_FromUnsignedLongLong(words[0]);
    return PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "y#s", (const char *)words,
                               (Py_ssize_t)(count * sizeof(u64)), "little");
}

PyDoc_STRVAR(masks_doc, "masks(group, hashes) -> list of int\n\nFor each hash the ranks that hold it.");
static PyObject *table_masks(KernelTable *self, PyObject *const *args, Py_ssize_t nargs) {
    const vswa_table *t = &self->table;
    u32 group;
    Py_ssize_t count;
    if (expect_count("masks", 2, nargs) < 0 || small_number(args[0], "group", (long)t->groups, &group) < 0)
        return NULL;
    u64 *keys = read_keys(self, args[1], &count);
    PyObject *masks = keys == NULL ? NULL : PyList_New(count);
    for (Py_ssize_t i = 0; masks != NULL && i < count; i++) {
        u32 row = index_find(t, keys[i]);
        PyObject *mask = row == NO_ROW ? PyLong_FromLong(0) : mask_as_int(row_mask(t, row, group), t->words);
        if (mask == NULL)
            Py_CLEAR(masks);
        else
            PyList_SET_ITEM(masks, i, mask);
    }
    scratch_done(self);
    return masks;
}

static int append_item(PyObject *list, u64 key, const u64 *mask, u32 words) {
    PyObject *ranks = mask_as_int(mask, words);
    PyObject *item = ranks == NULL ? NULL : Py_BuildValue("(KN)", (unsigned long long)key, ranks);
    int failed = item == NULL || PyList_Append(list, item) < 0;
    Py_XDECREF(item);
    return failed ? -1 : 0;
}

PyDoc_STRVAR(items_doc, "items(group) -> list of (hash, mask of ranks)\n\nAll that the group holds, in no order.");
static PyObject *table_items(KernelTable *self, PyObject *const *args, Py_ssize_t nargs) {
    const vswa_table *t = &self->table;
    u32 group;
    if (expect_count("items", 1, nargs) < 0 || small_number(args[0], "group", (long)t->groups, &group) < 0)
        return NULL;
    PyObject *items = PyList_New(0);
    for (u32 row = 0; items != NULL && row < t->high; row++) {
        const u64 *mask = row_mask(t, row, group);
        if (mask_any(mask, t->words) && append_item(items, t->keys[row], mask, t->words) < 0)
            Py_CLEAR(items);
    }
    return items;
}

PyDoc_STRVAR(held_doc, "held(group, bit) -> bytes\n\n"
                       "The hashes that the rank holds in the group, in no order, as little-endian u64.");
static PyObject *table_held_method(KernelTable *self, PyObject *const *args, Py_ssize_t nargs) {
    const vswa_table *t = &self->table;
    u32 group, bit;
    if (expect_count("held", 2, nargs) < 0 || small_number(args[0], "group", (long)t->groups, &group) < 0 ||
        small_number(args[1], "bit", MAX_BIT, &bit) < 0)
        return NULL;
    /* Room for all that any rank holds there: pages that stay untouched cost nothing. */
    size_t most = bit / 64 < t->words ? t->resident[group] : 0;
    PyObject *packed = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(most * sizeof(u64)));
    if (packed == NULL) return NULL;
    size_t count = table_held(t, group, bit, PyBytes_AS_STRING(packed), most);
    _PyBytes_Resize(&packed, (Py_ssize_t)(count * sizeof(u64)));
    return packed;
}

PyDoc_STRVAR(sweep_doc, "sweep(dead, budget, group) -> done\n\n"
                        "Take the ranks of the mask `dead` (bytes) out of up to `budget` rows, in one group or\n"
                        "(negative) in all; True when all are seen. rewind() starts a pass.");
static PyObject *table_sweep_method(KernelTable *self, PyObject *const *args, Py_ssize_t nargs) {
    vswa_table *t = &self->table;
    if (expect_count("sweep", 3, nargs) < 0) return NULL;
    Py_ssize_t budget = PyLong_AsSsize_t(args[1]);
    if (budget == -1 && PyErr_Occurred()) return NULL;
    long group = PyLong_AsLong(args[2]);
    if (group == -1 && PyErr_Occurred()) return NULL;
    if (group >= (long)t->groups) return PyErr_Format(PyExc_ValueError, "unknown group %ld", group);
    u64 *dead = scratch(self, t->words * sizeof(u64));
    if (dead == NULL || mask_words(self, args[0], dead) == NULL) return NULL;
    u32 from = group < 0 ? 0 : (u32)group, to = group < 0 ? t->groups : from + 1;
    int done = table_sweep(t, from, to, dead, budget < 0 ? 0 : (size_t)budget);
    if (done) table_shrink(t);
    return PyBool_FromLong(done);
}

static PyObject *table_rewind(KernelTable *self, PyObject *Py_UNUSED(none)) {
    self->table.cursor = 0;
    Py_RETURN_NONE;
}

static PyObject *table_check_method(KernelTable *self, PyObject *Py_UNUSED(none)) {
    const char *wrong = table_check(&self->table);
    if (wrong == NULL) Py_RETURN_NONE;
    return PyUnicode_FromString(wrong);
}

static PyObject *table_resident(KernelTable *self, PyObject *Py_UNUSED(none)) {
    PyObject *counts = PyTuple_New(self->table.groups);
    for (u32 g = 0; counts != NULL && g < self->table.groups; g++) {
        PyObject *count = PyLong_FromSize_t(self->table.resident[g]);
        if (count == NULL)
            Py_CLEAR(counts);
        else
            PyTuple_SET_ITEM(counts, g, count);
    }
    return counts;
}

static PyObject *table_nbytes(KernelTable *self, PyObject *Py_UNUSED(none)) {
    return PyLong_FromSize_t(table_bytes(&self->table) + self->scratch_bytes);
}

static PyObject *table_rows(KernelTable *self, PyObject *Py_UNUSED(none)) {
    return PyLong_FromUnsignedLong(self->table.high);
}

#define FAST(name, function, doc) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, doc}
static PyMethodDef table_methods[] = {
    FAST("add", table_add, add_doc),
    FAST("discard", table_discard, discard_doc),
    FAST("masks", table_masks, masks_doc),
    FAST("items", table_items, items_doc),
    FAST("held", table_held_method, held_doc),
    FAST("sweep", table_sweep_method, sweep_doc),
    FAST("score", table_score, score_doc),
    {"rewind", (PyCFunction)table_rewind, METH_NOARGS, "rewind()\n\nThe next sweep starts at the first row."},
    {"resident", (PyCFunction)table_resident, METH_NOARGS, "resident() -> tuple\n\nDistinct hashes per group."},
    {"check", (PyCFunction)table_check_method, METH_NOARGS, "check() -> str | None\n\nWhat is wrong inside."},
    {"nbytes", (PyCFunction)table_nbytes, METH_NOARGS, "nbytes() -> int\n\nMemory allocated."},
    {"rows", (PyCFunction)table_rows, METH_NOARGS, "rows() -> int\n\nHow many a full sweep looks at."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot table_type_slots[] = {
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, table_methods},
    {Py_tp_doc, "Table(groups)\n\nSequence hash -> per cache group, the ranks that hold it as bits."},
    {0, NULL},
};

static PyType_Spec table_spec = {
    .name = "vswa_plugin._kernel.Table",
    .basicsize = sizeof(KernelTable),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = table_type_slots,
};

static PyMethodDef module_methods[] = {
    FAST("sequence_hashes", sequence_hashes, sequence_hashes_doc),
    {"xxh3_64", xxh3_method, METH_VARARGS, xxh3_doc},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    PyObject *type = PyType_FromSpec(&table_spec);
    if (type == NULL || PyModule_AddObject(module, "Table", type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    return PyModule_AddIntConstant(module, "VERSION", VSWA_KERNEL_VERSION);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static PyModuleDef module_def = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "vswa_plugin._kernel",
    .m_doc = "The window index's table and sequence hashes, compiled.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&module_def); }
