// What pyggml adds to ggml in C. cdef.py gives the lines that begin with PYGGML_API to cffi.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml.h"

#if defined(_WIN32)
#define PYGGML_API __declspec(dllexport)
#else
#define PYGGML_API __attribute__((visibility("default")))
#endif

// Install the abort and log handlers; once, before anything else.
PYGGML_API void pyggml_init(void);

// Message of the last guarded call that failed on this thread: file, line and text of the assert.
PYGGML_API const char * pyggml_last_error(void);

// Messages below this level (enum ggml_log_level) are dropped, the others go to stderr. Default: warnings.
PYGGML_API void pyggml_set_log_level(int level);

// The last lines that ggml logged at warning level or above, for error messages; copies at most n bytes, empties the store.
PYGGML_API size_t pyggml_take_log(char * text, size_t n);

// A ggml_abort_callback: true when the int that `flag` points to is not 0. Needs no interpreter lock.
PYGGML_API bool pyggml_is_cancelled(void * flag);
PYGGML_API void pyggml_set_flag(int * flag, int value);

// ggml_backend_graph_compute that Ctrl-C can stop and that does not throw (calls.h): while it runs, SIGINT raises a flag that pyggml_is_cancelled sees, and
// then goes to the handler that was there before (the interpreter's, which raises KeyboardInterrupt afterwards).
PYGGML_API enum ggml_status pyggml_compute(ggml_backend_t backend, struct ggml_cgraph * graph);

// True when all n floats are finite; otherwise *where is the index of the first that is not.
PYGGML_API bool pyggml_all_finite(const float * x, int64_t n, int64_t * where);
