// Which of the kernels' levels this processor gets; see levels.h. PYGGML_CPU_LEVEL=baseline or avx2 asks for a lower one, to
// test it or to compare.

#include "levels.h"

typedef int nothing;  // C wants a file to hold something, also in a native build

#ifdef PYGGML_LEVELS

#include "attention.h"
#include "conv.h"
#include "gelu.h"
#include "gemm.h"
#include "low_rank.h"

#include <stdlib.h>
#include <string.h>

#define KERNELS(K, level)                                                                                       \
    K(add_low_rank, level) K(attention, level) K(channel_norm, level) K(conv2d_3x3, level) K(gelu, level)       \
    K(group_norm, level) K(mul_mat, level) K(mul_mat_fits, level)
#define FIELD(name, level) __typeof__(pyggml_##name) * name;
#define DECLARATION(name, level) extern __typeof__(pyggml_##name) pyggml_##name##_##level;
#define VALUE(name, level) pyggml_##name##_##level,

struct kernels {
    KERNELS(FIELD, )
};

#define LEVEL(level) KERNELS(DECLARATION, level) static const struct kernels level = {KERNELS(VALUE, level)};

LEVEL(baseline)
LEVEL(avx2)
LEVEL(avx512)

static const struct kernels * pick(void) {
    const char * asked = getenv("PYGGML_CPU_LEVEL");
    if (!asked) asked = "";
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
    if (!has_avx2 || !strcmp(asked, "baseline")) return &baseline;
    if (!has_avx512 || !strcmp(asked, "avx2")) return &avx2;
    return &avx512;
}

static const struct kernels * best(void) {
    static const struct kernels * found;  // threads that race find the same
    return found ? found : (found = pick());
}

struct ggml_tensor * pyggml_add_low_rank(struct ggml_context * ctx, struct ggml_tensor * y, struct ggml_tensor * up,
                                         struct ggml_tensor * h, int64_t at) {
    return best()->add_low_rank(ctx, y, up, h, at);
}

struct ggml_tensor * pyggml_attention(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                      struct ggml_tensor * v, float scale, int n_threads) {
    return best()->attention(ctx, q, k, v, scale, n_threads);
}

struct ggml_tensor * pyggml_channel_norm(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * gamma,
                                         float eps, bool silu) {
    return best()->channel_norm(ctx, x, gamma, eps, silu);
}

struct ggml_tensor * pyggml_gelu(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * bias) {
    return best()->gelu(ctx, x, bias);
}

struct ggml_tensor * pyggml_conv2d_3x3(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * w,
                                       struct ggml_tensor * bias, struct ggml_tensor * residual, int n_threads) {
    return best()->conv2d_3x3(ctx, x, w, bias, residual, n_threads);
}

struct ggml_tensor * pyggml_group_norm(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * weight,
                                       struct ggml_tensor * bias, int n_groups, float eps, bool silu) {
    return best()->group_norm(ctx, x, weight, bias, n_groups, eps, silu);
}

struct ggml_tensor * pyggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * w, struct ggml_tensor * x) {
    return best()->mul_mat(ctx, w, x);
}

bool pyggml_mul_mat_fits(const struct ggml_tensor * w, const struct ggml_tensor * x) { return best()->mul_mat_fits(w, x); }

#endif
