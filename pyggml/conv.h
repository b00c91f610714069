// Our own operations for autoencoders; what they take and give is described in conv.c.
#pragma once

#include "levels.h"

PYGGML_API struct ggml_tensor * pyggml_conv2d_3x3(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * w,
                                       struct ggml_tensor * bias, struct ggml_tensor * residual, int n_threads);

PYGGML_API struct ggml_tensor * pyggml_group_norm(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * weight,
                                       struct ggml_tensor * bias, int n_groups, float eps, bool silu);

PYGGML_API struct ggml_tensor * pyggml_channel_norm(struct ggml_context * ctx, struct ggml_tensor * x,
                                       struct ggml_tensor * gamma, float eps, bool silu);
