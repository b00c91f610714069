// Keeps the interpreter alive when ggml asserts, and lets C code ask whether to go on.
//
// ggml reports programming errors with GGML_ASSERT, which ends the process. While a graph is *built* that is plain C
// without locks, so leaving it by longjmp is sound: each twin of the generated guards.inc enters with setjmp, the abort
// handler copies the message and jumps back, and the twin returns NULL. The rules that make it sound:
//   - only plain C that holds no lock and owns no memory may be guarded (graph building in ggml.c);
//   - never C++ (ggml-backend.cpp, gguf.cpp) and never compute: destructors and worker threads would be skipped.
// An assert anywhere else prints its message and ends the process, as ggml means it to.

#define _GNU_SOURCE  // sigaction, _setjmp
#include "shim.h"

#include "attention.h"
#include "calls.h"
#include "conv.h"
#include "gelu.h"
#include "gemm.h"
#include "low_rank.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-opt.h"

#include "check.h"

#if defined(_MSC_VER)
#define THREAD_LOCAL __declspec(thread)
#else
#define THREAD_LOCAL _Thread_local
#endif

#if defined(_WIN32)
#define SAVE(env) setjmp(env)
#define JUMP(env) longjmp(env, 1)
#else
// The plain pair would save and restore the signal mask: a system call for each.
#define SAVE(env) _setjmp(env)
#define JUMP(env) _longjmp(env, 1)
#endif

static THREAD_LOCAL jmp_buf guard_env;
static THREAD_LOCAL int     guard_active;
static THREAD_LOCAL char    guard_message[1024];

#define PYGGML_ENTER(failed)                                                                                           \
    if (SAVE(guard_env)) {                                                                                             \
        guard_active = 0;                                                                                              \
        return failed;                                                                                                 \
    }                                                                                                                  \
    guard_active = 1
#define PYGGML_LEAVE(value)                                                                                            \
    guard_active = 0;                                                                                                  \
    return value

// For calls that make a node: what ggml would refuse only while it computes is refused here.
#define PYGGML_LEAVE_NODE(value)                                                                                       \
    guard_active = 0;                                                                                                  \
    return accept_node(value)
#define PYGGML_NOT_EMPTY(tensor)                                                                                       \
    if ((tensor) && ggml_is_empty(tensor)) {                                                                           \
        return refuse("arguments that are not empty");                                                                 \
    }

static struct ggml_tensor * refuse(const char * why) {
    snprintf(guard_message, sizeof(guard_message), "check.c: %s", why);
    return NULL;
}

static struct ggml_tensor * accept_node(struct ggml_tensor * node) {
    const char * why = node ? pyggml_why_not(node) : NULL;
    return why ? refuse(why) : node;
}

static void on_abort(const char * message) {
    if (guard_active) {
        snprintf(guard_message, sizeof(guard_message), "%s", message);
        JUMP(guard_env);
    }
    fprintf(stderr, "%s\n", message);
    fflush(stderr);
}

const char * pyggml_last_error(void) {
    return guard_message;
}

// Log lines may come from any thread: a spin lock around a small store.
static atomic_int  log_level = GGML_LOG_LEVEL_WARN;
static atomic_flag log_lock  = ATOMIC_FLAG_INIT;
static char        log_store[4096];
static size_t      log_used;

static void on_log(enum ggml_log_level level, const char * text, void * data) {
    static atomic_int last = GGML_LOG_LEVEL_INFO;
    (void) data;
    // A continuation belongs to the line before it.
    int effective = level == GGML_LOG_LEVEL_CONT ? atomic_load(&last) : (int) level;
    atomic_store(&last, effective);
    if (effective >= GGML_LOG_LEVEL_WARN) {
        size_t n = strlen(text);
        while (atomic_flag_test_and_set(&log_lock)) {
        }
        if (n < sizeof(log_store)) {
            if (log_used + n > sizeof(log_store)) {
                log_used = 0;
            }
            memcpy(log_store + log_used, text, n);
            log_used += n;
        }
        atomic_flag_clear(&log_lock);
    }
    // What a guarded call says before it fails is in the exception.
    if (effective >= atomic_load(&log_level) && effective != GGML_LOG_LEVEL_NONE && !guard_active) {
        fputs(text, stderr);
    }
}

