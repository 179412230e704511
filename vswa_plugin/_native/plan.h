/* What a prompt is scored by, and where the arrays for it lie.
 *
 * Groups with one and the same need make a class, whose mask of a block is the AND of theirs. Positions are
 * in hash units: a class has blocks of `stride` units, `per_step` of them between two boundaries.
 */
#ifndef VSWA_PLAN_H
#define VSWA_PLAN_H

#include "table.h"

#define ALL_BLOCKS PY_SSIZE_T_MAX

typedef struct need_class need_class;
struct need_class {
    Py_ssize_t stride, per_step;
    Py_ssize_t need, at_end; /* blocks before a boundary; before that at the end of the prompt */
    Py_ssize_t chunk;        /* 0, or instead of `need`: all from the last multiple of it */
    Py_ssize_t after;        /* 0, or 1: the block after a boundary too */
    int whole;               /* whether it needs all blocks, at whatever boundary */
    u32 members;
    const u64 **masks;       /* [members]: those of its groups, by row */

    u32 *rows;               /* [blocks]: rows of those that have been looked up; see row_of */
    u64 *looked_up;          /* a bit per block; of a whole class it is those below `known` */
    Py_ssize_t known;        /* of a whole class: blocks that have been looked up */
    size_t run;              /* of a whole class: how long the last run of rows was */
    const need_class *rows_by; /* of another class: the whole one that looks up its blocks, or NULL */
    Py_ssize_t every;        /* blocks of that one for each of ours */

    u64 *prefix, *suffix;    /* [piece_of]: see windows.h */
    u64 *before;             /* [piece_of]: of what the suffixes are */
    Py_ssize_t piece;        /* where the piece starts whose prefixes are filled, or -1 */
};

/* Ranks whose deepest boundary is this one, as far as whole classes go. */
typedef struct {
    Py_ssize_t boundary;
    u64 ranks;
} score_level;

typedef struct {
    const vswa_table *table;
    const vswa_hashes *hashes;
    u64 *wanted;           /* [words]: ranks to be scored */
    Py_ssize_t boundaries; /* that the hashes reach */
    Py_ssize_t step;       /* units from one to the next */
    int ends_on_edge;      /* whether the last is the end of the prompt, where at_end holds */
    int unreadable;        /* a hash could not be read; the exception is set */
    u64 *left, *held;      /* [words] */
    score_level *levels;   /* [words][LEVELS], boundaries ascending */
    u32 *level_count;      /* [words] */
    need_class *classes;   /* those of all blocks first */
    u32 whole_count, class_count;
    need_class *failed_at; /* the class at which the last boundary failed, or NULL */
} vswa_walk;

/* One for each rank of a word and one for those that are left. */
#define LEVELS 65

/* What the caller gives, per group. */
typedef struct {
    Py_ssize_t stride, need, at_end, chunk, after;
} group_need;

static inline Py_ssize_t blocks_before(const need_class *c, Py_ssize_t boundary) {
    return boundary * c->per_step;
}

/* Blocks of a class that any boundary needs. */
static inline Py_ssize_t blocks_of(const vswa_walk *k, const need_class *c) {
    return blocks_before(c, k->boundaries) + c->after;
}

static inline size_t bits_of(const vswa_walk *k, const need_class *c) {
    return ((size_t)blocks_of(k, c) + 63) / 64;
}

static inline Py_ssize_t piece_of(const need_class *c) { return c->chunk ? c->chunk : c->need; }

/* How many boundaries so many hashes reach. */
static Py_ssize_t boundaries_within(const group_need *needs, u32 groups, Py_ssize_t step, Py_ssize_t hashes) {
    Py_ssize_t beyond = 0;
    for (u32 g = 0; g < groups; g++)
        if (needs[g].after && needs[g].stride > beyond) beyond = needs[g].stride;
    return hashes < beyond ? 0 : (hashes - beyond) / step;
}

static need_class class_for(const vswa_walk *k, const group_need *need) {
    need_class c = {.stride = need->stride, .per_step = k->step / need->stride, .after = need->after};
    Py_ssize_t all = blocks_before(&c, k->boundaries);
    if (need->chunk && need->chunk <= all) {
        c.chunk = need->chunk;
        return c;
    }
    /* A chunk of more blocks than there are begins at block 0. */
    c.need = !need->chunk && need->need < all ? need->need : all;
    c.at_end = !k->ends_on_edge ? c.need : need->at_end < all ? need->at_end : all;
    c.whole = c.need == all && c.at_end == all;
    return c;
}

static int same_need(const need_class *a, const need_class *b) {
    return a->stride == b->stride && a->need == b->need && a->at_end == b->at_end && a->chunk == b->chunk &&
           a->after == b->after;
}

/* A class for each different need; `masks` has room for one pointer a group. */
static void make_classes(vswa_walk *k, const group_need *needs, u32 *class_of, const u64 **masks) {
    u32 groups = k->table->groups;
    k->class_count = k->whole_count = 0;
    for (int whole = 1; whole >= 0; whole--) {
        for (u32 g = 0; g < groups; g++) {
            need_class c = class_for(k, needs + g);
            u32 at = 0;
            if (c.whole != whole) continue;
            while (at < k->class_count && !same_need(k->classes + at, &c)) at++;
            if (at == k->class_count) k->classes[k->class_count++] = c;
            k->classes[at].members++;
            class_of[g] = at;
        }
        if (whole) k->whole_count = k->class_count;
    }
    for (u32 at = 0; at < k->class_count; at++) {
        need_class *c = k->classes + at;
        c->masks = masks;
        for (u32 g = 0; g < groups; g++)
            if (class_of[g] == at) *masks++ = group_masks(k->table, g);
        for (need_class *by = k->classes; !c->whole && by < k->classes + k->whole_count; by++)
            if (c->stride % by->stride == 0) c->rows_by = by, c->every = c->stride / by->stride;
    }
}

/* The next `count` u64 of a space, which begins at address `space`; 0: only counted. */
static inline void *placed(uintptr_t space, size_t *at, size_t count) {
    void *here = (void *)(space + *at * sizeof(u64));
    *at += count;
    return here;
}

/* Where the arrays lie in a space; how many u64 they need. */
static size_t place_arrays(vswa_walk *k, uintptr_t space) {
    size_t words = k->table->words, at = 0;
    k->wanted = placed(space, &at, words);
    k->left = placed(space, &at, words);
    k->held = placed(space, &at, words);
    k->level_count = placed(space, &at, (words + 1) / 2);
    k->levels = placed(space, &at, words * LEVELS * (sizeof(score_level) / sizeof(u64)));
    for (need_class *c = k->classes; c < k->classes + k->class_count; c++) {
        if (!c->rows_by) c->rows = placed(space, &at, ((size_t)blocks_of(k, c) + 1) / 2);
        if (c->whole) continue;
        if (!c->rows_by) c->looked_up = placed(space, &at, bits_of(k, c));
        c->prefix = placed(space, &at, (size_t)piece_of(c));
        c->suffix = placed(space, &at, (size_t)piece_of(c));
        c->before = placed(space, &at, (size_t)piece_of(c));
    }
    return at;
}

#endif
