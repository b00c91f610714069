// A product of low rank, added; what it takes and gives is described in low_rank.c.
#pragma once

#include "levels.h"

PYGGML_API struct ggml_tensor * pyggml_add_low_rank(struct ggml_context * ctx, struct ggml_tensor * y, struct ggml_tensor * up,
                                                    struct ggml_tensor * h, int64_t at);
