// 3x3 convolution by Winograd's F(4x4, 3x3) and group norm with SiLU, as custom operations of ggml.
//
// Why not ggml's own: im2col writes nine copies of the picture (4.5 GB at 1024x1024 in the decoder's last stage) and its
// matrix product does four times the multiplications needed here.
//
//   pyggml_conv2d_3x3(ctx, x, w, bias, residual, n_threads) -> y      padding 1, stride 1
//     x         f32 [W, H, IC, N], contiguous
//     w         f32, f16 or bf16 [3, 3, IC, OC], as in the checkpoint; the 3x3 of two channels contiguous, any strides
//               between them: a view of one time step of a 3-D kernel will do
//     bias      f32 [OC] or NULL
//     residual  f32 [W, H, OC, N], contiguous, added to the result, or NULL
//     y         f32 [W, H, OC, N]
//   pyggml_group_norm(ctx, x, weight, bias, n_groups, eps, silu) -> y  like x [W, H, C, N]; weight, bias f32 [C]
//   pyggml_channel_norm(ctx, x, gamma, eps, silu) -> y  gamma x / sqrt(mean of x^2 over channels + eps); gamma f32 [C]
//
// All only build nodes, check nothing beyond asserts (callers check shapes), and must be computed by the CPU backend.
// n_threads bounds the threads that take part in a convolution, because each has its scratch space in the graph.
//
// A convolution is two nodes: the transformed weights (36 / 9 of the weights in f32, made anew in each run because that
// costs 2 % of the time and keeping them for a whole decoder would cost 800 MB), with the scratch of the threads behind
// them, and the convolution. The transform uses the points 0, +-5/8, +-5/4, infinity: against f64, with 512 channels of
// random data, the error is 2e-6 (rms) of the output; 4e-6 with the usual 0, +-1, +-2; 1.2e-6 for a plain f32 sum.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; the points after Barabasz et al., 2018.

#include "conv.h"

#include "ggml.h"
#include "simd.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t i8 __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

enum {
    FREQ = 36,            // points of a transformed 6x6 tile
    GROUP = 8,            // tiles that are transformed together: 8 neighbours in a row, 32 pixels
    BLOCK = 64,           // tiles of a block of work, at most
    OC_PANELS = 8,        // register blocks of channels between two output transforms
    HEADER = 64,          // bytes in front of the transformed weights: the counter of work items
    PAD = 16,             // floats that keep the 36 planes of a block off the same cache sets
};

typedef float v8 __attribute__((vector_size(32)));

static inline v8 load8(const float * p) { v8 v; memcpy(&v, p, sizeof v); return v; }
static inline void store8(float * p, v8 v) { memcpy(p, &v, sizeof v); }

// ---- the transform matrices --------------------------------------------------------------------------------------

#define P1 0.625f
#define P2 1.25f
#define P1_2 (P1 * P1)
#define P2_2 (P2 * P2)

// six samples of the input -> six points
static inline void transform_in(v8 o[6], v8 d0, v8 d1, v8 d2, v8 d3, v8 d4, v8 d5) {
    const v8 a = d4 - P2_2 * d2, b = P1 * (d3 - P2_2 * d1);
    const v8 c = d4 - P1_2 * d2, e = P2 * (d3 - P1_2 * d1);
    o[0] = P1_2 * P2_2 * d0 - (P1_2 + P2_2) * d2 + d4;
    o[1] = a + b;
    o[2] = a - b;
    o[3] = c + e;
    o[4] = c - e;
    o[5] = P1_2 * P2_2 * d1 - (P1_2 + P2_2) * d3 + d5;
}

// six points -> four samples of the output
static inline void transform_out(v8 o[4], const v8 m[6]) {
    const v8 a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    o[0] = m[0] + a + c;
    o[1] = P1 * b + P2 * d;
    o[2] = P1_2 * a + P2_2 * c;
    o[3] = P1 * P1_2 * b + P2 * P2_2 * d + m[5];
}

// three taps of the kernel -> six points; in f64 because the scales are no powers of two
static inline void transform_kernel(double o[6], double g0, double g1, double g2) {
    const double p1 = P1, p2 = P2, q1 = p1 * p1, q2 = p2 * p2;
    const double n0 = 1 / (q1 * q2), n1 = 1 / (2 * q1 * (q1 - q2)), n2 = 1 / (2 * q2 * (q2 - q1));
    o[0] = g0 * n0;
    o[1] = (g0 + p1 * g1 + q1 * g2) * n1;
    o[2] = (g0 - p1 * g1 + q1 * g2) * n1;
    o[3] = (g0 + p2 * g1 + q2 * g2) * n2;
    o[4] = (g0 - p2 * g1 + q2 * g2) * n2;
    o[5] = g2;
}

