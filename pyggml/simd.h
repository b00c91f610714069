// Vectors of f32 for our own operations, in GNU C that every compiler but Microsoft's takes, and the product of two small
// panels that convolution is made of; attention has one of its own, which goes on from what is there, with more rows.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif !defined(LANES)  // tests set it to run the other width
#define LANES 8
#endif

enum {
    MR = 6,             // rows of a register block
    PANEL = 2 * LANES,  // columns of a register block
};

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

static inline vf load(const float * p) { vf v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float * p, vf v) { memcpy(p, &v, sizeof v); }

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// m[6][PANEL] = sum over k of u[k][6] v[k][PANEL]; element (k, r) of u is at k * u_k + r * u_r
static inline void multiply(int64_t n_k, const float * restrict u, size_t u_k, size_t u_r, const float * restrict v,
                            float * restrict m, size_t stride) {
    vf acc[MR][2] = {{{0}}};
    for (int64_t k = 0; k < n_k; k++, u += u_k, v += PANEL) {
        const vf v0 = load(v), v1 = load(v + LANES);
        for (int r = 0; r < MR; r++) {
            acc[r][0] += u[r * u_r] * v0;
            acc[r][1] += u[r * u_r] * v1;
        }
    }
    for (int r = 0; r < MR; r++) {
        store(m + r * stride, acc[r][0]);
        store(m + r * stride + LANES, acc[r][1]);
    }
}

static inline vf choose(vi mask, vf yes, vf no) { return (vf) ((mask & (vi) yes) | (~mask & (vi) no)); }

// exp in f32, relative error below 2e-7 (Cephes' polynomial)
static inline vf exponential(vf x) {
    x = choose(x < -87.0f, (vf){0} - 87.0f, choose(x > 88.0f, (vf){0} + 88.0f, x));
    const vf shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf) ((__builtin_convertvector(n, vi) + 127) << 23);
}
