// GELU by its tanh formula in f32, after the bias of the layer before it, as a custom operation of ggml.
//
//   pyggml_gelu(ctx, x, bias) -> y     x, y f32 [N, ...], contiguous; bias f32 [N] or NULL
//
// ggml's own rounds its argument and its result to f16: errors of 5e-4.

#include "gelu.h"

#include "ggml.h"
#include "simd.h"

static inline vf gelu(vf v) {
    // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
    const vf u = v * (0.7978845608f + 0.0356774081f * v * v);
    return v / (1.0f + exponential(-2.0f * u));
}

static void compute_gelu(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const struct ggml_tensor * x = dst->src[0];
    const float * bias = userdata ? dst->src[1]->data : NULL;
    const int64_t n = x->ne[0], rows = ggml_nrows(x);
    for (int64_t r = rows * ith / nth; r < rows * (ith + 1) / nth; r++) {
        const float * in = (const float *) x->data + r * n;
        float * out = (float *) dst->data + r * n;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) store(out + i, gelu(bias ? load(in + i) + load(bias + i) : load(in + i)));
        if (i < n) {
            const size_t bytes = (size_t) (n - i) * sizeof(float);
            vf v = {0}, b = {0};
            memcpy(&v, in + i, bytes);
            if (bias) memcpy(&b, bias + i, bytes);
            v = gelu(v + b);
            memcpy(out + i, &v, bytes);
        }
    }
}

struct ggml_tensor * pyggml_gelu(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * bias) {
    struct ggml_tensor * args[2] = {x, bias};
    return ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], x->ne[2], x->ne[3], args, bias ? 2 : 1, compute_gelu,
                          GGML_N_TASKS_MAX, (void *) (intptr_t) (bias != NULL));
}
