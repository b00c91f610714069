// Attention without a mask in f32, as a custom operation of ggml.
//
//   pyggml_attention(ctx, q, k, v, scale, n_threads) -> y = softmax(scale q k^T) v for each head
//     q     f32 [D, n_heads, n_q], D a multiple of 32
//     k, v  f32 [D, n_kv_heads, n_kv], n_heads a multiple of n_kv_heads: consecutive heads share one
//     y     f32 [D, n_heads, n_q]
// q, k and v may be views with any strides beyond the first dimension. Callers check shapes; n_threads bounds the threads
// that take part, because each has scratch space in the graph.
//
// ggml's flash attention keeps 64x64 scores; here a thread lays out the keys and values of a head once, and takes six
// queries against all of them: the scores of six queries fit a cache at any length that pictures have, so the softmax is
// the plain one. Nothing is rounded to f16.

#include "attention.h"

#include "ggml.h"
#include "simd.h"

#include <math.h>
#include <stdatomic.h>

enum {
    HEADER = 64,
    QUERIES = 16 * MR,  // of a work item
};

// floats: keys [panel of kv][D][PANEL], values [panel of D][kv][PANEL], a tile of queries [D][6], scores [6][kv], result
struct scratch {
    size_t keys, values, queries, scores, result, size;
    int64_t padded;  // n_kv, a whole number of panels
};

static struct scratch scratch_of(int64_t d, int64_t n_kv) {
    struct scratch s = {.padded = ceil_div(n_kv, PANEL) * PANEL};
    s.keys = 0;
    s.values = s.keys + (size_t) (s.padded * d);
    s.queries = s.values + (size_t) (s.padded * d);
    s.scores = s.queries + (size_t) (MR * d);
    s.result = s.scores + (size_t) (MR * (s.padded + LANES));
    s.size = s.result + (size_t) (MR * d);
    s.size = (s.size + 15) / 16 * 16;
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

// x[n] -> exp(x - max); returns 1 / sum. NaN stays NaN.
static float softmax(float * x, int64_t n) {
    for (int64_t i = n; i % LANES; i++) x[i] = -INFINITY;
    vf max = load(x);
    for (int64_t i = LANES; i < n; i += LANES) {
        const vf y = load(x + i);
        max = choose(max > y, max, y);
    }
    float top = max[0];
    for (int i = 1; i < LANES; i++) top = max[i] > top ? max[i] : top;
    vf sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        const vf y = load(x + i) - top, e = choose(y < -87.0f, (vf){0}, exponential(y));  // NaN is in neither range
        store(x + i, e);
        sum += e;
    }
    double total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return (float) (1 / total);
}

static void prepare(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) nth, (void) userdata;
    if (ith == 0) atomic_store((atomic_llong *) dst->data, 0);
}

// src: q, k, v, scratch
static void compute_attention(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) nth;
    const struct ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * room = dst->src[3];
    float scale;
    memcpy(&scale, &userdata, sizeof scale);
    const int64_t d = q->ne[0], n_heads = q->ne[1], n_q = q->ne[2], n_kv = k->ne[2], per_item = ceil_div(n_q, QUERIES);
    const struct scratch s = scratch_of(d, n_kv);
    float * base = (float *) (((uintptr_t) room->data + HEADER + 63) & ~(uintptr_t) 63) + (size_t) ith * s.size;
    if ((char *) (base + s.size) > (char *) room->data + ggml_nbytes(room)) return;
    float * keys = base + s.keys, * values = base + s.values, * queries = base + s.queries, * scores = base + s.scores;
    float * result = base + s.result;
    const size_t stride = (size_t) s.padded + LANES;

    int64_t laid_out = -1;
    for (;;) {
        const int64_t item = atomic_fetch_add((atomic_llong *) room->data, 1);
        if (item >= n_heads * per_item) break;
        const int64_t head = item / per_item, kv_head = head / (n_heads / k->ne[1]);
        if (kv_head != laid_out) {
            lay_out_keys(k, kv_head, keys, s.padded);
            lay_out_values(v, kv_head, values);
            laid_out = kv_head;
        }
        const int64_t q0 = item % per_item * QUERIES, q1 = q0 + QUERIES < n_q ? q0 + QUERIES : n_q;
        for (int64_t tile = q0; tile < q1; tile += MR) {
            const int n = (int) (q1 - tile < MR ? q1 - tile : MR);
            for (int r = 0; r < MR; r++) {
                const float * in = row(q, head, tile + (r < n ? r : 0));
                for (int64_t j = 0; j < d; j++) queries[j * MR + r] = in[j] * scale;
            }
            for (int64_t p = 0; p < s.padded; p += PANEL) multiply(d, queries, MR, 1, keys + p * d, scores + p, stride);
            float inverse[MR];
            for (int r = 0; r < MR; r++) inverse[r] = softmax(scores + (size_t) r * stride, n_kv);
            for (int64_t j = 0; j < d; j += PANEL) multiply(n_kv, scores, 1, stride, values + j * n_kv, result + j, d);
            for (int r = 0; r < n; r++) {
                float * out = (float *) dst->data + ((tile + r) * n_heads + head) * d;
                for (int64_t j = 0; j < d; j++) out[j] = result[r * d + j] * inverse[r];
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
