// A graph computed in pieces, and the pages of the weights between them.
#pragma once

#include "shim.h"

// Compute the nodes first .. end - 1 of a graph whose earlier nodes have been computed, as pyggml_compute does all of them.
// Operations that ggml fuses stay fused, unless a piece ends between them.
PYGGML_API enum ggml_status pyggml_compute_nodes(ggml_backend_t backend, struct ggml_cgraph * graph, int first, int end);

// madvise for whole pages that are mapped from a file: 0 reads them ahead, 1 maps them and waits until they are there, 2
// unmaps them (the system may still hold them). Returns 0, the system's error number, or -1 where there is no such advice.
PYGGML_API int pyggml_advise_pages(uintptr_t address, size_t n_bytes, int advice);
