// y += up h in place, for a product over few numbers, as a custom operation of ggml.
//
//   pyggml_add_low_rank(ctx, y, up, h, at) -> y, of which rows at..at+n_out have up h added
//     y    f32 [n_y, n_tokens], contiguous
//     up   f32 [r, n_out], contiguous, at + n_out <= n_y
//     h    f32 [r, n_tokens], contiguous
//
// A LoRA's second factor has 4 to 64 columns. ggml's product sums each of its dot products across the lanes of a vector,
// which at that length costs more than the products, and writes what is then added in a second pass. Here lanes are rows of
// up, laid out once for all tokens, and y is read and written once.

#include "low_rank.h"

#include "ggml.h"
#include "simd.h"

enum {
    ROWS = 256,  // of up, laid out at a time: with DEPTH, half of a first-level cache
    DEPTH = 16,
    GROUP = 4 * LANES,
};

static void compute_low_rank(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const struct ggml_tensor * up = dst->src[1], * h = dst->src[2];
    const int64_t rank = up->ne[0], n_out = up->ne[1], n_tokens = h->ne[1], n_y = dst->ne[0], at = (intptr_t) userdata;
    const float * factors = up->data;
    float laid[DEPTH][ROWS];

    for (int64_t row = (int64_t) ith * ROWS; row < n_out; row += (int64_t) nth * ROWS) {
        const int64_t n = n_out - row < ROWS ? n_out - row : ROWS;
        for (int64_t k0 = 0; k0 < rank; k0 += DEPTH) {
            const int depth = (int) (rank - k0 < DEPTH ? rank - k0 : DEPTH);
            for (int64_t i = 0; i < n; i++)
                for (int k = 0; k < depth; k++) laid[k][i] = factors[(row + i) * rank + k0 + k];
            for (int64_t token = 0; token < n_tokens; token++) {
                const float * x = (const float *) h->data + token * rank + k0;
                float * y = (float *) dst->data + token * n_y + at + row;
                int64_t i = 0;
                for (; i + GROUP <= n; i += GROUP) {
                    vf a = load(y + i), b = load(y + i + LANES), c = load(y + i + 2 * LANES), d = load(y + i + 3 * LANES);
                    for (int k = 0; k < depth; k++) {
                        const float * f = &laid[k][i];
                        a += x[k] * load(f);
                        b += x[k] * load(f + LANES);
                        c += x[k] * load(f + 2 * LANES);
                        d += x[k] * load(f + 3 * LANES);
                    }
                    store(y + i, a);
                    store(y + i + LANES, b);
                    store(y + i + 2 * LANES, c);
                    store(y + i + 3 * LANES, d);
                }
                for (; i < n; i++) {
                    float sum = y[i];
                    for (int k = 0; k < depth; k++) sum += x[k] * laid[k][i];
                    y[i] = sum;
                }
            }
        }
    }
}

struct ggml_tensor * pyggml_add_low_rank(struct ggml_context * ctx, struct ggml_tensor * y, struct ggml_tensor * up,
                                         struct ggml_tensor * h, int64_t at) {
    struct ggml_tensor * args[2] = {up, h};
    return ggml_custom_inplace(ctx, y, args, 2, compute_low_rank, GGML_N_TASKS_MAX, (void *) (intptr_t) at);
}
