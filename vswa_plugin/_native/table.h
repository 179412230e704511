/* Hash table: sequence hash -> for each cache group, a mask of the ranks that hold the block.
 *
 * Rows lie in the order in which blocks were stored: 1 + groups * words u64, the key and the masks of each
 * group. A chain stored at once is a run of rows, so that a walk along a prompt mostly finds the next block
 * in the next row, without a look at the index and without a cache miss, even among millions of keys.
 *
 * The index finds a key anywhere: open addressing with linear probing over u64 slots, in each the high half
 * of key * odd (its tag) and the row's number plus one; 0 is empty. A home is the high part of tag * slots;
 * so homes ascend with tags whatever the number of slots, and growing streams from one array to another
 * without a look at the rows. Removal shifts later slots back: there are no tombstones.
 *
 * A row is in use while any mask has a bit. Unused rows are a list linked both ways through their keys, from
 * the middle of which a chain takes the row that follows its last one.
 */
#ifndef VSWA_TABLE_H
#define VSWA_TABLE_H

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "numbers.h"

#define MIN_ROWS 64
#define MAX_ROWS (UINT32_MAX - 1)
#define HUGE_PAGE ((size_t)1 << 21)
#define NO_ROW UINT32_MAX

typedef struct {
    u64 *rows, *index;
    size_t stride, slots, capacity; /* u64 in a row, slots of the index, rows there is room for */
    u32 used, high, free_head;      /* rows in use; rows ever in use; first unused of these */
    u32 cursor;                     /* next row that a sweep looks at */
    u32 groups, words;
    size_t *resident; /* per group: rows whose mask has a bit */
} vswa_table;

static inline u64 *row_at(const vswa_table *t, u32 row) { return t->rows + row * t->stride; }

static inline u64 *row_mask(const vswa_table *t, u32 row, u32 group) {
    return t->rows + row * t->stride + 1 + (size_t)group * t->words;
}

static inline int mask_any(const u64 *words, size_t count) {
    u64 any = 0;
    for (size_t i = 0; i < count; i++) any |= words[i];
    return any != 0;
}

static inline int row_in_use(const vswa_table *t, u32 row) { return mask_any(row_at(t, row) + 1, t->stride - 1); }

static inline u64 tag_of(u64 key) { return key * 0x9E3779B97F4A7C15ULL >> 32; }

static inline size_t home_of(const vswa_table *t, u64 tag) { return (size_t)(tag * t->slots >> 32); }

static inline size_t slot_after(const vswa_table *t, size_t slot) { return slot + 1 == t->slots ? 0 : slot + 1; }

static inline void index_prefetch(const vswa_table *t, u64 key) {
    __builtin_prefetch(t->index + home_of(t, tag_of(key)));
}

/* The row whose tag is the key's, most likely its own, for a prefetch; NO_ROW: it has none. */
static inline u32 index_guess(const vswa_table *t, u64 key) {
    u64 tag = tag_of(key);
    for (size_t at = home_of(t, tag); t->index[at] != 0; at = slot_after(t, at))
        if (t->index[at] >> 32 == tag) return (u32)t->index[at] - 1;
    return NO_ROW;
}

static inline u32 index_find(const vswa_table *t, u64 key) {
    u64 tag = tag_of(key);
    for (size_t at = home_of(t, tag); t->index[at] != 0; at = slot_after(t, at)) {
        u32 row = (u32)t->index[at] - 1;
        if (t->index[at] >> 32 == tag && *row_at(t, row) == key) return row;
    }
    return NO_ROW;
}

/* Whether `row` exists, is in use and is the key's. */
static inline int row_is(const vswa_table *t, u32 row, u64 key) {
    return row < t->high && *row_at(t, row) == key && row_in_use(t, row);
}

/* The key's row, tried first at `likely`. */
static inline u32 table_find(const vswa_table *t, u64 key, u32 likely) {
    return row_is(t, likely, key) ? likely : index_find(t, key);
}

