/* For all ranks at once: the deepest boundary of a prompt at which each could resume.
 *
 * Groups with one and the same need make a class, whose mask of a block is the AND of theirs. Classes that
 * need every block from 0 are one running AND; it ends the walk where no rank is left. Of the others each
 * needs the last `need` blocks before a boundary: cut at multiples of `need`, a window is a suffix of one
 * piece and a prefix of the next, and so two ANDs (van Herk). The boundaries are then looked at from the
 * deepest, until every rank has found its own.
 */
#ifndef VSWA_SCORE_H
#define VSWA_SCORE_H

#include "table.h"

#define ALL_BLOCKS PY_SSIZE_T_MAX
#define RUNNING UINT32_MAX
#define FIRST_CHUNK 4
#define CHUNK 32

typedef struct {
    Py_ssize_t need, at_end; /* blocks before a boundary, and before that at the prompt's end */
    u64 *masks;              /* [words][blocks] */
    u64 *prefix, *suffix;    /* [blocks], filled piece by piece */
    Py_ssize_t piece;        /* where the piece starts whose prefixes are filled */
} need_class;

typedef struct {
    vswa_table *table;
    const u64 *wanted;   /* [table words]: ranks to be scored */
    Py_ssize_t blocks;   /* deepest boundary, and stride of the arrays */
    Py_ssize_t walked;   /* blocks behind which some rank may still be */
    int ends_on_edge;    /* whether `blocks` is the end of the prompt, where at_end holds */
    u64 *running;        /* [words][blocks] */
    need_class *classes;
    u32 class_count;
    u32 *class_of;       /* per group, or RUNNING */
} vswa_walk;

/* Rows of `count` keys, NO_ROW where there is none. Along a stored chain each is the row after the last; from
 * the first that is not, index and rows of all the others are fetched at once instead of one after another. */
static void find_rows(const vswa_table *t, const u64 *keys, Py_ssize_t count, u32 before, u32 *rows) {
    Py_ssize_t known = 0;
    u32 likely = before == NO_ROW ? NO_ROW : before + 1;
    while (known < count && row_is(t, likely, keys[known])) rows[known++] = likely++;
    for (Py_ssize_t i = known; i < count; i++) index_prefetch(t, keys[i]);
    for (Py_ssize_t i = known; i < count; i++) {
        rows[i] = index_guess(t, keys[i]);
        if (rows[i] != NO_ROW) __builtin_prefetch(row_at(t, rows[i]));
    }
    for (Py_ssize_t i = known; i < count; i++)
        if (rows[i] != NO_ROW && *row_at(t, rows[i]) != keys[i]) rows[i] = index_find(t, keys[i]);
}

/* Take `count` blocks from `from` on into the walk; whether any rank is left at the last. */
static inline __attribute__((always_inline)) int walk_rows(vswa_walk *k, const u32 *rows, Py_ssize_t from,
                                                           Py_ssize_t count, u64 *left, const u32 words) {
    const vswa_table *t = k->table;
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t block = from + i;
        u64 any = 0;
        for (u32 w = 0; w < words; w++) {
            for (u32 c = 0; c < k->class_count; c++) k->classes[c].masks[w * k->blocks + block] = ~(u64)0;
            for (u32 g = 0; g < t->groups; g++) {
                u64 mask = rows[i] == NO_ROW ? 0 : row_mask(t, rows[i], g)[w];
                if (k->class_of[g] == RUNNING)
                    left[w] &= mask;
                else
                    k->classes[k->class_of[g]].masks[w * k->blocks + block] &= mask;
            }
            k->running[w * k->blocks + block] = left[w];
            any |= left[w];
        }
        if (!any) {
            k->walked = block;
            return 0;
        }
    }
    return 1;
}

