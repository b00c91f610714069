// A portable build compiles the kernels (attention.c, conv.c, gelu.c, gemm.c, low_rank.c) once for each level of
// instructions, as functions of other names; levels.c picks the best that this processor has. In a native build there is one of
// each, and no levels.
#pragma once

#include "shim.h"

#ifdef PYGGML_LEVEL
#define PYGGML_PASTE_(name, level) name##_##level
#define PYGGML_PASTE(name, level) PYGGML_PASTE_(name, level)
#define pyggml_add_low_rank PYGGML_PASTE(pyggml_add_low_rank, PYGGML_LEVEL)
#define pyggml_attention PYGGML_PASTE(pyggml_attention, PYGGML_LEVEL)
#define pyggml_channel_norm PYGGML_PASTE(pyggml_channel_norm, PYGGML_LEVEL)
#define pyggml_conv2d_3x3 PYGGML_PASTE(pyggml_conv2d_3x3, PYGGML_LEVEL)
#define pyggml_gelu PYGGML_PASTE(pyggml_gelu, PYGGML_LEVEL)
#define pyggml_group_norm PYGGML_PASTE(pyggml_group_norm, PYGGML_LEVEL)
#define pyggml_mul_mat PYGGML_PASTE(pyggml_mul_mat, PYGGML_LEVEL)
#define pyggml_mul_mat_fits PYGGML_PASTE(pyggml_mul_mat_fits, PYGGML_LEVEL)
#endif