// in each half of the vectors: rows to columns of a 4x4 matrix
static inline void transpose4(v8 o[4], v8 r0, v8 r1, v8 r2, v8 r3) {
    const v8 a = SHUFFLE(r0, r1, 0, 8, 1, 9, 4, 12, 5, 13), b = SHUFFLE(r0, r1, 2, 10, 3, 11, 6, 14, 7, 15);
    const v8 c = SHUFFLE(r2, r3, 0, 8, 1, 9, 4, 12, 5, 13), d = SHUFFLE(r2, r3, 2, 10, 3, 11, 6, 14, 7, 15);
    o[0] = SHUFFLE(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
    o[1] = SHUFFLE(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
    o[2] = SHUFFLE(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
    o[3] = SHUFFLE(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}

#define LOW_HALVES(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH_HALVES(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)

// ---- sizes -------------------------------------------------------------------------------------------------------

static size_t weight_floats(int64_t ic, int64_t oc) { return (size_t) ceil_div(oc, MR) * MR * FREQ * (size_t) ic; }
static size_t plane_in(int64_t ic, int tiles) { return (size_t) ic * tiles + PAD; }
static size_t plane_out(int tiles) { return (size_t) MR * OC_PANELS * tiles + PAD; }
static size_t scratch_floats(int64_t ic) { return FREQ * (plane_in(ic, BLOCK) + plane_out(BLOCK)); }

// ---- weights -----------------------------------------------------------------------------------------------------

// src[0]: w [3, 3, IC, OC]. dst: header, then [panel of 6 output channels][point][input channel][6], then scratch.
static void compute_weights(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    enum { CHUNK = 32 };
    const struct ggml_tensor * w = dst->src[0];
    const int64_t ic = w->ne[2], oc = w->ne[3];
    const ggml_to_float_t to_float = ggml_get_type_traits(w->type)->to_float;
    if (ith == 0) atomic_store((atomic_llong *) dst->data, 0);
    float * u = (float *) ((char *) dst->data + HEADER);

    for (int64_t panel = ith; panel < ceil_div(oc, MR); panel += nth) {
        float * up = u + panel * FREQ * ic * MR;
        for (int64_t c0 = 0; c0 < ic; c0 += CHUNK) {
            const int n = (int) (ic - c0 < CHUNK ? ic - c0 : CHUNK);
            float out[CHUNK * MR][FREQ];
            for (int r = 0; r < MR; r++) {
                const int64_t o = panel * MR + r;
                float taps[CHUNK * 9] = {0};
                if (o < oc) {
                    const char * src = (const char *) w->data + o * w->nb[3] + c0 * w->nb[2];
                    const bool dense = w->nb[2] == 9 * w->nb[0];
                    for (int c = 0; c < n; c += dense ? n : 1) {
                        const int64_t run = dense ? 9 * n : 9;
                        if (w->type == GGML_TYPE_F32) memcpy(taps + 9 * c, src + c * w->nb[2], sizeof(float) * run);
                        else to_float(src + c * w->nb[2], taps + 9 * c, run);
                    }
                }
                for (int c = 0; c < n; c++) {
                    const float * g = taps + 9 * c;
                    double rows[6][3], t[6];
                    for (int j = 0; j < 3; j++) {
                        transform_kernel(t, g[j], g[3 + j], g[6 + j]);
                        for (int i = 0; i < 6; i++) rows[i][j] = t[i];
                    }
                    for (int i = 0; i < 6; i++) {
                        transform_kernel(t, rows[i][0], rows[i][1], rows[i][2]);
                        for (int j = 0; j < 6; j++) out[c * MR + r][6 * i + j] = (float) t[j];
                    }
                }
            }
            for (int f = 0; f < FREQ; f++)
                for (int k = 0; k < n * MR; k++) up[(f * ic + c0) * MR + k] = out[k][f];
        }
    }
}

// ---- the convolution ---------------------------------------------------------------------------------------------

// One channel of GROUP neighbouring tiles: 6 rows of 34 pixels from (x0 - 1, y0 - 1) -> 36 points, GROUP floats each.
static void transform_group(const float * plane, int64_t w, int64_t h, int64_t x0, int64_t y0, float * out, size_t stride) {
    float edge[40];
    v8 rows[6][6];
    const bool inside = x0 > 0 && x0 + 35 <= w;
    for (int i = 0; i < 6; i++) {
        const int64_t y = y0 - 1 + i;
        const float * s = plane + y * w + x0 - 1;
        if (y < 0 || y >= h) {
            memset(rows[i], 0, sizeof rows[i]);
            continue;
        }
        if (!inside) {
            const int64_t skip = x0 == 0, end = w - (x0 - 1) < 34 ? w - (x0 - 1) : 34;
            memset(edge, 0, sizeof edge);
            memcpy(edge + skip, s + skip, (size_t) (end - skip) * sizeof(float));
            s = edge;
        }
        v8 r[4], d[4];
        for (int k = 0; k < 4; k++) r[k] = LOW_HALVES(load8(s + 4 * k), load8(s + 16 + 4 * k));
        transpose4(d, r[0], r[1], r[2], r[3]);
        const v8 s32 = (v8){0} + s[32], s33 = (v8){0} + s[33];
        const v8 d4 = SHUFFLE(d[0], s32, 1, 2, 3, 4, 5, 6, 7, 8), d5 = SHUFFLE(d[1], s33, 1, 2, 3, 4, 5, 6, 7, 8);
        transform_in(rows[i], d[0], d[1], d[2], d[3], d4, d5);
    }
    for (int j = 0; j < 6; j++) {
        v8 o[6];
        transform_in(o, rows[0][j], rows[1][j], rows[2][j], rows[3][j], rows[4][j], rows[5][j]);
        for (int i = 0; i < 6; i++) store8(out + (6 * i + j) * stride, o[i]);
    }
}

// 36 points of GROUP tiles -> 4 rows of 32 pixels, with bias and residual, cut to the picture
static void restore_group(const float * m, size_t stride, float bias, const float * res, float * plane, int64_t w, int64_t h,
                          int64_t x0, int64_t y0) {
    v8 cols[6][4], rows[4][6];
    for (int j = 0; j < 6; j++) {
        v8 in[6];
        for (int i = 0; i < 6; i++) in[i] = load8(m + (6 * i + j) * stride);
        transform_out(cols[j], in);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 6; j++) rows[i][j] = cols[j][i];
    const int64_t n = w - x0 < 32 ? w - x0 : 32;
    for (int i = 0; i < 4 && y0 + i < h; i++) {
        const int64_t at = (y0 + i) * w + x0;
        float edge[32];
        float * out = n == 32 ? plane + at : edge;
        v8 y[4], r[4];
        transform_out(y, rows[i]);
        transpose4(r, y[0] + bias, y[1] + bias, y[2] + bias, y[3] + bias);
        v8 q[4] = {LOW_HALVES(r[0], r[1]), LOW_HALVES(r[2], r[3]), HIGH_HALVES(r[0], r[1]), HIGH_HALVES(r[2], r[3])};
        if (res && n == 32)
            for (int k = 0; k < 4; k++) q[k] += load8(res + at + 8 * k);
        for (int k = 0; k < 4; k++) store8(out + 8 * k, q[k]);
        if (n < 32)
            for (int k = 0; k < n; k++) plane[at + k] = edge[k] + (res ? res[at + k] : 0.0f);
    }
}

// src: x, transformed weights, then bias and residual as far as userdata says (bit 0, bit 1) that they are there
static void compute_conv(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    const intptr_t has = (intptr_t) userdata;
    const struct ggml_tensor * x = dst->src[0], * u = dst->src[1];
    const float * bias = has & 1 ? dst->src[2]->data : NULL, * residual = has & 2 ? dst->src[has & 1 ? 3 : 2]->data : NULL;
    const int64_t w = x->ne[0], h = x->ne[1], ic = x->ne[2], oc = dst->ne[2], plane = w * h;
    const float * weights = (const float *) ((const char *) u->data + HEADER);
    float * scratch = (float *) ((char *) u->data + HEADER) + weight_floats(ic, oc);
    scratch = (float *) (((uintptr_t) scratch + 63) & ~(uintptr_t) 63);
    const int64_t room = (int64_t) ((const char *) u->data + ggml_nbytes(u) - (const char *) scratch) / 4 / (int64_t) scratch_floats(ic);
    if (ith >= room) return;
    const int64_t workers = nth < room ? nth : room;
    float * v = scratch + (size_t) ith * scratch_floats(ic);

    const int64_t gx = ceil_div(w, 4 * GROUP), gy = ceil_div(h, 4), groups = gx * gy * x->ne[3];
    int tiles = BLOCK;
    while (tiles > PANEL && ceil_div(groups * GROUP, tiles) < workers) tiles /= 2;
    const int per_block = tiles / GROUP;
    const int64_t blocks = ceil_div(groups, per_block), panels = ceil_div(oc, MR);
    int64_t splits = 1;  // of the output channels: a few items for each thread, whatever their speed
    while (blocks * splits < 3 * workers && splits * OC_PANELS < panels) splits++;
    const size_t in_stride = plane_in(ic, tiles), out_stride = plane_out(tiles);
    float * m = v + FREQ * in_stride;

    for (;;) {
        const int64_t item = atomic_fetch_add((atomic_llong *) u->data, 1);
        if (item >= blocks * splits) break;
        const int64_t g0 = item / splits * per_block, split = item % splits;
        const int n = (int) (groups - g0 < per_block ? groups - g0 : per_block);
        for (int g = 0; g < per_block; g++) {
            const int64_t index = g0 + (g < n ? g : n - 1);
            const int64_t ix = index % gx, iy = index / gx % gy, in = index / gx / gy;
            const int lane = g * GROUP % PANEL;
            float * out = v + (size_t) (g * GROUP / PANEL) * ic * PANEL + lane;
            for (int64_t c = 0; c < ic; c++)
                transform_group((const float *) x->data + (in * ic + c) * plane, w, h, ix * 4 * GROUP, iy * 4,
                                out + c * PANEL, in_stride);
        }
        const int64_t end = panels * (split + 1) / splits;
        for (int64_t p0 = panels * split / splits; p0 < end; p0 += OC_PANELS) {
            const int64_t p1 = p0 + OC_PANELS < end ? p0 + OC_PANELS : end;
            for (int f = 0; f < FREQ; f++)
                for (int64_t p = p0; p < p1; p++)
                    for (int t = 0; t < n * GROUP; t += PANEL)
                        multiply(ic, weights + (size_t) (p * FREQ + f) * ic * MR, MR, 1,
                                 v + f * in_stride + (size_t) t * ic,
                                 m + f * out_stride + (size_t) (p - p0) * MR * tiles + t, tiles);
            for (int64_t o = p0 * MR; o < p1 * MR && o < oc; o++)
                for (int g = 0; g < n; g++) {
                    const int64_t index = g0 + g, ix = index % gx, iy = index / gx % gy, in = index / gx / gy;
                    const size_t at = (size_t) (in * oc + o) * plane;
                    restore_group(m + (size_t) (o - p0 * MR) * tiles + g * GROUP, out_stride, bias ? bias[o] : 0.0f,
                                  residual ? residual + at : NULL, (float *) dst->data + at, w, h, ix * 4 * GROUP, iy * 4);
                }
        }
    }
}

struct ggml_tensor * pyggml_conv2d_3x3(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * w,
                                       struct ggml_tensor * bias, struct ggml_tensor * residual, int n_threads) {
    const int64_t ic = w->ne[2], oc = w->ne[3];
    const int threads = n_threads < 1 ? 1 : n_threads;
    const size_t bytes = HEADER + 64 + 4 * (weight_floats(ic, oc) + (size_t) threads * scratch_floats(ic));
    struct ggml_tensor * u = ggml_custom_4d(ctx, GGML_TYPE_I8, (int64_t) bytes, 1, 1, 1, &w, 1, compute_weights,
                                            GGML_N_TASKS_MAX, NULL);
    struct ggml_tensor * args[4] = {x, u};
    int n = 2;
    if (bias) args[n++] = bias;
    if (residual) args[n++] = residual;
    const intptr_t has = (bias ? 1 : 0) | (residual ? 2 : 0);
    return ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], oc, x->ne[3], args, n, compute_conv, GGML_N_TASKS_MAX,
                          (void *) has);
}

// ---- group norm and SiLU -----------------------------------------------------------------------------------------

struct norm_params {
    int32_t n_groups;
    float eps;
    int32_t silu;
};

enum { NORM_PARAMS = 8 };  // index in op_params, behind those of the custom operation

static void compute_group_norm(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    const struct ggml_tensor * x = dst->src[0];
    const float * weight = dst->src[1]->data, * bias = dst->src[2]->data;
    struct norm_params params;
    memcpy(&params, dst->op_params + NORM_PARAMS, sizeof params);
    const int64_t plane = x->ne[0] * x->ne[1], channels = x->ne[2], per = channels / params.n_groups, n = plane * per;

    for (int64_t g = ith; g < params.n_groups * x->ne[3]; g += nth) {
        const float * in = (const float *) x->data + g * n;
        float * out = (float *) dst->data + g * n;
        // moments around the first element, which is as good as the mean against cancellation; short runs in f32
        const float origin = in[0];
        double sum = 0, sum2 = 0;
        for (int64_t i = 0; i < n;) {
            vf s = {0}, s2 = {0};
            const int64_t stop = n - i < 256 * LANES ? n : i + 256 * LANES;
            for (; i + LANES <= stop; i += LANES) {
                const vf d = load(in + i) - origin;
                s += d;
                s2 += d * d;
            }
            for (int k = 0; k < LANES; k++) sum += s[k], sum2 += s2[k];
            for (; i < stop; i++) sum += in[i] - origin, sum2 += (double) (in[i] - origin) * (in[i] - origin);
        }
        const double mean = sum / n, var = sum2 / n - mean * mean;
        const float scale = (float) (1.0 / sqrt((var > 0 ? var : 0) + params.eps)), centre = (float) (origin + mean);
        for (int64_t k = 0; k < per; k++) {
            const int64_t c = g % params.n_groups * per + k;
            const float a = scale * weight[c], b = bias[c];
            const float * s = in + k * plane;
            float * o = out + k * plane;
            for (int64_t i = 0; i < plane; i += LANES) {
                const int rest = (int) (plane - i < LANES ? plane - i : LANES);
                vf y = {0};
                if (rest == LANES) y = load(s + i);
                else memcpy(&y, s + i, (size_t) rest * sizeof(float));
                y = (y - centre) * a + b;
                if (params.silu) y = y / (1.0f + exponential(-y));
                memcpy(o + i, &y, (size_t) rest * sizeof(float));
            }
        }
    }
}

struct ggml_tensor * pyggml_group_norm(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * weight,
                                       struct ggml_tensor * bias, int n_groups, float eps, bool silu) {
    struct ggml_tensor * args[3] = {x, weight, bias};
    struct ggml_tensor * y = ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], x->ne[2], x->ne[3], args, 3,
                                            compute_group_norm, GGML_N_TASKS_MAX, NULL);
    const struct norm_params params = {n_groups, eps, silu};
    memcpy(y->op_params + NORM_PARAMS, &params, sizeof params);
    return y;
}

