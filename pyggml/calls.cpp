#include "calls.h"

#include <cstdio>
#include <exception>

static thread_local char message[1024];

// call() or, when it throws, `failed` with the exception's text kept.
template <typename Result, typename Call> static Result attempt(Result failed, Call call) noexcept {
    message[0] = '\0';
    try {
        return call();
    } catch (const std::exception & e) {
        snprintf(message, sizeof(message), "%s", e.what());
    } catch (...) {
        snprintf(message, sizeof(message), "an exception of an unknown kind");
    }
    return failed;
}

template <typename Call> static bool succeeds(Call call) noexcept {
    return attempt(false, [&] { call(); return true; });
}

extern "C" {

const char * pyggml_last_exception(void) {
    return message;
}

ggml_backend_t pyggml_dev_init(ggml_backend_dev_t device) {
    return attempt<ggml_backend_t>(nullptr, [&] { return ggml_backend_dev_init(device, nullptr); });
}

bool pyggml_backend_free(ggml_backend_t backend) {
    return succeeds([&] { ggml_backend_free(backend); });
}

ggml_backend_buffer_t pyggml_alloc_buffer(ggml_backend_buffer_type_t type, size_t n_bytes) {
    return attempt<ggml_backend_buffer_t>(nullptr, [&] { return ggml_backend_buft_alloc_buffer(type, n_bytes); });
}

ggml_backend_buffer_t pyggml_alloc_tensors(struct ggml_context * context, ggml_backend_buffer_type_t type) {
    return attempt<ggml_backend_buffer_t>(
        nullptr, [&] { return ggml_backend_alloc_ctx_tensors_from_buft(context, type); });
}

bool pyggml_alloc_graph(ggml_gallocr_t allocator, struct ggml_cgraph * graph) {
    return attempt(false, [&] { return ggml_gallocr_alloc_graph(allocator, graph); });
}

bool pyggml_sched_alloc(ggml_backend_sched_t scheduler, struct ggml_cgraph * graph) {
    return attempt(false, [&] { return ggml_backend_sched_alloc_graph(scheduler, graph); });
}

enum ggml_status pyggml_sched_compute(ggml_backend_sched_t scheduler, struct ggml_cgraph * graph) {
    return attempt(GGML_STATUS_FAILED, [&] { return ggml_backend_sched_graph_compute(scheduler, graph); });
}

bool pyggml_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t n_bytes) {
    return succeeds([&] { ggml_backend_tensor_set(tensor, data, offset, n_bytes); });
}

bool pyggml_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t n_bytes) {
    return succeeds([&] { ggml_backend_tensor_get(tensor, data, offset, n_bytes); });
}

bool pyggml_tensor_set_async(ggml_backend_t backend, struct ggml_tensor * tensor, const void * data, size_t offset, size_t n_bytes) {
    return succeeds([&] { ggml_backend_tensor_set_async(backend, tensor, data, offset, n_bytes); });
}

bool pyggml_synchronize(ggml_backend_t backend) {
    return succeeds([&] { ggml_backend_synchronize(backend); });
}

bool pyggml_event_record(ggml_backend_event_t event, ggml_backend_t backend) {
    return succeeds([&] { ggml_backend_event_record(event, backend); });
}

bool pyggml_event_synchronize(ggml_backend_event_t event) {
    return succeeds([&] { ggml_backend_event_synchronize(event); });
}

enum ggml_status pyggml_try_compute(ggml_backend_t backend, struct ggml_cgraph * graph) {
    return attempt(GGML_STATUS_FAILED, [&] { return ggml_backend_graph_compute(backend, graph); });
}
}
