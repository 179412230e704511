/* score(): what a plan gives is read, the walk is done, and the deepest boundary of each rank is reported. */
#ifndef VSWA_SCORE_H
#define VSWA_SCORE_H

#include "object.h"
#include "windows.h"

static int expected_numbers(u32 groups) {
    PyErr_Format(PyExc_ValueError, "expected a tuple of %u numbers, one for each group", groups);
    return -1;
}

/* One number a group into a field of `needs`; None stands for `none`. */
static int read_numbers(PyObject *source, u32 groups, Py_ssize_t none, Py_ssize_t least, Py_ssize_t *out) {
    if (!PyTuple_Check(source) || PyTuple_GET_SIZE(source) != (Py_ssize_t)groups) return expected_numbers(groups);
    for (u32 g = 0; g < groups; g++, out += sizeof(group_need) / sizeof(Py_ssize_t)) {
        PyObject *number = PyTuple_GET_ITEM(source, g);
        *out = number == Py_None ? none : PyLong_AsSsize_t(number);
        if (*out == -1 && PyErr_Occurred()) return -1;
        if (*out < least && number != Py_None) {
            PyErr_Format(PyExc_ValueError, "expected numbers of at least %zd, got %zd", least, *out);
            return -1;
        }
    }
    return 0;
}

/* Fields of a ScorePlan, in their order. */
enum { BOUNDARIES, TRAILING, AT_END, UNIT, LIMIT, ASKS_TOKENS, STEP, STRIDES, CHUNKS, AFTER, PLAN_FIELDS };

static int is_given(PyObject *numbers) { return !PyTuple_Check(numbers) || PyTuple_GET_SIZE(numbers) > 0; }

/* What each group needs, checked. */
static int read_needs(PyObject *plan, u32 groups, Py_ssize_t step, group_need *needs) {
    PyObject **fields = ((PyTupleObject *)plan)->ob_item;
    int plain = step == 1;
    for (u32 g = 0; g < groups; g++) needs[g] = (group_need){.stride = 1};
    if (read_numbers(fields[TRAILING], groups, ALL_BLOCKS, 0, &needs->need) < 0 ||
        (is_given(fields[STRIDES]) && read_numbers(fields[STRIDES], groups, 1, 1, &needs->stride) < 0) ||
        (is_given(fields[CHUNKS]) && read_numbers(fields[CHUNKS], groups, 0, 1, &needs->chunk) < 0) ||
        (is_given(fields[AFTER]) && read_numbers(fields[AFTER], groups, 0, 0, &needs->after) < 0))
        return -1;
    for (u32 g = 0; g < groups; g++) {
        if ((step > 1 && step % needs[g].stride) || needs[g].stride > step || needs[g].after > 1) {
            PyErr_SetString(PyExc_ValueError, "expected strides that divide the step, and one block after at most");
            return -1;
        }
        plain &= !needs[g].chunk && !needs[g].after;
    }
    if (fields[AT_END] == Py_None) return 0;
    if (plain) return read_numbers(fields[AT_END], groups, ALL_BLOCKS, 0, &needs->at_end);
    PyErr_SetString(PyExc_ValueError, "expected at_end only with blocks of one unit, no chunks and none after");
    return -1;
}

/* Give the ranks of `found` (one word of them) min(boundary * unit, limit), unless that is 0. */
static int report(PyObject *result, PyObject *ranks, u64 found, u32 word, Py_ssize_t tokens) {
    PyObject *value = PyLong_FromSsize_t(tokens);
    int failed = value == NULL;
    for (; found && !failed; found &= found - 1) {
        Py_ssize_t bit = 64 * (Py_ssize_t)word + __builtin_ctzll(found);
        if (bit < PyList_GET_SIZE(ranks)) {
            failed = PyDict_SetItem(result, PyList_GET_ITEM(ranks, bit), value) < 0;
        } else {
            PyErr_Format(PyExc_ValueError, "a wanted rank, bit %zd, is not among the ranks", bit);
            failed = 1;
        }
    }
    Py_XDECREF(value);
    return failed ? -1 : 0;
}