static void index_put(u64 *index, const vswa_table *t, u64 slot) {
    size_t at = home_of(t, slot >> 32);
    while (index[at] != 0) at = slot_after(t, at);
    index[at] = slot;
}

static void index_take(vswa_table *t, u32 row) {
    size_t hole = home_of(t, tag_of(*row_at(t, row)));
    while ((u32)t->index[hole] != row + 1) hole = slot_after(t, hole);
    for (size_t next = slot_after(t, hole); t->index[next] != 0; next = slot_after(t, next)) {
        size_t home = home_of(t, t->index[next] >> 32);
        int reaches = home <= next ? home <= hole && hole < next : home <= hole || hole < next;
        if (!reaches) continue;
        t->index[hole] = t->index[next];
        hole = next;
    }
    t->index[hole] = 0;
}

/* Memory that is not zeroed. */
static u64 *words_alloc(size_t count) {
    size_t bytes = count * sizeof(u64);
    if (bytes < 2 * HUGE_PAGE) return malloc(bytes);
    /* Random look-ups over many megabytes miss the TLB as well as the cache, but for huge pages. */
    size_t whole = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    u64 *words = aligned_alloc(HUGE_PAGE, whole);
#ifdef MADV_HUGEPAGE
    if (words != NULL) (void)madvise(words, whole, MADV_HUGEPAGE);
#endif
    return words;
}

/* As all that may fail: 0, or -1 where memory is short, with nothing changed. */
static int index_resize(vswa_table *t, size_t slots) {
    vswa_table next = *t;
    next.slots = slots;
    next.index = words_alloc(slots);
    if (next.index == NULL) return -1;
    memset(next.index, 0, slots * sizeof(u64));
    for (size_t at = 0; at < t->slots; at++)
        if (t->index[at] != 0) index_put(next.index, &next, t->index[at]);
    free(t->index);
    *t = next;
    return 0;
}

static void copy_masks(const vswa_table *from, u32 row, vswa_table *to, u32 to_row) {
    memset(row_at(to, to_row) + 1, 0, (to->stride - 1) * sizeof(u64));
    for (u32 g = 0; g < from->groups; g++)
        memcpy(row_mask(to, to_row, g), row_mask(from, row, g), from->words * sizeof(u64));
}

/* Rows and index anew, without unused rows between: for more words a mask, or for less memory. */
static int table_rebuild(vswa_table *t, size_t capacity, u32 words) {
    vswa_table next = *t;
    next.capacity = capacity;
    next.words = words;
    next.stride = 1 + (size_t)t->groups * words;
    next.high = next.free_head = next.cursor = 0; /* a sweep under way starts over */
    next.slots = capacity + capacity / 3 + 1;
    next.rows = words_alloc(capacity * next.stride);
    next.index = words_alloc(next.slots);
    if (next.rows == NULL || next.index == NULL) {
        free(next.rows);
        free(next.index);
        return -1;
    }
    memset(next.index, 0, next.slots * sizeof(u64));
    for (u32 row = 0; row < t->high; row++) {
        if (!row_in_use(t, row)) continue;
        u64 key = *row_at(t, row);
        u32 to = next.high++;
        *row_at(&next, to) = key;
        copy_masks(t, row, &next, to);
        index_put(next.index, &next, tag_of(key) << 32 | (to + 1));
    }
    free(t->rows);
    free(t->index);
    *t = next;
    return 0;
}

static int rows_resize(vswa_table *t, size_t capacity) {
    u64 *rows = words_alloc(capacity * t->stride);
    if (rows == NULL) return -1;
    memcpy(rows, t->rows, t->high * t->stride * sizeof(u64));
    free(t->rows);
    t->rows = rows;
    t->capacity = capacity;
    return 0;
}

