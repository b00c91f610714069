// Matrix product with quantised weights for x86 with AVX2 or AVX-512, as custom operations of ggml.
//
//   pyggml_mul_mat(ctx, w, x) -> y         as ggml_mul_mat, which it replaces where pyggml_mul_mat_fits says so
//     w   q8_0 or q4_K [K, N], rows contiguous, plain as in the file (nothing is repacked ahead: weights stay mapped)
//     x   f32 [K, ...], contiguous
//     y   f32 [N, ...]
//
// ggml's kernels take a few rows at a time. Here a strip of 16 weight rows (32 with AVX-512) is unpacked once for up to
// 512 tokens, lanes are rows, and a register block of 2 vectors of rows by 6 tokens is summed over K:
//   q8_0  int16 x int16 (vpmaddwd or vpdpwssd). Activations have 16 bits, so they add no error to speak of.
//   q4_K  uint8 x int8. Activations have 8 bits per 256, like ggml's own q8_K. vpdpbusd sums a block of 32 in int32; without
//         it vpmaddubsw does in int16, which eight products of a nibble fit, so that a block needs one widening step.
//
// A product is two nodes: the activations, quantised and laid out as the kernel reads them, and the product.
// Layout of the first: header (counter of work items), scales f32 [chunk of 256][token], then for each chunk, by tiles of
// at most 6 tokens: q8_0: int16 [128][token][2], where four neighbours are two pairs, first and third, second and fourth;
// q4_K: int8 [64][token][4], and behind all of them, again for each chunk by tiles, the sums of each 32 values,
// int16 [4][token][2].

#include "gemm.h"

#include "ggml.h"

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)

#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>

#ifdef __AVX512BW__
#define LANES 16
#ifdef __AVX512VNNI__
#define VNNI
#endif
typedef __m512i vint;
typedef __m512 vfloat;
#define V(op) _mm512_##op
#define load_int(p) _mm512_loadu_si512(p)
#define store_int(p, v) _mm512_storeu_si512(p, v)
#define zero_int() _mm512_setzero_si512()
#else
#define LANES 8
typedef __m256i vint;
typedef __m256 vfloat;
#define V(op) _mm256_##op
#define load_int(p) _mm256_loadu_si256((const __m256i *) (p))
#define store_int(p, v) _mm256_storeu_si256((__m256i *) (p), v)
#define zero_int() _mm256_setzero_si256()
#endif

enum {
    STRIP = 2 * LANES,   // weight rows of a register block
    TILE = 6,            // tokens of a register block
    CHUNK = 256,         // K between two conversions to f32; the activations of a token have one scale in it
    BLOCK = 32,          // K with one scale of the weights
    TOKENS = 512,        // tokens for which a strip is unpacked once
    HEADER = 64,
};

struct block_q8_0 {
    uint16_t d;
    int8_t q[BLOCK];
};

struct block_q4_K {
    uint16_t d, dmin;
    uint32_t scales[3];
    uint8_t q[CHUNK / 2];
};

_Static_assert(sizeof(struct block_q8_0) == 34 && sizeof(struct block_q4_K) == 144, "layouts of ggml");

// The innermost steps: one token against two vectors of rows. In assembler because compilers copy and spill the twelve
// accumulators, which halves the speed. x is the 32 bits at p in all lanes; words: pairs of int16, bytes: four of int8.
//   FIRST  a0 = w0 * x, a1 = w1 * x
//   NEXT   a0 += w0 * x, a1 += w1 * x
#ifndef NEXT  // a test that emulates the other width brings its own
#define FIRST_WORDS "vpmaddwd %[w0], %[x], %[a0]\n\tvpmaddwd %[w1], %[x], %[a1]"
#ifdef VNNI
#define NEXT_WORDS "vpdpwssd %[w0], %[x], %[a0]\n\tvpdpwssd %[w1], %[x], %[a1]"
#define NEXT_BYTES "vpdpbusd %[x], %[w0], %[a0]\n\tvpdpbusd %[x], %[w1], %[a1]"
#define FIRST_BYTES "vpxord %[a0], %[a0], %[a0]\n\tvpxord %[a1], %[a1], %[a1]\n\t" NEXT_BYTES
#else
#define FIRST_BYTES "vpmaddubsw %[x], %[w0], %[a0]\n\tvpmaddubsw %[x], %[w1], %[a1]"
#define NEXT_WORDS                                                                                     \
    "vpmaddwd %[w0], %[x], %[y]\n\tvpmaddwd %[w1], %[x], %[x]\n\tvpaddd %[y], %[a0], %[a0]\n\t" \
    "vpaddd %[x], %[a1], %[a1]"