// ---- norm of each pixel's channels, and SiLU ---------------------------------------------------------------------

struct channel_norm_params {
    float eps;
    int32_t silu;
};

static void compute_channel_norm(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    enum { RUN = 64 };  // pixels at a time: whole cache lines of each channel, and all channels stay in the cache
    const struct ggml_tensor * x = dst->src[0];
    const float * gamma = dst->src[1]->data;
    struct channel_norm_params params;
    memcpy(&params, dst->op_params + NORM_PARAMS, sizeof params);
    const int64_t plane = x->ne[0] * x->ne[1], channels = x->ne[2], runs = ceil_div(plane, RUN), all = runs * x->ne[3];

    for (int64_t item = all * ith / nth; item < all * (ith + 1) / nth; item++) {
        const int64_t at = item / runs * channels * plane + item % runs * RUN;
        const int64_t left = plane - item % runs * RUN, n = left < RUN ? left : RUN;
        const float * in = (const float *) x->data + at;
        float * out = (float *) dst->data + at, scale[RUN] = {0};
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < n; i++) scale[i] += in[c * plane + i] * in[c * plane + i];
        for (int64_t i = 0; i < n; i++) scale[i] = 1.0f / sqrtf(scale[i] / (float) channels + params.eps);
        for (int64_t c = 0; c < channels; c++) {
            const float * s = in + c * plane;
            float * o = out + c * plane;
            for (int64_t i = 0; i < n; i += LANES) {
                const size_t bytes = (size_t) (n - i < LANES ? n - i : LANES) * sizeof(float);
                vf y = {0};
                memcpy(&y, s + i, bytes);
                y *= load(scale + i) * gamma[c];
                if (params.silu) y = y / (1.0f + exponential(-y));
                memcpy(o + i, &y, bytes);
            }
        }
    }
}

struct ggml_tensor * pyggml_channel_norm(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * gamma,
                                         float eps, bool silu) {
    struct ggml_tensor * args[2] = {x, gamma};
    struct ggml_tensor * y = ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], x->ne[2], x->ne[3], args, 2,
                                            compute_channel_norm, GGML_N_TASKS_MAX, NULL);
    const struct channel_norm_params params = {eps, silu};
    memcpy(y->op_params + NORM_PARAMS, &params, sizeof params);
    return y;
}
