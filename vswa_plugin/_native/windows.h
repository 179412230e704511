/* The groups that do not need all blocks: whether a rank could resume at a boundary.
 *
 * They are looked at from the deepest boundary backwards, and no further than until every rank has found its
 * own. A window is the last `need` blocks before a boundary: cut at multiples of `need`, it is a suffix of
 * one piece and a prefix of the next, and so two ANDs whatever its length (van Herk). A chunk is the prefix
 * of a piece alone. Windows that do not overlap are ANDed block by block.
 */
#ifndef VSWA_WINDOWS_H
#define VSWA_WINDOWS_H

#include "walk.h"

#define BATCH 32

/* Rows of `count` keys. Along a stored chain each is the row after the last; from the first that is not,
 * index and keys of all the others are fetched at once instead of one after another. */
static void find_rows(const vswa_table *t, const u64 *keys, Py_ssize_t count, u32 *rows) {
    Py_ssize_t known = 1;
    rows[0] = index_find(t, keys[0]);
    for (; known < count && row_is(t, rows[known - 1] + 1, keys[known]); known++) rows[known] = rows[known - 1] + 1;
    for (Py_ssize_t i = known; i < count; i++) index_prefetch(t, keys[i]);
    for (Py_ssize_t i = known; i < count; i++) {
        u32 row = index_guess(t, keys[i]);
        if (row != NO_ROW) __builtin_prefetch(t->keys + row);
    }
    for (Py_ssize_t i = known; i < count; i++) rows[i] = index_find(t, keys[i]);
}

static inline int is_looked_up(const need_class *c, Py_ssize_t block) {
    return c->looked_up[block / 64] >> block % 64 & 1;
}

/* Look up a block, and with it those before it that will be needed next. */
static u32 look_up_back(vswa_walk *k, const need_class *c, Py_ssize_t block) {
    u64 keys[BATCH];
    u32 one, *rows = c->rows_by ? &one : c->rows + block;
    Py_ssize_t count = 1, most = c->rows_by || piece_of(c) < c->per_step ? 1 : BATCH;
    for (; count < most && count <= block && !is_looked_up(c, block - count); count++) rows--;
    if (read_names(k, c, block + 1 - count, count, keys) < 0) return NO_ROW;
    find_rows(k->table, keys, count, rows);
    for (Py_ssize_t i = block + 1 - count; i <= block && !c->rows_by; i++)
        c->looked_up[i / 64] |= (u64)1 << i % 64;
    return rows[count - 1];
}

/* The row of a block: looked up for a whole class already, or now. */
static inline u32 row_of(vswa_walk *k, const need_class *c, Py_ssize_t block) {
    const need_class *by = c->rows_by;
    if (by == NULL) return is_looked_up(c, block) ? c->rows[block] : look_up_back(k, c, block);
    Py_ssize_t last = (block + 1) * c->every - 1; /* of its blocks, the one with the same name */
    return last < by->known ? by->rows[last] : look_up_back(k, c, block);
}

/* Ranks of one word that hold the block in all groups of the class. */
static inline u64 block_held(vswa_walk *k, const need_class *c, Py_ssize_t block, u32 word) {
    u32 row = row_of(k, c, block);
    if (row == NO_ROW) return 0;
    u64 held = ~(u64)0;
    for (u32 m = 0; m < c->members; m++) held &= c->masks[m][(size_t)row * k->table->words + word];
    return held;
}

/* Ranks that hold all blocks [first, end). */
static u64 blocks_held(vswa_walk *k, const need_class *c, Py_ssize_t first, Py_ssize_t end, u32 word) {
    u64 held = ~(u64)0;
    for (Py_ssize_t i = end; i > first && held; i--) held &= block_held(k, c, i - 1, word);
    return held;
}

/* Ranks of one word that hold each of the blocks [first, end). */
static void gather(vswa_walk *k, const need_class *c, Py_ssize_t first, Py_ssize_t end, u32 word, u64 *out) {
    size_t words = k->table->words;
    const need_class *by = c->rows_by;
    if (by == NULL || end * c->every > by->known) {
        for (Py_ssize_t i = end; i-- > first;) out[i - first] = block_held(k, c, i, word);
        return;
    }
    for (Py_ssize_t i = first; i < end; i++) {
        size_t at = by->rows[(i + 1) * c->every - 1] * words + word;
        u64 held = c->masks[0][at];
        for (u32 m = 1; m < c->members; m++) held &= c->masks[m][at];
        out[i - first] = held;
    }
}

/* Whether prefixes and suffixes are there for a window that ends before block `end`. */
static inline int is_filled(const need_class *c, Py_ssize_t end) { return c->piece >= 0 && c->piece < end; }