/* Room for `more` keys, the index at most 3/4 full; each grows by half, or to what is needed. */
static int table_reserve(vswa_table *t, size_t more) {
    size_t rows = t->used + more, slots = rows + rows / 3 + 1;
    size_t rows_grown = t->capacity + t->capacity / 2, slots_grown = t->slots + t->slots / 2;
    if (rows > MAX_ROWS) return -1;
    if (slots > t->slots && index_resize(t, slots > slots_grown ? slots : slots_grown) < 0) return -1;
    if (rows > t->capacity && rows_resize(t, rows > rows_grown ? rows : rows_grown) < 0) return -1;
    return 0;
}

/* Mass eviction gives memory back: below a quarter, to a half. Short memory: it stays as it is. */
static void table_shrink(vswa_table *t) {
    if (t->capacity > 16 * MIN_ROWS && t->used < t->capacity / 4)
        (void)table_rebuild(t, 2 * (size_t)t->used + MIN_ROWS, t->words);
}

static int table_init(vswa_table *t, u32 groups) {
    memset(t, 0, sizeof *t);
    t->groups = groups;
    t->resident = calloc(groups, sizeof *t->resident);
    return t->resident == NULL ? -1 : table_rebuild(t, MIN_ROWS, 1);
}

static void table_free(vswa_table *t) {
    free(t->rows);
    free(t->index);
    free(t->resident);
    memset(t, 0, sizeof *t);
}

/* What table_bytes counts is allocated; pages of rows that were never in use are not touched yet. */
static size_t table_bytes(const vswa_table *t) { return (t->capacity * t->stride + t->slots) * sizeof(u64); }

/* Links of an unused row, as numbers plus one: the next in the upper half, the one before in the lower. */
static inline void free_link(vswa_table *t, u32 row, u32 next, u32 before) {
    *row_at(t, row) = (u64)next << 32 | before;
}

static void free_push(vswa_table *t, u32 row) {
    free_link(t, row, t->free_head, 0);
    if (t->free_head) free_link(t, t->free_head - 1, (u32)(*row_at(t, t->free_head - 1) >> 32), row + 1);
    t->free_head = row + 1;
}

static void free_unlink(vswa_table *t, u32 row) {
    u32 next = (u32)(*row_at(t, row) >> 32), before = (u32)*row_at(t, row);
    if (before)
        free_link(t, before - 1, next, (u32)*row_at(t, before - 1));
    else
        t->free_head = next;
    if (next) free_link(t, next - 1, (u32)(*row_at(t, next - 1) >> 32), before);
}

/* A row for a new key: `wanted` if it is unused. There is room. */
static u32 row_take(vswa_table *t, u32 wanted) {
    u32 row = wanted;
    if (wanted < t->high && !row_in_use(t, wanted)) {
        free_unlink(t, row);
    } else if ((wanted == t->high && t->high < t->capacity) || !t->free_head) {
        row = t->high++;
    } else {
        row = t->free_head - 1;
        free_unlink(t, row);
    }
    t->used++;
    return row;
}

static void row_drop(vswa_table *t, u32 row) {
    index_take(t, row);
    free_push(t, row);
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
        *row_at(t, at) = key;
        memset(row_at(t, at) + 1, 0, (t->stride - 1) * sizeof(u64));
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
        if (!row_in_use(t, at)) row_drop(t, at);
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
    if (!row_in_use(t, row)) row_drop(t, row);
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
        memcpy(out + count++ * sizeof(u64), row_at(t, row), sizeof(u64));
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
        if (!row_in_use(t, row)) continue;
        used++;
        if (index_find(t, *row_at(t, row)) != row) wrong = "a key cannot be found";
        for (u32 g = 0; g < t->groups; g++) resident[g] += (size_t)mask_any(row_mask(t, row, g), t->words);
    }
    for (u32 row = t->free_head; row != 0 && unused <= t->high; row = (u32)(*row_at(t, row - 1) >> 32)) {
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
