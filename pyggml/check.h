// What ggml's kernels assert while they compute, asked while a graph is built.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml.h"
#include "shim.h"

// NULL when ggml's kernels take the node's types and strides, else what they want.
PYGGML_API const char * pyggml_why_not(const struct ggml_tensor * node);

// True when the tensor lies in a buffer of the processor's with a layout of its own: its bytes are not those of its type.
PYGGML_API bool pyggml_is_repacked(const struct ggml_tensor * tensor);

// Index of the first node that kernels would refuse, or that `backend` does not support; -1 when there is none.
// *why is then the reason, or NULL when it is the backend's.
PYGGML_API int pyggml_first_refused(ggml_backend_t backend, struct ggml_cgraph * graph, const char ** why);

// Index of the first node that writes into memory of `buffer`; -1 when there is none.
PYGGML_API int pyggml_first_write(struct ggml_cgraph * graph, ggml_backend_buffer_t buffer);

// Index of the first node that picks a row, by an input or a weight, that is not there; -1 when there is none.
PYGGML_API int pyggml_first_bad_row(struct ggml_cgraph * graph, int64_t * value, int64_t * n_rows);
