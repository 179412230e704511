/* XXH3, 64 bit, as published: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
 * Written for this project; checked against the xxhash package at every length (tests/blocks/test_kernel.py). */
#ifndef VSWA_XXH3_H
#define VSWA_XXH3_H

#include "numbers.h"

#define P32_1 0x9E3779B1U
#define P32_2 0x85EBCA77U
#define P32_3 0xC2B2AE3DU
#define P64_1 0x9E3779B185EBCA87ULL
#define P64_2 0xC2B2AE3D27D4EB4FULL
#define P64_3 0x165667B19E3779F9ULL
#define P64_4 0x85EBCA77C2B2AE63ULL
#define P64_5 0x27D4EB2F165667C5ULL
#define XXH3_SECRET 192
#define XXH3_STRIPE 64
#define XXH3_STRIPES_OF_BLOCK ((XXH3_SECRET - XXH3_STRIPE) / 8)
#define XXH3_MID 240

static const unsigned char xxh3_secret[XXH3_SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline u64 xxh_read64(const unsigned char *p) {
    u64 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline u32 xxh_read32(const unsigned char *p) {
    u32 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline u64 xxh_rotl(u64 v, int by) { return v << by | v >> (64 - by); }

static inline u64 xxh_fold(u64 a, u64 b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (u64)product ^ (u64)(product >> 64);
}

static inline u64 xxh3_avalanche(u64 h) {
    h ^= h >> 37;
    h *= 0x165667919E3779F9ULL;
    return h ^ h >> 32;
}

static inline u64 xxh64_avalanche(u64 h) {
    h ^= h >> 33;
    h *= P64_2;
    h ^= h >> 29;
    h *= P64_3;
    return h ^ h >> 32;
}

static inline u64 xxh3_mix16(const unsigned char *in, const unsigned char *secret, u64 seed) {
    return xxh_fold(xxh_read64(in) ^ (xxh_read64(secret) + seed),
                    xxh_read64(in + 8) ^ (xxh_read64(secret + 8) - seed));
}

static inline u64 xxh3_9_to_16(const unsigned char *in, size_t len, u64 seed) {
    u64 flip1 = (xxh_read64(xxh3_secret + 24) ^ xxh_read64(xxh3_secret + 32)) + seed;
    u64 flip2 = (xxh_read64(xxh3_secret + 40) ^ xxh_read64(xxh3_secret + 48)) - seed;
    u64 low = xxh_read64(in) ^ flip1, high = xxh_read64(in + len - 8) ^ flip2;
    return xxh3_avalanche(len + __builtin_bswap64(low) + high + xxh_fold(low, high));
}

static u64 xxh3_up_to_8(const unsigned char *in, size_t len, u64 seed) {
    if (len == 0)
        return xxh64_avalanche(seed ^ xxh_read64(xxh3_secret + 56) ^ xxh_read64(xxh3_secret + 64));
    if (len < 4) {
        u32 mixed = (u32)in[0] << 16 | (u32)in[len >> 1] << 24 | in[len - 1] | (u32)len << 8;
        u64 flip = (u64)(xxh_read32(xxh3_secret) ^ xxh_read32(xxh3_secret + 4)) + seed;
        return xxh64_avalanche(mixed ^ flip);
    }
    seed ^= (u64)__builtin_bswap32((u32)seed) << 32;
    u64 flip = (xxh_read64(xxh3_secret + 8) ^ xxh_read64(xxh3_secret + 16)) - seed;
    u64 h = ((u64)xxh_read32(in + len - 4) + ((u64)xxh_read32(in) << 32)) ^ flip;
    h ^= xxh_rotl(h, 49) ^ xxh_rotl(h, 24);
    h *= 0x9FB21C651E98DF25ULL;
    h ^= (h >> 35) + len;
    h *= 0x9FB21C651E98DF25ULL;
    return h ^ h >> 28;
}

static inline u64 xxh3_17_to_128(const unsigned char *in, size_t len, u64 seed) {
    u64 acc = len * P64_1;
    for (size_t pair = (len - 1) / 32 + 1; pair-- > 0;) {
        acc += xxh3_mix16(in + 16 * pair, xxh3_secret + 32 * pair, seed);
        acc += xxh3_mix16(in + len - 16 * (pair + 1), xxh3_secret + 32 * pair + 16, seed);
    }
    return xxh3_avalanche(acc);
}

static u64 xxh3_129_to_240(const unsigned char *in, size_t len, u64 seed) {
    u64 acc = len * P64_1;
    size_t rounds = len / 16;
    for (size_t i = 0; i < 8; i++) acc += xxh3_mix16(in + 16 * i, xxh3_secret + 16 * i, seed);
    acc = xxh3_avalanche(acc);
    for (size_t i = 8; i < rounds; i++)
        acc += xxh3_mix16(in + 16 * i, xxh3_secret + 16 * (i - 8) + 3, seed);
    return xxh3_avalanche(acc + xxh3_mix16(in + len - 16, xxh3_secret + 136 - 17, seed));
}

static inline void xxh3_stripe(u64 acc[8], const unsigned char *in, const unsigned char *secret) {
    for (int i = 0; i < 8; i++) {
        u64 value = xxh_read64(in + 8 * i), key = value ^ xxh_read64(secret + 8 * i);
        acc[i ^ 1] += value;
        acc[i] += (u64)(u32)key * (key >> 32);
    }
}

static u64 xxh3_long(const unsigned char *in, size_t len, const unsigned char *secret) {
    u64 acc[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    size_t stripes = (len - 1) / XXH3_STRIPE;
    for (size_t s = 0; s < stripes; s++) {
        size_t within = s % XXH3_STRIPES_OF_BLOCK;
        xxh3_stripe(acc, in + s * XXH3_STRIPE, secret + 8 * within);
        if (within == XXH3_STRIPES_OF_BLOCK - 1)
            for (int i = 0; i < 8; i++) {
                u64 key = xxh_read64(secret + XXH3_SECRET - XXH3_STRIPE + 8 * i);
                acc[i] = (acc[i] ^ acc[i] >> 47 ^ key) * P32_1;
            }
    }
    xxh3_stripe(acc, in + len - XXH3_STRIPE, secret + XXH3_SECRET - XXH3_STRIPE - 7);
    u64 h = len * P64_1;
    for (int i = 0; i < 4; i++)
        h += xxh_fold(acc[2 * i] ^ xxh_read64(secret + 11 + 16 * i),
                      acc[2 * i + 1] ^ xxh_read64(secret + 11 + 16 * i + 8));
    return xxh3_avalanche(h);
}

/* A seed and the secret that long inputs are hashed with under it. */
typedef struct {
    u64 seed;
    unsigned char secret[XXH3_SECRET];
} xxh3_seeded;

static void xxh3_seed(xxh3_seeded *s, u64 seed) {
    s->seed = seed;
    for (int i = 0; i < XXH3_SECRET; i += 16) {
        u64 low = xxh_read64(xxh3_secret + i) + seed, high = xxh_read64(xxh3_secret + i + 8) - seed;
        memcpy(s->secret + i, &low, 8);
        memcpy(s->secret + i + 8, &high, 8);
    }
}

static inline u64 xxh3_64(const xxh3_seeded *s, const void *data, size_t len) {
    const unsigned char *in = data;
    if (len > XXH3_MID) return xxh3_long(in, len, s->secret);
    if (len > 128) return xxh3_129_to_240(in, len, s->seed);
    if (len > 16) return xxh3_17_to_128(in, len, s->seed);
    if (len > 8) return xxh3_9_to_16(in, len, s->seed);
    return xxh3_up_to_8(in, len, s->seed);
}

#endif
