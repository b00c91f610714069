// GELU for the CPU; what it takes and gives is described in gelu.c.
#pragma once

#include "levels.h"

PYGGML_API struct ggml_tensor * pyggml_gelu(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * bias);
