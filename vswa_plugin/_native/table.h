/* What the table does with rows: a rank comes to hold a key, or no longer does. */
#ifndef VSWA_TABLE_H
#define VSWA_TABLE_H

#include "rows.h"

/* Links of an unused row, as numbers plus one: the next in the upper half, the one before in the lower. */
static inline void free_link(vswa_table *t, u32 row, u32 next, u32 before) {
    t->keys[row] = (u64)next << 32 | before;
}

static void free_push(vswa_table *t, u32 row) {
    free_link(t, row, t->free_head, 0);
    if (t->free_head) free_link(t, t->free_head - 1, (u32)(t->keys[t->free_head - 1] >> 32), row + 1);
    t->free_head = row + 1;
}

static void free_unlink(vswa_table *t, u32 row) {
    u32 next = (u32)(t->keys[row] >> 32), before = (u32)t->keys[row];
    if (before)
        free_link(t, before - 1, next, (u32)t->keys[before - 1]);
    else
        t->free_head = next;
    if (next) free_link(t, next - 1, (u32)(t->keys[next - 1] >> 32), before);
}

static inline void row_clear(vswa_table *t, u32 row) {
    for (u32 g = 0; g < t->groups; g++)
        for (u32 w = 0; w < t->words; w++) row_mask(t, row, g)[w] = 0;
}

/* A row for a new key, without ranks: `wanted` if it is unused. There is room. */
static u32 row_take(vswa_table *t, u32 wanted) {
    u32 row = wanted;
    if (wanted < t->high && !row_in_use(t, wanted)) {
        free_unlink(t, row);
    } else if ((wanted == t->high && t->high < t->capacity) || !t->free_head) {
        row = t->high++;
        row_clear(t, row);
    } else {
        row = t->free_head - 1;
        free_unlink(t, row);
    }
    t->in_use[row / 64] |= (u64)1 << row % 64;
    t->used++;
    return row;
}

static void row_drop(vswa_table *t, u32 row) {
    index_take(t, row);
    free_push(t, row);
    t->in_use[row / 64] &= ~((u64)1 << row % 64);
    t->used--;
}

typedef enum { LEFT_OUT = -1, WAS_SET = 0, NEWLY_SET = 1 } set_result;

/* Set one bit; the caller has reserved room. `*row`: where the key before was; becomes the key's row. */
static inline set_result table_set(vswa_table *t, u64 key, u32 group, u32 bit, int may_add, u32 *row) {
    u32 likely = *row == NO_ROW ? NO_ROW : *row + 1, at = table_find(t, key, likely);
    u64 one = (u64)1 << bit % 64;
    if (at == NO_ROW) {
        if (!may_add) return LEFT_OUT;
        at = row_take(t, likely);
        t->keys[at] = key;
        index_put(t->index, t, tag_of(key) << 32 | (at + 1));
    }
    *row = at;
    u64 *mask = row_mask(t, at, group);
    if (mask[bit / 64] & one) return WAS_SET;
    if (!mask_any(mask, t->words)) {
        if (!may_add) return LEFT_OUT;
        t->resident[group]++;
    }
    mask[bit / 64] |= one;
    return NEWLY_SET;
}

/* Whether it was set. */
static inline int table_unset(vswa_table *t, u64 key, u32 group, u32 bit, u32 *row) {
    u32 at = table_find(t, key, *row == NO_ROW ? NO_ROW : *row + 1);
    u64 one = (u64)1 << bit % 64;
    if (at == NO_ROW || bit / 64 >= t->words) return 0;
    *row = at;
    u64 *mask = row_mask(t, at, group);
    if (!(mask[bit / 64] & one)) return 0;
    mask[bit / 64] &= ~one;
    if (!mask_any(mask, t->words)) {
        t->resident[group]--;
        if (!row_held(t, at)) row_drop(t, at);
    }
    return 1;
}

/* Take the ranks of `dead` (words of them) out of groups [from, to) of one row. */
static void row_strip(vswa_table *t, u32 row, u32 from, u32 to, const u64 *dead) {
    if (!row_in_use(t, row)) return;
    for (u32 g = from; g < to; g++) {
        u64 *mask = row_mask(t, row, g), before = 0, after = 0;
        for (u32 w = 0; w < t->words; w++) {
            before |= mask[w];
            mask[w] &= ~dead[w];
            after |= mask[w];
        }
        t->resident[g] -= before && !after;
    }
    if (!row_held(t, row)) row_drop(t, row);
}

/* Look at up to `budget` rows from the cursor on; 1 when all have been seen. */
static int table_sweep(vswa_table *t, u32 from, u32 to, const u64 *dead, size_t budget) {
    for (; budget > 0 && t->cursor < t->high; budget--) row_strip(t, t->cursor++, from, to, dead);
    return t->cursor >= t->high;
}

/* The keys that one rank holds in a group, written one after another from `out` on, which has room for `most`;
 * how many. */
static size_t table_held(const vswa_table *t, u32 group, u32 bit, char *out, size_t most) {
    size_t count = 0;
    for (u32 row = 0; row < t->high && count < most; row++) {
        if (!(row_mask(t, row, group)[bit / 64] >> bit % 64 & 1)) continue;
        memcpy(out + count++ * sizeof(u64), t->keys + row, sizeof(u64));
    }
    return count;
}

/* NULL, or what is wrong. */
static const char *table_check(const vswa_table *t) {
    const char *wrong = NULL;
    size_t *resident = calloc(t->groups, sizeof *resident), unused = 0, indexed = 0;
    u32 used = 0;
    if (resident == NULL) return "out of memory";
    for (u32 row = 0; row < t->high; row++) {
        if (row_in_use(t, row) != row_held(t, row)) wrong = "a row is in use without a rank, or the other way";
        if (!row_in_use(t, row)) continue;
        used++;
        if (index_find(t, t->keys[row]) != row) wrong = "a key cannot be found";
        for (u32 g = 0; g < t->groups; g++) resident[g] += (size_t)mask_any(row_mask(t, row, g), t->words);
    }
    for (u32 row = t->free_head; row != 0 && unused <= t->high; row = (u32)(t->keys[row - 1] >> 32)) {
        if (row_in_use(t, row - 1)) wrong = "a row in use is listed as unused";
        unused++;
    }
    for (size_t at = 0; at < t->slots; at++) indexed += t->index[at] != 0;
    if (used != t->used || used + unused != t->high || indexed != used) wrong = "a number of rows is wrong";
    for (u32 g = 0; g < t->groups; g++)
        if (resident[g] != t->resident[g]) wrong = "a group's number of keys is wrong";
    if (t->used > t->slots - t->slots / 5) wrong = "the index is too full";
    free(resident);
    return wrong;
}

#endif