void pyggml_set_log_level(int level) {
    atomic_store(&log_level, level);
}

size_t pyggml_take_log(char * text, size_t n) {
    while (atomic_flag_test_and_set(&log_lock)) {
    }
    size_t copied = log_used < n ? log_used : n;
    memcpy(text, log_store, copied);
    log_used = 0;
    atomic_flag_clear(&log_lock);
    return copied;
}

void pyggml_init(void) {
    ggml_set_abort_callback(on_abort);
    ggml_log_set(on_log, NULL);
}

static atomic_int interrupted;

bool pyggml_is_cancelled(void * flag) {
    return __atomic_load_n((int *) flag, __ATOMIC_RELAXED) != 0 || atomic_load(&interrupted) != 0;
}

void pyggml_set_flag(int * flag, int value) {
    __atomic_store_n(flag, value, __ATOMIC_RELAXED);
}

#if defined(_WIN32)
// There, the interpreter's handler runs in a thread of its own, and a computation is stopped by Backend.cancel().
enum ggml_status pyggml_compute(ggml_backend_t backend, struct ggml_cgraph * graph) {
    return pyggml_try_compute(backend, graph);
}
#else
static struct sigaction previous;
static atomic_int       n_computing;

static void on_interrupt(int number, siginfo_t * info, void * context) {
    atomic_store(&interrupted, 1);
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    }
}

enum ggml_status pyggml_compute(ggml_backend_t backend, struct ggml_cgraph * graph) {
    // The first of several computations at once installs the handler, the last one takes it away.
    static atomic_flag lock      = ATOMIC_FLAG_INIT;
    static bool        installed = false;
    while (atomic_flag_test_and_set(&lock)) {
    }
    if (atomic_fetch_add(&n_computing, 1) == 0) {
        struct sigaction ours;
        atomic_store(&interrupted, 0);
        sigaction(SIGINT, NULL, &previous);
        // A process that ignores SIGINT, or dies of it, goes on doing so.
        installed = (previous.sa_flags & SA_SIGINFO) || (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
        if (installed) {
            memset(&ours, 0, sizeof(ours));
            ours.sa_sigaction = on_interrupt;
            ours.sa_flags     = SA_SIGINFO | SA_RESTART | (previous.sa_flags & SA_ONSTACK);
            sigemptyset(&ours.sa_mask);
            sigaction(SIGINT, &ours, NULL);
        }
    }
    atomic_flag_clear(&lock);

    const enum ggml_status status = pyggml_try_compute(backend, graph);

    while (atomic_flag_test_and_set(&lock)) {
    }
    if (atomic_fetch_sub(&n_computing, 1) == 1 && installed) {
        sigaction(SIGINT, &previous, NULL);
        installed = false;
    }
    atomic_flag_clear(&lock);
    return status;
}
#endif

bool pyggml_all_finite(const float * x, int64_t n, int64_t * where) {
    // x * 0 is 0 for finite x and NaN otherwise: a sum that vectorises finds the block, a second look the element.
    const int64_t block = 4096;
    for (int64_t i = 0; i < n; i += block) {
        const int64_t end = i + block < n ? i + block : n;
        float         sum = 0;
        for (int64_t j = i; j < end; j++) {
            sum += x[j] * 0.0f;
        }
        if (sum != 0.0f || sum != sum) {
            for (int64_t j = i; j < end; j++) {
                if (!isfinite(x[j])) {
                    *where = j;
                    return false;
                }
            }
        }
    }
    return true;
}

#include "guards.inc"
#include "asserts.inc"
