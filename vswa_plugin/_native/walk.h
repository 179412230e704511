/* The groups that need all blocks: for each rank the deepest boundary up to which it holds all of them.
 *
 * Blocks are taken run by run: one key is looked up, the keys of the rows behind it are compared with the
 * prompt's, and the masks of all of them are joined in one go. Only where that has cost a rank are they
 * looked at one by one. So nothing is taken for granted of what a rank holds, and yet no block costs more
 * than the reading of its key and its masks.
 */
#ifndef VSWA_WALK_H
#define VSWA_WALK_H

#include "plan.h"

#define PIECE 256
#define AHEAD 32
#define SHORT_RUN 4
#define SPAN 16

static inline int read_names(vswa_walk *k, const need_class *c, Py_ssize_t block, Py_ssize_t count, u64 *keys) {
    if (vswa_hashes_read(k->hashes, (block + 1) * c->stride - 1, c->stride, count, keys) < 0) k->unreadable = 1;
    return k->unreadable ? -1 : 0;
}

static inline void prefetch_rows(const need_class *c, const vswa_table *t, u32 row, size_t count) {
    size_t words = t->words;
    for (size_t i = 0; i < count; i += 8) __builtin_prefetch(t->keys + row + i);
    for (u32 m = 0; m < c->members; m++)
        for (size_t i = 0; i < count * words; i += 8) __builtin_prefetch(c->masks[m] + row * words + i);
}

/* A key that must be looked up costs a cache miss or three. So those of several runs to come are looked up at
 * once, as far as that goes without a look at the rows, as if each run were as long as the last one. */
typedef struct {
    size_t next, every, count; /* where in the piece the next one is expected to start, and those after it */
    u32 rows[AHEAD];           /* likely rows, in reverse */
} expected_runs;

static void expect_runs(const need_class *c, const vswa_table *t, expected_runs *e, const u64 *keys, size_t at,
                        size_t count) {
    size_t most = (count - at + c->run - 1) / c->run;
    e->count = most < AHEAD ? most : AHEAD;
    e->every = c->run;
    e->next = at;
    for (size_t i = 0; i < e->count; i++) index_prefetch(t, keys[at + i * c->run]);
    for (size_t i = 0; i < e->count; i++) {
        u32 row = e->rows[e->count - 1 - i] = index_guess(t, keys[at + i * c->run]);
        if (row != NO_ROW) prefetch_rows(c, t, row, c->run < 64 ? c->run : 64);
    }
}

/* The row of keys[at], where a run of rows starts. */
static inline u32 start_of_run(const need_class *c, const vswa_table *t, expected_runs *e, const u64 *keys,
                               size_t at, size_t count) {
    for (; e->count > 0 && e->next < at; e->next += e->every) e->count--;
    if (e->count == 0 || e->next != at) expect_runs(c, t, e, keys, at, count);
    e->next += e->every;
    u32 row = e->rows[--e->count];
    return row != NO_ROW && t->keys[row] != keys[at] ? index_find(t, keys[at]) : row;
}

static inline __attribute__((always_inline)) void join_rows(const u64 *masks, size_t rows, u64 *held,
                                                            const u32 words) {
    u64 all[4] = {~(u64)0, ~(u64)0, ~(u64)0, ~(u64)0};
    for (u32 from = 0; from < words; from += 4) {
        u32 some = words - from < 4 ? words - from : 4;
        for (u32 w = 0; w < some; w++) all[w] = held[from + w];
        for (size_t i = 0; i < rows; i++)
            for (u32 w = 0; w < some; w++) all[w] &= masks[i * words + from + w];
        for (u32 w = 0; w < some; w++) held[from + w] = all[w];
    }
}

/* Take the masks of consecutive rows into `held`. */
static void join_run(const need_class *c, const vswa_table *t, u32 row, size_t rows, u64 *held) {
    for (u32 m = 0; m < c->members; m++) {
        const u64 *masks = c->masks[m] + (size_t)row * t->words;
        switch (t->words) {
        case 1: join_rows(masks, rows, held, 1); break;
        case 2: join_rows(masks, rows, held, 2); break;
        case 4: join_rows(masks, rows, held, 4); break;
        default: join_rows(masks, rows, held, t->words);
        }
    }
}

/* Where runs are short, keys are looked up one by one, several at once; how many before one has no row. The
 * index is fetched for as many of the keys that come next, of `left` in all. */
static size_t look_up_each(need_class *c, const vswa_table *t, const u64 *keys, size_t left, u32 *rows, u64 *held) {
    size_t words = t->words, found = 0, runs = 0, count = left < AHEAD ? left : AHEAD;
    for (size_t i = 0; i < count; i++) index_prefetch(t, keys[i]);
    for (size_t i = 0; i < count; i++) {
        rows[i] = index_guess(t, keys[i]);
        if (rows[i] != NO_ROW) prefetch_rows(c, t, rows[i], 1);
    }
    for (size_t i = count; i < left && i < 2 * count; i++) index_prefetch(t, keys[i]);
    for (; found < count; found++) {
        u32 row = rows[found];
        if (row != NO_ROW && t->keys[row] != keys[found]) row = rows[found] = index_find(t, keys[found]);
        if (row == NO_ROW) break;
        runs += found == 0 || row != rows[found - 1] + 1;
        for (u32 m = 0; m < c->members; m++)
            for (size_t w = 0; w < words; w++) held[w] &= c->masks[m][row * words + w];
    }
    c->run = runs ? found / runs : 0;
    return found;
}

