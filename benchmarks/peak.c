// Peaks of one core: f32 and int8 multiply-adds in registers, as the compiler's vectors of the native width.
// Prints {"f32": GFLOP/s, "int8": Gop/s}, a multiply and an add counting as two. Best of three.
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

enum { CHAINS = 12 };
static const long ROUNDS = 20000000;

#if defined(__AVX512F__)
#define LANES 16
typedef float vf __attribute__((vector_size(64)));
#else
#define LANES 8
typedef float vf __attribute__((vector_size(32)));
#endif

// Twelve chains as variables of their own: compilers keep an array that an asm touches in memory.
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define KEEP(i) __asm__ volatile("" : "+x"(a##i));

static double peak_f32(void) {
    vf b = {0}, c = {0};
    b += 0.999f, c += 0.001f;
#define START(i) vf a##i = c * (float) i;
    EACH(START)
#undef START
    const double start = now();
    for (long n = 0; n < ROUNDS; n++) {
#define STEP(i) a##i = a##i * b + c; KEEP(i)
        EACH(STEP)
#undef STEP
    }
    return 2.0 * LANES * CHAINS * (double) ROUNDS / (now() - start) / 1e9;
}

static double peak_int8(void) {
#if defined(__AVX512VNNI__)
    __m512i u = _mm512_set1_epi8(3);
#define START(i) __m512i a##i = _mm512_set1_epi32(i);
#define STEP(i) a##i = _mm512_dpbusd_epi32(a##i, u, u); KEEP(i)
    const double width = 64;
#elif defined(__AVX2__)
    // 16-bit sums of 8-bit products: what AVX2 has at its fastest; a widening add once in a while is left out.
    __m256i u = _mm256_set1_epi8(3), w;
#define START(i) __m256i a##i = _mm256_set1_epi16(i);
#define STEP(i) __asm__ volatile("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(a##i), "=&x"(w) : "x"(u), "x"(u));
    const double width = 32;
#endif
#if defined(STEP)
    EACH(START)
    const double start = now();
    for (long n = 0; n < ROUNDS; n++) {
        EACH(STEP)
    }
    return 2.0 * width * CHAINS * (double) ROUNDS / (now() - start) / 1e9;
#else
    return 0.0;
#endif
}

int main(void) {
    double f32 = 0, int8 = 0;
    for (int i = 0; i < 3; i++) {
        const double f = peak_f32(), q = peak_int8();
        f32  = f > f32 ? f : f32;
        int8 = q > int8 ? q : int8;
    }
    if (int8 > 0) {
        printf("{\"f32\": %.1f, \"int8\": %.1f}\n", f32, int8);
    } else {
        printf("{\"f32\": %.1f}\n", f32);
    }
    return 0;
}
