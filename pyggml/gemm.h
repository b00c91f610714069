// Our own matrix product for quantised weights; what it takes and gives is described in gemm.c.
#pragma once

#include "levels.h"

PYGGML_API bool pyggml_mul_mat_fits(const struct ggml_tensor * w, const struct ggml_tensor * x);
PYGGML_API struct ggml_tensor * pyggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * w, struct ggml_tensor * x);