/* Fill the prefixes of the piece in which block `end` - 1 lies, up to it, and the suffixes of the one before. */
static void fill_piece(vswa_walk *k, need_class *c, Py_ssize_t end, u32 word) {
    Py_ssize_t size = piece_of(c), start = (end - 1) / size * size;
    if (c->piece == start + size && !c->chunk)
        memcpy(c->prefix, c->before, (size_t)(end - start) * sizeof(u64));
    else
        gather(k, c, start, end, word, c->prefix);
    c->piece = start;
    for (Py_ssize_t i = start + 1; i < end; i++) c->prefix[i - start] &= c->prefix[i - start - 1];
    if (c->chunk || start == 0) return;
    gather(k, c, start - size, start, word, c->before);
    u64 held = ~(u64)0;
    for (Py_ssize_t i = size; i-- > 0;) c->suffix[i] = held &= c->before[i];
}

/* Ranks that hold what the class needs directly before block `end`; calls come with `end` descending. */
static inline u64 window_held(vswa_walk *k, need_class *c, Py_ssize_t end, u32 word) {
    Py_ssize_t size = piece_of(c), first = c->chunk ? end - end % size : end > size ? end - size : 0;
    if (end - first <= c->per_step) return blocks_held(k, c, first, end, word);
    if (!is_filled(c, end)) fill_piece(k, c, end, word);
    u64 held = c->prefix[end - 1 - c->piece];
    return first < c->piece ? held & c->suffix[first - c->piece + size] : held;
}

/* How many blocks directly before the boundary the class needs; more than there are: all. */
static inline Py_ssize_t needed_before(const vswa_walk *k, const need_class *c, Py_ssize_t boundary) {
    if (c->chunk) return blocks_before(c, boundary) % c->chunk;
    return k->ends_on_edge && boundary == k->boundaries ? c->at_end : c->need;
}

/* Of `ranks` (of one word), those that hold what the class needs at the boundary. */
static u64 class_held(vswa_walk *k, need_class *c, Py_ssize_t boundary, u32 word, u64 ranks) {
    Py_ssize_t end = blocks_before(c, boundary), need = needed_before(k, c, boundary);
    if (c->after) ranks &= block_held(k, c, end, word);
    /* Mostly a group that has lost a window has lost the block next to the boundary. */
    if (need > 0 && !is_filled(c, end)) ranks &= block_held(k, c, end - 1, word);
    if (!ranks) return 0;
    if (c->chunk || need == c->need) return ranks & window_held(k, c, end, word);
    return ranks & blocks_held(k, c, end > need ? end - need : 0, end, word);
}

/* Whether any class needs a block there; else nothing shows that the engine knows the prefix. */
static int is_needed(const vswa_walk *k, Py_ssize_t boundary) {
    int needed = k->whole_count > 0;
    for (const need_class *c = k->classes + k->whole_count; c < k->classes + k->class_count; c++)
        needed |= c->after || needed_before(k, c, boundary) > 0;
    return needed;
}

/* Of `ranks` (of one word), those that could resume at the boundary, as far as the classes go that are not
 * whole. The class at which the last boundary failed comes first. */
static u64 resumable_at(vswa_walk *k, Py_ssize_t boundary, u32 word, u64 ranks) {
    need_class *last = k->failed_at;
    if (last != NULL) ranks = class_held(k, last, boundary, word, ranks);
    for (need_class *c = k->classes + k->whole_count; ranks && c < k->classes + k->class_count; c++) {
        if (c == last) continue;
        ranks = class_held(k, c, boundary, word, ranks);
        if (!ranks) k->failed_at = c;
    }
    return ranks && is_needed(k, boundary) ? ranks : 0;
}

/* The deepest boundary from `boundary` down to `least` before which the class that failed last holds a block
 * for some of `ranks`. */
static Py_ssize_t skip_lost(vswa_walk *k, Py_ssize_t boundary, Py_ssize_t least, u32 word, u64 ranks) {
    const need_class *c = k->failed_at;
    if (c == NULL || c->need == 0 || (k->ends_on_edge && boundary == k->boundaries)) return boundary;
    while (boundary > least && !is_filled(c, blocks_before(c, boundary)) &&
           !(block_held(k, c, blocks_before(c, boundary) - 1, word) & ranks))
        boundary--;
    return boundary;
}

static void begin_windows(vswa_walk *k, u32 word) {
    k->failed_at = NULL;
    for (need_class *c = k->classes + k->whole_count; c < k->classes + k->class_count; c++) {
        c->piece = -1;
        if (word == 0 && !c->rows_by) memset(c->looked_up, 0, bits_of(k, c) * sizeof(u64));
    }
}

#endif
