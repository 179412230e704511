/* Rows of keys and masks, and the index that finds a key's row.
 *
 * A key is a sequence hash; each cache group has a mask of the ranks that hold its block. Keys lie one after
 * another by row, and so do the masks of each group. Rows are in the order in which blocks were stored: a
 * chain stored at once is a run of rows, whose keys are compared and whose masks are joined as fast as memory
 * can be read, without a look at the index.
 *
 * The index finds a key anywhere: open addressing with linear probing over u64 slots, in each the high half
 * of key * odd (its tag) and the row's number plus one; 0 is empty. A home is the high part of tag * slots;
 * so homes ascend with tags whatever the number of slots, and growing streams from one array to another
 * without a look at the rows. Removal shifts later slots back: there are no tombstones.
 *
 * A row is in use while any mask has a bit; one bit a row says so. Unused rows are a list linked both ways
 * through their keys, from the middle of which a chain takes the row that follows its last one.
 */
#ifndef VSWA_ROWS_H
#define VSWA_ROWS_H

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "numbers.h"

#define MIN_ROWS 64
#define MAX_ROWS (UINT32_MAX - 64)
#define HUGE_PAGE ((size_t)1 << 21)
#define NO_ROW UINT32_MAX

typedef struct {
    u64 *keys;                    /* [capacity]; what follows lies in the same allocation */
    u64 *masks;                   /* [groups][capacity][words] */
    u64 *in_use;                  /* a bit per row */
    u64 *index;                   /* [slots] */
    size_t slots, capacity;       /* of the index; rows there is room for, a multiple of 64 */
    u32 used, high, free_head;    /* rows in use; rows ever in use; first unused of these */
    u32 cursor;                   /* next row that a sweep looks at */
    u32 groups, words;
    size_t *resident; /* per group: rows whose mask has a bit */
} vswa_table;

static inline u64 *group_masks(const vswa_table *t, u32 group) {
    return t->masks + (size_t)group * t->capacity * t->words;
}

static inline u64 *row_mask(const vswa_table *t, u32 row, u32 group) {
    return group_masks(t, group) + (size_t)row * t->words;
}

static inline int mask_any(const u64 *words, size_t count) {
    u64 any = 0;
    for (size_t i = 0; i < count; i++) any |= words[i];
    return any != 0;
}

static inline int row_held(const vswa_table *t, u32 row) {
    const u64 *mask = row_mask(t, row, 0);
    for (u32 g = 0; g < t->groups; g++, mask += t->capacity * t->words)
        if (mask_any(mask, t->words)) return 1;
    return 0;
}

static inline int row_in_use(const vswa_table *t, u32 row) { return t->in_use[row / 64] >> row % 64 & 1; }

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
        if (t->index[at] >> 32 == tag && t->keys[row] == key) return row;
    }
    return NO_ROW;
}

/* Whether `row` exists, is in use and is the key's. */
static inline int row_is(const vswa_table *t, u32 row, u64 key) {
    return row < t->high && t->keys[row] == key && row_in_use(t, row);
}

/* The key's row, tried first at `likely`. */
static inline u32 table_find(const vswa_table *t, u64 key, u32 likely) {
    return row_is(t, likely, key) ? likely : index_find(t, key);
}

/* How many of `count` keys are those of the rows from `row` on, each of the row after the last. */
static inline size_t rows_run(const vswa_table *t, u32 row, const u64 *keys, size_t count) {
    size_t same = 0, used = 0, most = row < t->high ? t->high - row : 0;
    const u64 *there = t->keys + row;
    if (count > most) count = most;
    if (count == 0 || *there != *keys) return 0;
    for (; same + 8 <= count; same += 8) {
        u64 differ = 0;
        for (size_t i = same; i < same + 8; i++) differ |= there[i] ^ keys[i];
        if (differ) break;
    }
    while (same < count && there[same] == keys[same]) same++;
    while (used < same) {
        size_t bit = (row + used) % 64;
        u64 unused = ~t->in_use[(row + used) / 64] >> bit;
        used += unused ? (size_t)__builtin_ctzll(unused) : 64 - bit;
        if (unused) break;
    }
    return used < same ? used : same;
}

static void index_put(u64 *index, const vswa_table *t, u64 slot) {
    size_t at = home_of(t, slot >> 32);
    while (index[at] != 0) at = slot_after(t, at);
    index[at] = slot;
}

static void index_take(vswa_table *t, u32 row) {
    size_t hole = home_of(t, tag_of(t->keys[row]));
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

/* u64 for that many rows, a multiple of 64. */
static inline size_t rows_size(const vswa_table *t, size_t capacity, u32 words) {
    return capacity * (1 + (size_t)t->groups * words) + capacity / 64;
}

/* Room for at least `capacity` rows, none of them in use; what `t` had is not freed. */
static int rows_alloc(vswa_table *t, size_t capacity, u32 words) {
    t->capacity = (capacity + 63) / 64 * 64;
    t->words = words;
    t->keys = words_alloc(rows_size(t, t->capacity, words));
    if (t->keys == NULL) return -1;
    t->masks = t->keys + t->capacity;
    t->in_use = t->masks + (size_t)t->groups * t->capacity * words;
    memset(t->in_use, 0, t->capacity / 64 * sizeof(u64));
    return 0;
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

static int rows_resize(vswa_table *t, size_t capacity) {
    vswa_table next = *t;
    if (rows_alloc(&next, capacity, t->words) < 0) return -1;
    memcpy(next.keys, t->keys, t->high * sizeof(u64));
    for (u32 g = 0; g < t->groups; g++)
        memcpy(group_masks(&next, g), group_masks(t, g), (size_t)t->high * t->words * sizeof(u64));
    memcpy(next.in_use, t->in_use, t->capacity / 64 * sizeof(u64));
    free(t->keys);
    *t = next;
    return 0;
}

static void row_copy(const vswa_table *from, u32 row, vswa_table *to, u32 to_row) {
    to->keys[to_row] = from->keys[row];
    to->in_use[to_row / 64] |= (u64)1 << to_row % 64;
    for (u32 g = 0; g < from->groups; g++) {
        u64 *mask = row_mask(to, to_row, g);
        memset(mask, 0, to->words * sizeof(u64));
        memcpy(mask, row_mask(from, row, g), from->words * sizeof(u64));
    }
}

/* Rows and index anew, without unused rows between: for more words a mask, or for less memory. */
static int table_rebuild(vswa_table *t, size_t capacity, u32 words) {
    vswa_table next = *t;
    if (rows_alloc(&next, capacity, words) < 0) return -1;
    next.slots = next.capacity + next.capacity / 3 + 1;
    next.index = words_alloc(next.slots);
    if (next.index == NULL) {
        free(next.keys);
        return -1;
    }
    memset(next.index, 0, next.slots * sizeof(u64));
    next.high = next.free_head = next.cursor = 0; /* a sweep under way starts over */
    for (u32 row = 0; row < t->high; row++) {
        if (!row_in_use(t, row)) continue;
        u32 to = next.high++;
        row_copy(t, row, &next, to);
        index_put(next.index, &next, tag_of(next.keys[to]) << 32 | (to + 1));
    }
    free(t->keys);
    free(t->index);
    *t = next;
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
    free(t->keys);
    free(t->index);
    free(t->resident);
    memset(t, 0, sizeof *t);
}

/* What table_bytes counts is allocated; pages of rows that were never in use are not touched yet. */
static size_t table_bytes(const vswa_table *t) {
    return (rows_size(t, t->capacity, t->words) + t->slots) * sizeof(u64);
}

#endif
