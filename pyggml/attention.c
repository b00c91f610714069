// Attention without a mask in f32, as a custom operation of ggml.
//
//   pyggml_attention(ctx, q, k, v, scale, n_threads) -> y = softmax(scale q k^T) v for each head
//     q     f32 [D, n_heads, n_q], D a multiple of 32
//     k, v  f32 [D, n_kv_heads, n_kv], n_heads a multiple of n_kv_heads: consecutive heads share one
//     y     f32 [D, n_heads, n_q]
// q, k and v may be views with any strides beyond the first dimension. Callers check shapes; n_threads bounds the threads
// that take part, because each has scratch space in the graph.
//
// A thread lays out the keys and values of a head once, and takes QUERIES queries against KEYS keys at a time: what a block
// of either product reads stays in the first cache while the block's rows go by, however long the picture is. The softmax
// is the one that goes on from block to block: sums so far are rescaled when a larger score comes. Nothing is rounded to
// f16.

#include "attention.h"

#include "ggml.h"
#include "simd.h"

#include <math.h>
#include <stdatomic.h>

enum {
    HEADER = 64,
#if LANES == 16
    ROWS = 12,  // of a register block: with two vectors each, 24 of 32 registers
#else
    ROWS = 6,
#endif
    TILES = 8,
    QUERIES = TILES * ROWS,
    KEYS = 128,
    ITEMS = 8,  // work items for each thread, at least
};

// floats: keys [panel of kv][D][PANEL], values [panel of D][kv][PANEL]; of QUERIES queries: themselves [tile][D][ROWS],
// scores [QUERIES][KEYS], results [QUERIES][D], sums of exponentials [QUERIES][LANES]
struct scratch {
    size_t keys, values, queries, scores, result, sums, size;
    int64_t padded;  // n_kv, a whole number of panels
};

static struct scratch scratch_of(int64_t d, int64_t n_kv) {
    struct scratch s = {.padded = ceil_div(n_kv, PANEL) * PANEL};
    s.keys = 0;
    s.values = s.keys + (size_t) (s.padded * d);
    s.queries = s.values + (size_t) (s.padded * d);
    s.scores = s.queries + (size_t) (QUERIES * d);
    s.result = s.scores + QUERIES * KEYS;
    s.sums = s.result + (size_t) (QUERIES * d);
    s.size = s.sums + QUERIES * LANES;
    return s;
}

static const float * row(const struct ggml_tensor * t, int64_t head, int64_t i) {
    return (const float *) ((const char *) t->data + head * t->nb[1] + i * t->nb[2]);
}

static void lay_out_keys(const struct ggml_tensor * k, int64_t head, float * out, int64_t padded) {
    const int64_t d = k->ne[0], n = k->ne[2];
    for (int64_t p = 0; p < padded; p += PANEL, out += d * PANEL)
        for (int64_t j0 = 0; j0 < d; j0 += 16)  // a cache line of each row at a time
            for (int i = 0; i < PANEL; i++) {
                if (p + i < n) {
                    const float * in = row(k, head, p + i) + j0;
                    for (int j = 0; j < 16; j++) out[(j0 + j) * PANEL + i] = in[j];
                } else {
                    for (int j = 0; j < 16; j++) out[(j0 + j) * PANEL + i] = 0;
                }
            }
}

static void lay_out_values(const struct ggml_tensor * v, int64_t head, float * out) {
    const int64_t d = v->ne[0], n = v->ne[2];
    for (int64_t i = 0; i < n; i++) {
        const float * in = row(v, head, i);
        for (int64_t j = 0; j < d; j += PANEL) memcpy(out + j * n + i * PANEL, in + j, PANEL * sizeof(float));
    }
}

static void lay_out_queries(const struct ggml_tensor * q, int64_t head, int64_t first, int64_t n, float scale, float * out) {
    const int64_t d = q->ne[0];
    for (int64_t i = 0; i < ceil_div(n, ROWS) * ROWS; i++) {
        const float * in = row(q, head, first + (i < n ? i : 0));
        float * to = out + i / ROWS * ROWS * d + i % ROWS;
        for (int64_t j = 0; j < d; j++) to[j * ROWS] = in[j] * scale;
    }
}

// m[ROWS][PANEL] = keep[ROWS] m + sum over k of u[k][ROWS] v[k][PANEL]; element (k, r) of u is at k * u_k + r * u_r; no
// `keep` is 0
static inline __attribute__((always_inline)) void multiply_rows(int64_t n_k, const float * restrict u, size_t u_k, size_t u_r,
                                                                const float * restrict v, const float * keep,
                                                                float * restrict m, size_t stride) {
    vf acc[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        acc[r][0] = keep ? load(m + r * stride) * keep[r] : (vf){0};
        acc[r][1] = keep ? load(m + r * stride + LANES) * keep[r] : (vf){0};
    }
    for (int64_t k = 0; k < n_k; k++, u += u_k, v += PANEL) {
        const vf v0 = load(v), v1 = load(v + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            acc[r][0] += u[r * u_r] * v0;
            acc[r][1] += u[r * u_r] * v1;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        store(m + r * stride, acc[r][0]);
        store(m + r * stride + LANES, acc[r][1]);
    }
}

// x[n] -> exp(x - top), of the largest score so far, which is added up in `sums`; returns what earlier sums and results
// are multiplied with. NaN stays NaN.
static float go_on(float * x, int64_t n, float * top, float * sums) {
    for (int64_t i = n; i % LANES; i++) x[i] = -INFINITY;
    vf max = load(x);
    for (int64_t i = LANES; i < n; i += LANES) {
        const vf y = load(x + i);
        max = choose(max > y, max, y);
    }
    const float before = *top;
    float now = before;
    for (int i = 0; i < LANES; i++) now = max[i] > now ? max[i] : now;
    const float keep = before == now ? 1 : expf(before - now);
    vf sum = load(sums) * keep;
    for (int64_t i = 0; i < n; i += LANES) {
        const vf y = load(x + i) - now, e = choose(y < -87.0f, (vf){0}, exponential(y));  // NaN is in neither range
        store(x + i, e);
        sum += e;
    }
    store(sums, sum);
    *top = now;
    return keep;
}

static void prepare(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) nth, (void) userdata;
    if (ith == 0) atomic_store((atomic_llong *) dst->data, 0);
}

