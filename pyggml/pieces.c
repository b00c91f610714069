#include "pieces.h"

#include <errno.h>

#include "../src/ggml-impl.h"  // struct ggml_cgraph, beside the folder of the public headers

#if !defined(_WIN32)
#include <sys/mman.h>
#endif

enum ggml_status pyggml_compute_nodes(ggml_backend_t backend, struct ggml_cgraph * graph, int first, int end) {
    // ggml_graph_view, which is not among what ggml exports everywhere.
    struct ggml_cgraph view = *graph;
    view.size               = 0;
    view.n_nodes            = end - first;
    view.n_leafs            = 0;
    view.nodes              = graph->nodes + first;
    view.leafs              = NULL;
    view.grads              = NULL;
    view.grad_accs          = NULL;
    view.uid                = 0;  // the graph's own is for those that compute all of it
    return pyggml_compute(backend, &view);
}

int pyggml_advise_pages(uintptr_t address, size_t n_bytes, int advice) {
#if defined(__linux__)
    // By number: 22 is MADV_POPULATE_READ, younger than many systems' headers. An older kernel says EINVAL.
    static const int advices[] = { MADV_WILLNEED, 22, MADV_DONTNEED };
    return madvise((void *) address, n_bytes, advices[advice]) ? errno : 0;
#else
    (void) address, (void) n_bytes, (void) advice;
    return -1;
#endif
}