/* Look up `count` blocks and take their masks into `held`; how many before one that no rank holds. */
static size_t look_up_piece(need_class *c, const vswa_table *t, const u64 *keys, size_t count, u32 *rows,
                            u64 *held) {
    u32 row = c->known ? rows[-1] + 1 : NO_ROW;
    expected_runs expected = {.count = 0};
    size_t at = 0, run;
    for (; at < count; at += run) {
        run = rows_run(t, row, keys + at, count - at);
        if (run == 0 && c->run < SHORT_RUN) {
            run = look_up_each(c, t, keys + at, count - at, rows + at, held);
            if (run < AHEAD && at + run < count) return at + run;
            row = rows[at + run - 1] + 1;
            continue;
        }
        if (run == 0) {
            row = start_of_run(c, t, &expected, keys, at, count);
            if (row == NO_ROW) return at;
            run = rows_run(t, row, keys + at, count - at);
            c->run = 0;
        }
        for (size_t i = 0; i < run; i++) rows[at + i] = row + (u32)i;
        join_run(c, t, row, run, held);
        c->run += run;
        row += (u32)run;
    }
    return at;
}

/* Look up blocks up to `to`, or the first that no rank holds, and take their masks into `held`. */
static void look_up_to(vswa_walk *k, need_class *c, Py_ssize_t to, u64 *held) {
    u64 keys[PIECE];
    while (c->known < to) {
        Py_ssize_t count = to - c->known < PIECE ? to - c->known : PIECE, found;
        if (read_names(k, c, c->known, count, keys) < 0) return;
        found = (Py_ssize_t)look_up_piece(c, k->table, keys, (size_t)count, c->rows + c->known, held);
        c->known += found;
        if (found < count) return;
    }
}

static inline void add_level(vswa_walk *k, u32 word, Py_ssize_t boundary, u64 ranks) {
    if (ranks != 0 && boundary > 0)
        k->levels[(size_t)word * LEVELS + k->level_count[word]++] = (score_level){boundary, ranks};
}

/* Of the ranks of one word, those that hold all that boundary `to` needs beyond boundary `from`. */
static inline u64 still_held(const vswa_walk *k, Py_ssize_t from, Py_ssize_t to, u32 word, u64 held) {
    size_t words = k->table->words;
    for (const need_class *c = k->classes; c < k->classes + k->whole_count; c++) {
        Py_ssize_t first = from == 0 ? 0 : blocks_before(c, from) + c->after;
        for (u32 m = 0; m < c->members; m++) {
            const u64 *masks = c->masks[m] + word;
            for (Py_ssize_t i = first; i < blocks_before(c, to) + c->after; i++)
                held &= masks[c->rows[i] * words];
        }
    }
    return held;
}

/* Boundaries (from, to], whose blocks have all been looked up: the ranks that go no deeper than each; whether
 * any are left. */
static int find_losses(vswa_walk *k, Py_ssize_t from, Py_ssize_t to) {
    u64 any = 0;
    for (u32 w = 0; w < k->table->words; w++) {
        u64 left = k->left[w];
        for (Py_ssize_t b = from; b < to && left; b++) {
            if ((b - from) % SPAN == 0)
                for (; b + SPAN <= to && still_held(k, b, b + SPAN, w, left) == left;) b += SPAN;
            if (b == to) break;
            u64 held = still_held(k, b, b + 1, w, left);
            if (held != left) add_level(k, w, b, left & ~held);
            left = held;
        }
        any |= k->left[w] = left;
    }
    return any != 0;
}

/* The deepest boundary up to `to` whose blocks have all been looked up. */
static Py_ssize_t looked_up(const vswa_walk *k, Py_ssize_t to) {
    for (const need_class *c = k->classes; c < k->classes + k->whole_count; c++) {
        Py_ssize_t reached = c->known <= c->after ? 0 : (c->known - c->after) / c->per_step;
        if (reached < to) to = reached;
    }
    return to;
}

/* From the first boundary on, more at a time the deeper it goes: many prompts are known to nobody. */
static void walk_whole(vswa_walk *k) {
    size_t bytes = k->table->words * sizeof(u64);
    Py_ssize_t walked = k->boundaries;
    memcpy(k->left, k->wanted, bytes);
    memset(k->level_count, 0, k->table->words * sizeof(u32));
    int more = k->whole_count > 0 && mask_any(k->left, k->table->words);
    for (Py_ssize_t from = 0, to, some = 4; more && from < walked; from = to) {
        to = walked - from < some ? walked : from + some;
        some = some < PIECE ? 8 * some : some;
        memcpy(k->held, k->left, bytes);
        for (need_class *c = k->classes; c < k->classes + k->whole_count; c++) {
            look_up_to(k, c, blocks_before(c, to) + c->after, k->held);
            if (k->unreadable) return;
        }
        Py_ssize_t reached = looked_up(k, to);
        if (reached < to) walked = to = reached;
        if (memcmp(k->held, k->left, bytes) != 0) more = find_losses(k, from, to);
    }
    for (u32 w = 0; w < k->table->words; w++) add_level(k, w, walked, k->left[w]);
}

#endif