// src: q, k, v, scratch
static void compute_attention(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const struct ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * room = dst->src[3];
    float scale;
    memcpy(&scale, &userdata, sizeof scale);
    const int64_t d = q->ne[0], n_heads = q->ne[1], n_q = q->ne[2], n_kv = k->ne[2];
    // Whole heads, unless there are too few: keys and values are laid out for each item.
    const int64_t n_blocks = ceil_div(n_q, QUERIES), wanted = ceil_div(ITEMS * (int64_t) nth, n_heads);
    const int64_t blocks = ceil_div(n_blocks, wanted), per_head = ceil_div(n_blocks, blocks);
    const struct scratch s = scratch_of(d, n_kv);
    float * base = (float *) (((uintptr_t) room->data + HEADER + 63) & ~(uintptr_t) 63) + (size_t) ith * s.size;
    if ((char *) (base + s.size) > (char *) room->data + ggml_nbytes(room)) return;
    float * keys = base + s.keys, * values = base + s.values, * queries = base + s.queries, * scores = base + s.scores;
    float * result = base + s.result, * sums = base + s.sums, top[QUERIES], keep[QUERIES];

    int64_t laid_out = -1;
    for (;;) {
        const int64_t item = atomic_fetch_add((atomic_llong *) room->data, 1);
        if (item >= n_heads * per_head) break;
        const int64_t head = item / per_head, kv_head = head / (n_heads / k->ne[1]);
        if (kv_head != laid_out) {
            lay_out_keys(k, kv_head, keys, s.padded);
            lay_out_values(v, kv_head, values);
            laid_out = kv_head;
        }
        const int64_t begin = item % per_head * blocks * QUERIES, end = begin + blocks * QUERIES;
        for (int64_t first = begin; first < end && first < n_q; first += QUERIES) {
            const int64_t n = n_q - first < QUERIES ? n_q - first : QUERIES, tiles = ceil_div(n, ROWS);
            lay_out_queries(q, head, first, n, scale, queries);
            memset(result, 0, (size_t) (tiles * ROWS * d) * sizeof(float));
            memset(sums, 0, (size_t) (tiles * ROWS * LANES) * sizeof(float));
            for (int64_t r = 0; r < tiles * ROWS; r++) top[r] = -INFINITY;
            for (int64_t at = 0; at < n_kv; at += KEYS) {
                const int64_t n_keys = n_kv - at < KEYS ? n_kv - at : KEYS;
                for (int64_t p = 0; p < n_keys; p += PANEL)
                    for (int64_t t = 0; t < tiles; t++)
                        multiply_rows(d, queries + t * ROWS * d, ROWS, 1, keys + (at + p) * d, NULL,
                                      scores + t * ROWS * KEYS + p, KEYS);
                for (int64_t r = 0; r < tiles * ROWS; r++)
                    keep[r] = go_on(scores + r * KEYS, n_keys, top + r, sums + r * LANES);
                for (int64_t j = 0; j < d; j += PANEL)
                    for (int64_t t = 0; t < tiles; t++)
                        multiply_rows(n_keys, scores + t * ROWS * KEYS, 1, KEYS, values + j * n_kv + at * PANEL,
                                      keep + t * ROWS, result + t * ROWS * d + j, (size_t) d);
            }
            for (int64_t i = 0; i < n; i++) {
                double sum = 0;
                for (int l = 0; l < LANES; l++) sum += sums[i * LANES + l];
                const float inverse = (float) (1 / sum);
                float * out = (float *) dst->data + ((first + i) * n_heads + head) * d;
                for (int64_t j = 0; j < d; j++) out[j] = result[i * d + j] * inverse;
            }
        }
    }
}

struct ggml_tensor * pyggml_attention(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                      struct ggml_tensor * v, float scale, int n_threads) {
    const size_t threads = n_threads < 1 ? 1 : (size_t) n_threads;
    const size_t bytes = HEADER + 64 + threads * scratch_of(q->ne[0], k->ne[2]).size * sizeof(float);
    struct ggml_tensor * room = ggml_custom_4d(ctx, GGML_TYPE_I8, (int64_t) bytes, 1, 1, 1, &q, 1, prepare, 1, NULL);
    struct ggml_tensor * args[4] = {q, k, v, room};
    void * userdata = NULL;
    memcpy(&userdata, &scale, sizeof scale);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0], q->ne[1], q->ne[2], 1, args, 4, compute_attention, GGML_N_TASKS_MAX,
                          userdata);
}