/* From the deepest boundary on, each rank of a word at its first. */
static int settle(vswa_walk *k, u32 word, PyObject *ranks, Py_ssize_t unit, Py_ssize_t limit, PyObject *result) {
    const score_level *levels = k->levels + (size_t)word * LEVELS;
    u64 remaining = 0;
    for (u32 level = k->level_count[word]; level-- > 0;) {
        Py_ssize_t next = level ? levels[level - 1].boundary : 0;
        remaining |= levels[level].ranks;
        for (Py_ssize_t b = levels[level].boundary; b > next && remaining; b--) {
            b = skip_lost(k, b, next + 1, word, remaining);
            u64 found = resumable_at(k, b, word, remaining);
            if (k->unreadable) return -1;
            if (!found) continue;
            remaining &= ~found;
            Py_ssize_t tokens = b > limit / unit ? limit : b * unit;
            if (tokens > 0 && report(result, ranks, found, word, tokens) < 0) return -1;
        }
    }
    return 0;
}

/* The numbers of a plan but for its needs. */
typedef struct {
    Py_ssize_t boundaries, step, unit, limit;
} plan_numbers;

static int read_plan(PyObject *plan, u32 groups, plan_numbers *numbers, group_need *needs) {
    if (!PyTuple_Check(plan) || PyTuple_GET_SIZE(plan) != PLAN_FIELDS) {
        PyErr_SetString(PyExc_TypeError, "expected a ScorePlan");
        return -1;
    }
    numbers->boundaries = PyLong_AsSsize_t(PyTuple_GET_ITEM(plan, BOUNDARIES));
    numbers->step = PyLong_AsSsize_t(PyTuple_GET_ITEM(plan, STEP));
    numbers->unit = PyLong_AsSsize_t(PyTuple_GET_ITEM(plan, UNIT));
    numbers->limit = PyLong_AsSsize_t(PyTuple_GET_ITEM(plan, LIMIT));
    if (PyErr_Occurred()) return -1;
    if (numbers->step < 1 || numbers->unit < 1) {
        PyErr_SetString(PyExc_ValueError, "expected a step and a unit of at least 1");
        return -1;
    }
    return read_needs(plan, groups, numbers->step, needs);
}

static int walk_and_settle(KernelTable *self, vswa_walk *k, const plan_numbers *plan, PyObject *wanted,
                           PyObject *ranks, PyObject *result) {
    make_classes(k, self->needs, self->class_of, self->masks);
    void *space = scratch(self, place_arrays(k, 0) * sizeof(u64));
    if (space == NULL) return -1;
    place_arrays(k, (uintptr_t)space);
    if (mask_words(self, wanted, k->wanted) == NULL) return -1;
    walk_whole(k);
    for (u32 word = 0; word < k->table->words && !k->unreadable; word++) {
        begin_windows(k, word);
        if (settle(k, word, ranks, plan->unit, plan->limit, result) < 0) return -1;
    }
    return k->unreadable ? -1 : 0;
}

PyDoc_STRVAR(score_doc, "score(hashes, plan, wanted, ranks) -> {rank: tokens}\n\n"
                        "For each rank of the mask `wanted` (bytes) the deepest boundary at which all groups hold\n"
                        "what they need, as min(boundary * plan.unit, plan.limit); ranks with 0 are left out.\n"
                        "hashes: ints, read in memory where they are an array('Q'). plan: a\n"
                        "vswa_plugin.index.plans.ScorePlan. ranks: list, by bit.");
static PyObject *table_score(KernelTable *self, PyObject *const *args, Py_ssize_t nargs) {
    enum { HASHES, PLAN, WANTED, RANKS, ARGUMENTS };
    vswa_hashes hashes;
    plan_numbers plan;
    if (expect_count("score", ARGUMENTS, nargs) < 0) return NULL;
    if (read_plan(args[PLAN], self->table.groups, &plan, self->needs) < 0) return NULL;
    if (!PyList_Check(args[RANKS])) return PyErr_Format(PyExc_TypeError, "expected a list of ranks");
    if (vswa_hashes_open(&hashes, args[HASHES]) < 0) return NULL;
    PyObject *result = PyDict_New();
    vswa_walk walk = {.table = &self->table, .hashes = &hashes, .step = plan.step, .classes = self->classes};
    walk.boundaries = boundaries_within(self->needs, self->table.groups, plan.step, hashes.count);
    if (plan.boundaries < walk.boundaries) walk.boundaries = plan.boundaries;
    walk.ends_on_edge =
        PyTuple_GET_ITEM(args[PLAN], AT_END) != Py_None && walk.boundaries == plan.boundaries;
    if (result != NULL && walk.boundaries > 0 &&
        walk_and_settle(self, &walk, &plan, args[WANTED], args[RANKS], result) < 0)
        Py_CLEAR(result);
    vswa_hashes_close(&hashes);
    scratch_done(self);
    return result;
}

#endif