#define NEXT_BYTES                                                                                         \
    "vpmaddubsw %[x], %[w0], %[y]\n\tvpmaddubsw %[x], %[w1], %[x]\n\tvpaddw %[y], %[a0], %[a0]\n\t" \
    "vpaddw %[x], %[a1], %[a1]"
#endif
#define FIRST(what, a0_, a1_, w0_, w1_, p)                                                                      \
    do {                                                                                                        \
        vint x_;                                                                                                \
        __asm__("vpbroadcastd %[m], %[x]\n\t" what                                                              \
                : [a0] "=&v"(a0_), [a1] "=&v"(a1_), [x] "=&v"(x_)                                               \
                : [w0] "v"(w0_), [w1] "v"(w1_), [m] "m"(*(const int32_t (*)[1]) (const void *) (p)));           \
    } while (0)
#define NEXT(what, a0_, a1_, w0_, w1_, p)                                                                       \
    do {                                                                                                        \
        vint x_, y_;                                                                                            \
        __asm__("vpbroadcastd %[m], %[x]\n\t" what                                                              \
                : [a0] "+v"(a0_), [a1] "+v"(a1_), [x] "=&v"(x_), [y] "=&v"(y_)                                  \
                : [w0] "v"(w0_), [w1] "v"(w1_), [m] "m"(*(const int32_t (*)[1]) (const void *) (p)));           \
    } while (0)
#endif

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- activations -------------------------------------------------------------------------------------------------

struct layout {
    int64_t k, tokens, chunks, tiles;
    int bytes;                 // of an activation: 2 for q8_0, 1 for q4_K
    size_t scales, data, sums, size;
};

static struct layout layout_of(enum ggml_type type, int64_t k, int64_t tokens) {
    struct layout l = {.k = k, .tokens = tokens, .chunks = ceil_div(k, CHUNK), .tiles = ceil_div(tokens, TILE)};
    l.bytes = type == GGML_TYPE_Q4_K ? 1 : 2;
    l.scales = HEADER;
    l.data = l.scales + (size_t) (l.chunks * tokens) * sizeof(float);
    l.sums = l.data + (size_t) (k * tokens) * l.bytes;
    l.size = l.sums + (type == GGML_TYPE_Q4_K ? (size_t) (l.chunks * tokens) * 8 * sizeof(int16_t) : 0) + 64;
    return l;
}

static int64_t tile_start(const struct layout * l, int64_t tile) { return l->tokens * tile / l->tiles; }

// n floats -> whole numbers of at most `limit`; returns the scale, NaN when an input is not finite
static float quantize(const float * x, int n, float limit, int32_t * q) {
    __m256 top = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < n; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v));
        bad = _mm256_add_ps(bad, _mm256_mul_ps(v, _mm256_setzero_ps()));
    }
    float max = 0, poison = 0, t[8], b[8];
    _mm256_storeu_ps(t, top);
    _mm256_storeu_ps(b, bad);
    for (int i = 0; i < 8; i++) max = t[i] > max ? t[i] : max, poison += b[i];
    if (poison != 0 || !(max >= 1e-30f)) {
        memset(q, 0, (size_t) n * sizeof *q);
        return poison != 0 ? NAN : 0.0f;
    }
    const __m256 inverse = _mm256_set1_ps(limit / max);
    for (int i = 0; i < n; i += 8)
        _mm256_storeu_si256((__m256i *) (q + i), _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
    return max / limit;
}

