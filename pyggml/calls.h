// Calls into backends that may throw: backends are C++ (Vulkan throws when a device is lost or has no memory left), and an
// exception that reaches the interpreter's C frames ends the process. Each returns false, NULL or GGML_STATUS_FAILED after
// one, and pyggml_last_exception() says what it was.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "shim.h"

#if defined(__cplusplus)
extern "C" {
#endif

// Text of the exception of this thread's last call below; empty when there was none.
PYGGML_API const char * pyggml_last_exception(void);

PYGGML_API ggml_backend_t pyggml_dev_init(ggml_backend_dev_t device);
PYGGML_API bool pyggml_backend_free(ggml_backend_t backend);
PYGGML_API ggml_backend_buffer_t pyggml_alloc_buffer(ggml_backend_buffer_type_t type, size_t n_bytes);
PYGGML_API ggml_backend_buffer_t pyggml_alloc_tensors(struct ggml_context * context, ggml_backend_buffer_type_t type);
PYGGML_API bool pyggml_alloc_graph(ggml_gallocr_t allocator, struct ggml_cgraph * graph);
PYGGML_API bool pyggml_sched_alloc(ggml_backend_sched_t scheduler, struct ggml_cgraph * graph);
PYGGML_API enum ggml_status pyggml_sched_compute(ggml_backend_sched_t scheduler, struct ggml_cgraph * graph);
PYGGML_API bool pyggml_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t n_bytes);
PYGGML_API bool pyggml_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t n_bytes);
PYGGML_API bool pyggml_tensor_set_async(ggml_backend_t backend, struct ggml_tensor * tensor, const void * data, size_t offset, size_t n_bytes);
PYGGML_API bool pyggml_synchronize(ggml_backend_t backend);
PYGGML_API bool pyggml_event_record(ggml_backend_event_t event, ggml_backend_t backend);
PYGGML_API bool pyggml_event_synchronize(ggml_backend_event_t event);

// ggml_backend_graph_compute; see pyggml_compute for what is bound.
enum ggml_status pyggml_try_compute(ggml_backend_t backend, struct ggml_cgraph * graph);

#if defined(__cplusplus)
}
#endif
