// Our own attention; what it takes and gives is described in attention.c.
#pragma once

#include "levels.h"

PYGGML_API struct ggml_tensor * pyggml_attention(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                                 struct ggml_tensor * v, float scale, int n_threads);