static void compute_activations(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const enum ggml_type type = (enum ggml_type) (intptr_t) userdata;
    const struct ggml_tensor * x = dst->src[0];
    const struct layout l = layout_of(type, x->ne[0], ggml_nrows(x));
    char * base = dst->data;
    if (ith == 0) atomic_store((atomic_llong *) base, 0);
    for (int64_t tile = ith; tile < l.tiles; tile += nth) {
        const int64_t t0 = tile_start(&l, tile), size = tile_start(&l, tile + 1) - t0;
        for (int64_t t = 0; t < size; t++)
            for (int64_t c = 0; c < l.chunks; c++) {
                int32_t q[CHUNK];
                const int n = (int) min64(CHUNK, l.k - c * CHUNK);
                const float * in = (const float *) x->data + (t0 + t) * l.k + c * CHUNK;
                float * scale = (float *) (base + l.scales) + c * l.tokens + t0 + t;
                if (l.bytes == 2) {
                    *scale = quantize(in, n, 32767.0f, q);
                    int16_t * out = (int16_t *) (base + l.data) + c * CHUNK * l.tokens + t0 * n + 2 * t;
                    for (int i = 0; i < n; i += 4, out += 4 * size) {
                        out[0] = (int16_t) q[i], out[1] = (int16_t) q[i + 2];
                        out[2 * size] = (int16_t) q[i + 1], out[2 * size + 1] = (int16_t) q[i + 3];
                    }
                } else {
                    *scale = quantize(in, n, 127.0f, q);
                    int8_t * out = (int8_t *) (base + l.data) + c * CHUNK * l.tokens + t0 * n + 4 * t;
                    for (int i = 0; i < n; i += 4, out += 4 * size)
                        for (int j = 0; j < 4; j++) out[j] = (int8_t) q[i + j];
                    int16_t * sums = (int16_t *) (base + l.sums) + (c * l.tokens + t0) * 8 + 2 * t;
                    for (int b = 0; b < CHUNK / BLOCK; b++) {
                        int sum = 0;
                        for (int i = 0; i < BLOCK; i++) sum += q[b * BLOCK + i];
                        sums[(b / 2) * 2 * size + b % 2] = (int16_t) sum;
                    }
                }
            }
    }
}

// ---- q8_0 --------------------------------------------------------------------------------------------------------

struct strip_q8_0 {
    int16_t q[CHUNK / 2][STRIP][2];
    float d[CHUNK / BLOCK][STRIP];
};

// 16 bytes of 8 rows -> 4 vectors of 4 bytes of each row
static inline void transpose_dwords(__m256i out[4], const char * const rows[8], int64_t at) {
    __m256i v[4], a[4];
    for (int r = 0; r < 4; r++)
        v[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (rows[r] + at))),
                                       _mm_loadu_si128((const __m128i *) (rows[r + 4] + at)), 1);
    for (int i = 0; i < 2; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        out[2 * i] = _mm256_unpacklo_epi64(a[i], a[2 + i]);
        out[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[2 + i]);
    }
}

static void unpack_q8_0(struct strip_q8_0 * s, const char * const rows[STRIP], int64_t first, int blocks) {
    for (int b = 0; b < blocks; b++) {
        const int64_t at = (first + b) * (int64_t) sizeof(struct block_q8_0);
        uint16_t d[STRIP];
        for (int r = 0; r < STRIP; r++) memcpy(&d[r], rows[r] + at, 2);
        for (int r = 0; r < STRIP; r += 8)
            _mm256_storeu_ps(&s->d[b][r], _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) &d[r])));
        for (int r = 0; r < STRIP; r += 8)
            for (int half = 0; half < 2; half++) {
                __m256i v[4];
                transpose_dwords(v, rows + r, at + 2 + 16 * half);
                for (int j = 0; j < 4; j++) {  // bytes 0 and 2, then 1 and 3, as words
                    int16_t(*out)[STRIP][2] = &s->q[b * 16 + half * 8 + 2 * j];
                    _mm256_storeu_si256((__m256i *) out[0][r], _mm256_srai_epi16(_mm256_slli_epi16(v[j], 8), 8));
                    _mm256_storeu_si256((__m256i *) out[1][r], _mm256_srai_epi16(v[j], 8));
                }
            }
    }
}