/* The first chunks are short: many prompts are known to nobody. */
static int walk_blocks(vswa_walk *k, const vswa_hashes *hashes, u64 *left) {
    u64 keys[CHUNK];
    u32 rows[CHUNK], before = NO_ROW, words = k->table->words;
    Py_ssize_t count = FIRST_CHUNK;
    memcpy(left, k->wanted, words * sizeof(u64));
    k->walked = k->blocks;
    for (Py_ssize_t from = 0; from < k->blocks; from += count, count = CHUNK) {
        if (count > k->blocks - from) count = k->blocks - from;
        if (vswa_hashes_read(hashes, from, count, keys) < 0) return -1;
        find_rows(k->table, keys, count, before, rows);
        before = rows[count - 1];
        int more = words == 1 ? walk_rows(k, rows, from, count, left, 1)
                              : walk_rows(k, rows, from, count, left, words);
        if (!more) return 0;
    }
    return 0;
}

static void fill_piece(need_class *c, const u64 *masks, Py_ssize_t walked) {
    Py_ssize_t end = c->piece + c->need < walked ? c->piece + c->need : walked;
    u64 held = ~(u64)0;
    for (Py_ssize_t i = c->piece; i < end; i++) c->prefix[i] = held &= masks[i];
    held = ~(u64)0;
    for (Py_ssize_t i = c->piece; i > c->piece - c->need && i > 0; i--) c->suffix[i - 1] = held &= masks[i - 1];
}

/* Ranks that hold the `need` blocks before `boundary`, or all of them; boundaries come in descending order. */
static inline u64 window_held(need_class *c, const u64 *masks, Py_ssize_t boundary, Py_ssize_t walked) {
    if (c->need == 0) return ~(u64)0;
    if (c->piece > boundary - 1 || c->piece < 0) {
        c->piece = (boundary - 1) / c->need * c->need;
        fill_piece(c, masks, walked);
    }
    u64 held = c->prefix[boundary - 1];
    Py_ssize_t first = boundary - c->need;
    return first >= 0 && first < c->piece ? held & c->suffix[first] : held;
}

/* The same by looking at every block: for the one boundary whose need differs. */
static u64 last_held(const u64 *masks, Py_ssize_t boundary, Py_ssize_t need) {
    u64 held = ~(u64)0;
    Py_ssize_t first = need > boundary ? 0 : boundary - need;
    for (Py_ssize_t i = first; i < boundary; i++) held &= masks[i];
    return held;
}

static u64 resumable_at(vswa_walk *k, Py_ssize_t boundary, u32 word) {
    u64 held = k->running[word * k->blocks + boundary - 1];
    int at_end = k->ends_on_edge && boundary == k->blocks;
    for (u32 c = 0; c < k->class_count && held; c++) {
        need_class *need = &k->classes[c];
        const u64 *masks = need->masks + word * k->blocks;
        if (at_end && need->at_end != need->need)
            held &= last_held(masks, boundary, need->at_end);
        else
            held &= window_held(need, masks, boundary, k->walked);
    }
    return held;
}

/* One class for each pair of needs; those that are all blocks whatever the boundary go to the running AND.
 * Needs of more blocks than there are count as all. */
static void make_classes(vswa_walk *k, const Py_ssize_t *need, const Py_ssize_t *at_end) {
    k->class_count = 0;
    for (u32 g = 0; g < k->table->groups; g++) {
        Py_ssize_t usual = need[g] < k->blocks ? need[g] : k->blocks;
        Py_ssize_t last = !k->ends_on_edge ? usual : at_end[g] < k->blocks ? at_end[g] : k->blocks;
        u32 c = 0;
        if (usual == k->blocks && last == k->blocks) {
            k->class_of[g] = RUNNING;
            continue;
        }
        while (c < k->class_count && (k->classes[c].need != usual || k->classes[c].at_end != last)) c++;
        if (c == k->class_count) {
            k->classes[c].need = usual;
            k->classes[c].at_end = last;
            k->class_count++;
        }
        k->class_of[g] = c;
    }
}

/* Where the arrays of the walk lie in `scratch`; how many u64 they need. */
static size_t place_arrays(vswa_walk *k, u64 *scratch) {
    size_t blocks = (size_t)k->blocks, words = k->table->words, at = 0;
    k->running = scratch;
    at += words * blocks;
    for (u32 c = 0; c < k->class_count; c++) {
        k->classes[c].masks = scratch + at;
        k->classes[c].prefix = scratch + at + words * blocks;
        k->classes[c].suffix = scratch + at + (words + 1) * blocks;
        at += (words + 2) * blocks;
    }
    return at;
}

#endif