// acc[token][2] = n_steps vectors of w times those of a, whose step is n tokens of 32 bits
#define PRODUCT(what, acc, w, n_steps, a)                                                                       \
    do {                                                                                                        \
        const char * w_ = (const char *) (w), * a_ = (const char *) (a);                                        \
        vint w0 = load_int(w_), w1 = load_int(w_ + sizeof(vint));                                               \
        _Pragma("GCC unroll 6") for (int t = 0; t < n; t++) FIRST(FIRST_##what, acc[t][0], acc[t][1], w0, w1, a_ + 4 * t); \
        _Pragma("GCC unroll 1") for (int i = 1; i < (n_steps); i++) {                                           \
            w_ += 2 * sizeof(vint);                                                                             \
            a_ += 4 * n;                                                                                        \
            w0 = load_int(w_), w1 = load_int(w_ + sizeof(vint));                                                \
            _Pragma("GCC unroll 6") for (int t = 0; t < n; t++)                                                 \
                NEXT(NEXT_##what, acc[t][0], acc[t][1], w0, w1, a_ + 4 * t);                                    \
        }                                                                                                       \
    } while (0)

// out[token][STRIP] += scale of the token * (strip times tile), over one chunk
static inline __attribute__((always_inline)) void multiply_q8_0(const struct strip_q8_0 * s, int blocks, const int16_t * a,
                                                                const float * scales, float * out, const int n) {
    vfloat sum[TILE][2];
    for (int t = 0; t < n; t++) sum[t][0] = sum[t][1] = V(setzero_ps)();
    for (int b = 0; b < blocks; b++, a += BLOCK * n) {
        vint acc[TILE][2];
        PRODUCT(WORDS, acc, s->q[b * BLOCK / 2], BLOCK / 2, a);
        const vfloat d0 = V(loadu_ps)(s->d[b]), d1 = V(loadu_ps)(s->d[b] + LANES);
#pragma GCC unroll 6
        for (int t = 0; t < n; t++) {
            sum[t][0] = V(fmadd_ps)(V(cvtepi32_ps)(acc[t][0]), d0, sum[t][0]);
            sum[t][1] = V(fmadd_ps)(V(cvtepi32_ps)(acc[t][1]), d1, sum[t][1]);
        }
    }
    for (int t = 0; t < n; t++)
        for (int v = 0; v < 2; v++) {
            float * o = out + t * STRIP + v * LANES;
            V(storeu_ps)(o, V(fmadd_ps)(sum[t][v], V(set1_ps)(scales[t]), V(loadu_ps)(o)));
        }
}

// ---- q4_K --------------------------------------------------------------------------------------------------------

struct strip_q4_K {
    uint8_t q[CHUNK / 4][STRIP][4];
#ifdef VNNI
    float scales[CHUNK / BLOCK][STRIP];
#else
    int16_t scales[CHUNK / BLOCK][STRIP][2];   // each twice
#endif
    int16_t mins[CHUNK / BLOCK / 2][STRIP][2]; // of two neighbouring blocks
    float d[STRIP], dmin[STRIP];
};

static void unpack_q4_K(struct strip_q4_K * s, const char * const rows[STRIP], int64_t chunk) {
    const __m256i low = _mm256_set1_epi8(15);
    for (int r = 0; r < STRIP; r++) {
        const struct block_q4_K * w = (const struct block_q4_K *) rows[r] + chunk;
        const uint32_t a = w->scales[0], b = w->scales[1], c = w->scales[2];
        const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
        const uint32_t packed[4] = {a & six, (c & four) | (a >> 6 & two) << 4, b & six, (c >> 4 & four) | (b >> 6 & two) << 4};
        for (int i = 0; i < 8; i++) {
            const uint8_t scale = packed[i / 4] >> 8 * (i % 4), min = packed[2 + i / 4] >> 8 * (i % 4);
#ifdef VNNI
            s->scales[i][r] = scale;
#else
            s->scales[i][r][0] = s->scales[i][r][1] = scale;
#endif
            s->mins[i / 2][r][i % 2] = min;
        }
        s->d[r] = _cvtsh_ss(w->d);
        s->dmin[r] = _cvtsh_ss(w->dmin);
    }
    const int64_t at = chunk * (int64_t) sizeof(struct block_q4_K) + (int64_t) offsetof(struct block_q4_K, q);
    for (int j = 0; j < 8; j++)  // 16 bytes of 32: the low nibbles are 32 values, the high ones the next 32
        for (int r = 0; r < STRIP; r += 8) {
            __m256i v[4];
            transpose_dwords(v, rows + r, at + 16 * j);
            for (int i = 0; i < 4; i++) {
                uint8_t(*out)[STRIP][4] = &s->q[16 * (j / 2) + 4 * (j % 2) + i];
                _mm256_storeu_si256((__m256i *) out[0][r], _mm256_and_si256(v[i], low));
                _mm256_storeu_si256((__m256i *) out[8][r], _mm256_and_si256(_mm256_srli_epi16(v[i], 4), low));
            }
        }
}

// sum of whole numbers of each block times its scale, over the 256 of a chunk; in VNNI's form each lane is a row's sum
#ifdef VNNI
typedef vfloat vtotal;
#define to_float(v) (v)
#define scaled(b, v, acc) V(fmadd_ps)(V(cvtepi32_ps)(acc), V(loadu_ps)(&s->scales[b][(v) * LANES]), total[t][v])
#else
typedef vint vtotal;
#define to_float(v) V(cvtepi32_ps)(v)
#define scaled(b, v, acc) V(add_epi32)(total[t][v], V(madd_epi16)(acc, load_int(s->scales[b][(v) * LANES])))
#endif

static inline __attribute__((always_inline)) void multiply_q4_K(const struct strip_q4_K * s, const int8_t * a,
                                                                const int16_t * sums, const float * scales, float * out,
                                                                const int n) {
    vtotal total[TILE][2];
    vint acc[TILE][2];
    memset(total, 0, sizeof total);
    for (int b = 0; b < CHUNK / BLOCK; b++, a += BLOCK * n) {
        PRODUCT(BYTES, acc, s->q[b * BLOCK / 4], BLOCK / 4, a);  // without VNNI at most 8 * 2 * 15 * 127: fits int16
#pragma GCC unroll 6
        for (int t = 0; t < n; t++) {
            total[t][0] = scaled(b, 0, acc[t][0]);
            total[t][1] = scaled(b, 1, acc[t][1]);
        }
    }
    PRODUCT(WORDS, acc, s->mins, CHUNK / BLOCK / 2, sums);
    const vfloat d0 = V(loadu_ps)(s->d), d1 = V(loadu_ps)(s->d + LANES);
    const vfloat m0 = V(loadu_ps)(s->dmin), m1 = V(loadu_ps)(s->dmin + LANES);
#pragma GCC unroll 6
    for (int t = 0; t < n; t++) {
        float * o = out + t * STRIP;
        const vfloat scale = V(set1_ps)(scales[t]);
        const vfloat y0 = V(fnmadd_ps)(V(cvtepi32_ps)(acc[t][0]), m0, V(mul_ps)(to_float(total[t][0]), d0));
        const vfloat y1 = V(fnmadd_ps)(V(cvtepi32_ps)(acc[t][1]), m1, V(mul_ps)(to_float(total[t][1]), d1));
        V(storeu_ps)(o, V(fmadd_ps)(y0, scale, V(loadu_ps)(o)));
        V(storeu_ps)(o + LANES, V(fmadd_ps)(y1, scale, V(loadu_ps)(o + LANES)));
    }
}

// ---- the product -------------------------------------------------------------------------------------------------

#define FOR_SIZE(n, call)                          \
    switch (n) {                                   \
        case 1: { enum { N = 1 }; call; break; }   \
        case 2: { enum { N = 2 }; call; break; }   \
        case 3: { enum { N = 3 }; call; break; }   \
        case 4: { enum { N = 4 }; call; break; }   \
        case 5: { enum { N = 5 }; call; break; }   \
        case 6: { enum { N = 6 }; call; break; }   \
    }

static void compute_product(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) ith, (void) nth, (void) userdata;
    const struct ggml_tensor * w = dst->src[0], * x = dst->src[1];
    const struct layout l = layout_of(w->type, w->ne[0], ggml_nrows(dst));
    const char * base = x->data;
    const size_t bytes_per_chunk = ggml_row_size(w->type, CHUNK);
    const int64_t n_rows = w->ne[1], strips = ceil_div(n_rows, STRIP), tiles_per_item = TOKENS / TILE;
    const int64_t items = strips * ceil_div(l.tiles, tiles_per_item);
    union {
        struct strip_q8_0 q8_0;
        struct strip_q4_K q4_K;
    } s __attribute__((aligned(64)));
    float out[TOKENS * STRIP] __attribute__((aligned(64)));

    for (;;) {
        const int64_t item = atomic_fetch_add((atomic_llong *) base, 1);
        if (item >= items) break;
        const int64_t row = item % strips * STRIP, first = item / strips * tiles_per_item;
        const int64_t last = min64(first + tiles_per_item, l.tiles), token0 = tile_start(&l, first);
        const int64_t tokens = tile_start(&l, last) - token0;
        const char * rows[STRIP];
        for (int r = 0; r < STRIP; r++) rows[r] = (const char *) w->data + (size_t) min64(row + r, n_rows - 1) * w->nb[1];
        int64_t starts[TOKENS / TILE + 1];
        for (int64_t tile = first; tile <= last; tile++) starts[tile - first] = tile_start(&l, tile);
        memset(out, 0, (size_t) tokens * STRIP * sizeof(float));
        for (int64_t c = 0; c < l.chunks; c++) {
            const int blocks = (int) min64(CHUNK, l.k - c * CHUNK) / BLOCK;
            if (w->type == GGML_TYPE_Q4_K) unpack_q4_K(&s.q4_K, rows, c);
            else unpack_q8_0(&s.q8_0, rows, c * (CHUNK / BLOCK), blocks);
            for (int64_t tile = first; tile < last; tile++) {
                const int64_t t0 = starts[tile - first], size = starts[tile - first + 1] - t0;
                const char * a = base + l.data + (size_t) (c * CHUNK * l.tokens + t0 * blocks * BLOCK) * l.bytes;
                const float * scales = (const float *) (base + l.scales) + c * l.tokens + t0;
                float * o = out + (t0 - token0) * STRIP;
                if (c + 1 < l.chunks)  // a part of the next chunk's weights, which hardware does not foresee in 16 streams
                    for (int64_t r = tile - first; r < STRIP; r += last - first)
                        for (size_t i = 0; i < bytes_per_chunk; i += 64)
                            __builtin_prefetch(rows[r] + (size_t) (c + 1) * bytes_per_chunk + i);
                if (w->type == GGML_TYPE_Q4_K) {
                    const int16_t * sums = (const int16_t *) (base + l.sums) + (c * l.tokens + t0) * 8;
                    FOR_SIZE(size, multiply_q4_K(&s.q4_K, (const int8_t *) a, sums, scales, o, N))
                } else {
                    FOR_SIZE(size, multiply_q8_0(&s.q8_0, blocks, (const int16_t *) a, scales, o, N))
                }
            }
        }
        float * y = (float *) dst->data + token0 * n_rows + row;
        if (n_rows - row >= STRIP)
            for (int64_t t = 0; t < tokens; t++) memcpy(y + t * n_rows, out + t * STRIP, STRIP * sizeof(float));
        else
            for (int64_t t = 0; t < tokens; t++) memcpy(y + t * n_rows, out + t * STRIP, (size_t) (n_rows - row) * sizeof(float));
    }
}

bool pyggml_mul_mat_fits(const struct ggml_tensor * w, const struct ggml_tensor * x) {
    if (x->type != GGML_TYPE_F32 || !ggml_is_contiguous(x) || w->ne[2] != 1 || w->ne[3] != 1 || ggml_is_transposed(w)) return false;
    if (x->ne[0] != w->ne[0] || ggml_nrows(x) < 4) return false;
    if (w->buffer && !ggml_backend_buffer_is_host(w->buffer)) return false;  // a layout that is not the file's
    return w->type == GGML_TYPE_Q8_0 || w->type == GGML_TYPE_Q4_K;
}

struct ggml_tensor * pyggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * w, struct ggml_tensor * x) {
    const struct layout l = layout_of(w->type, w->ne[0], ggml_nrows(x));
    struct ggml_tensor * a = ggml_custom_4d(ctx, GGML_TYPE_I8, (int64_t) l.size, 1, 1, 1, &x, 1, compute_activations,
                                            GGML_N_TASKS_MAX, (void *) (intptr_t) w->type);
    struct ggml_tensor * args[2] = {w, a};
    return ggml_custom_4d(ctx, GGML_TYPE_F32, w->ne[1], x->ne[1], x->ne[2], x->ne[3], args, 2, compute_product,
                          GGML_N_TASKS_MAX, NULL);
}

#else

bool pyggml_mul_mat_fits(const struct ggml_tensor * w, const struct ggml_tensor * x) {
    (void) w, (void) x;
    return false;
}

struct ggml_tensor * pyggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * w, struct ggml_tensor * x) {
    return ggml_mul_mat(ctx, w, x);
}

#endif
