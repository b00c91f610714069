// Pages of mapped files: kept in memory, on which file system they lie, and what happens when the file shrinks.
//
// Reading a page behind the end of a mapped file is a SIGBUS, in whatever thread computes at that moment. For ranges that
// are watched the handler maps zeros there, notes the offset and goes on; whoever computes asks for it afterwards, and
// drops the result. Everywhere else the action that was there before is put back and sees the same signal.
// Only system calls and atomics in the handler: nothing here takes a lock that a fault could hold.

#define _GNU_SOURCE  // sigaction, MAP_ANONYMOUS
#include "pages.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

int pyggml_lock_pages(const void * address, size_t n_bytes) {
    return VirtualLock((void *) address, n_bytes) ? 0 : ENOMEM;
}

int pyggml_unlock_pages(const void * address, size_t n_bytes) {
    return VirtualUnlock((void *) address, n_bytes) ? 0 : EINVAL;
}

// An open mapping keeps a file from being truncated there.
int64_t pyggml_watch_pages(const void * address, size_t n_bytes) {
    (void) address, (void) n_bytes;
    return 0;
}

void pyggml_unwatch_pages(int64_t id) {
    (void) id;
}

int64_t pyggml_lost_page(int64_t id) {
    (void) id;
    return -1;
}

#else
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

int pyggml_lock_pages(const void * address, size_t n_bytes) {
    return mlock(address, n_bytes) ? errno : 0;
}

int pyggml_unlock_pages(const void * address, size_t n_bytes) {
    return munlock(address, n_bytes) ? errno : 0;
}

enum { MAX_RANGES = 4096 };

struct range {
    atomic_uintptr_t base;  // 0: the slot is free
    atomic_size_t    size;
    atomic_llong     lost;  // offset of the first byte that could not be read, -1: none
    atomic_llong     id;
};

static struct range     ranges[MAX_RANGES];
static atomic_int       n_slots;  // slots behind these were never used
static atomic_flag      lock = ATOMIC_FLAG_INIT;
static int64_t          last_id;
static struct sigaction before;  // what SIGBUS did without us
static uintptr_t        page_size;

static void on_bus_error(int number, siginfo_t * info, void * context) {
    (void) context;
    const int       saved = errno;
    const uintptr_t at    = (uintptr_t) info->si_addr;
    const int       n     = atomic_load(&n_slots);
    for (int i = 0; i < n && info->si_code > 0; i++) {  // 0 and below: sent by a process, not a fault
        const uintptr_t base = atomic_load(&ranges[i].base);
        const size_t    size = atomic_load(&ranges[i].size);
        if (!base || at < base || at - base >= size) {
            continue;
        }
        // The rest as well: a file that lost its end would else fault, and cost a mapping, for each page.
        const uintptr_t page = at / page_size * page_size;
        const int flags      = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap((void *) page, base + size - page, PROT_READ, flags, -1, 0) == MAP_FAILED) {
            break;
        }
        long long was = atomic_load(&ranges[i].lost);
        while ((was < 0 || (long long) (page - base) < was) &&
               !atomic_compare_exchange_weak(&ranges[i].lost, &was, (long long) (page - base))) {
        }
        errno = saved;
        return;
    }
    // Not ours. A fault happens again as soon as we return; a signal that was sent must be sent again.
    sigaction(number, &before, NULL);
    before.sa_handler = SIG_DFL;  // should what was there before bring us back, that is the end of it
    before.sa_flags   = 0;
    if (info->si_code <= 0) {
        raise(number);
    }
    errno = saved;
}

static bool is_ours(const struct sigaction * action) {
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_bus_error;
}

int64_t pyggml_watch_pages(const void * address, size_t n_bytes) {
    const uintptr_t base = (uintptr_t) address;
    int64_t         id   = 0;
    while (atomic_flag_test_and_set(&lock)) {
    }
    page_size         = (uintptr_t) sysconf(_SC_PAGESIZE);
    const size_t size = (n_bytes + page_size - 1) / page_size * page_size;
    int          slot = -1;
    const int    n    = atomic_load(&n_slots);
    for (int i = 0; i < n; i++) {
        const uintptr_t other = atomic_load(&ranges[i].base);
        if (other && base < other + atomic_load(&ranges[i].size) && other < base + size) {
            atomic_store(&ranges[i].base, 0);  // unmapped already, else the system had not given us its addresses
        }
        if (slot < 0 && !atomic_load(&ranges[i].base)) {
            slot = i;
        }
    }
    if (slot < 0 && n < MAX_RANGES) {
        slot = n;
    }
    struct sigaction now;
    if (slot >= 0 && base % page_size == 0 && n_bytes && !sigaction(SIGBUS, NULL, &now)) {
        if (!is_ours(&now)) {
            struct sigaction ours;
            before = now;
            memset(&ours, 0, sizeof(ours));
            ours.sa_sigaction = on_bus_error;
            ours.sa_flags     = SA_SIGINFO | SA_ONSTACK;
            sigemptyset(&ours.sa_mask);
            sigaction(SIGBUS, &ours, NULL);
        }
        id = ++last_id;
        atomic_store(&ranges[slot].size, size);
        atomic_store(&ranges[slot].lost, -1);
        atomic_store(&ranges[slot].id, id);
        atomic_store(&ranges[slot].base, base);
        if (slot == n) {
            atomic_store(&n_slots, n + 1);
        }
    }
    atomic_flag_clear(&lock);
    return id;
}

static struct range * find(int64_t id) {
    const int n = atomic_load(&n_slots);
    for (int i = 0; i < n && id > 0; i++) {
        if (atomic_load(&ranges[i].base) && atomic_load(&ranges[i].id) == id) {
            return &ranges[i];
        }
    }
    return NULL;
}

void pyggml_unwatch_pages(int64_t id) {
    while (atomic_flag_test_and_set(&lock)) {
    }
    struct range * range = find(id);
    if (range) {
        atomic_store(&range->base, 0);
    }
    bool any = false;
    for (int i = 0; i < atomic_load(&n_slots); i++) {
        any |= atomic_load(&ranges[i].base) != 0;
    }
    struct sigaction now;
    if (range && !any && !sigaction(SIGBUS, NULL, &now) && is_ours(&now)) {
        sigaction(SIGBUS, &before, NULL);
    }
    atomic_flag_clear(&lock);
}

int64_t pyggml_lost_page(int64_t id) {
    const struct range * range = find(id);
    return range ? atomic_load(&range->lost) : -1;
}
#endif

#if defined(__linux__)
#include <sys/vfs.h>

const char * pyggml_remote_file_system(int fd) {
    // Numbers of linux/magic.h and of the file systems' own sources; virtiofs has FUSE's.
    static const struct {
        uint32_t     magic;
        const char * name;
    } remote[] = {
        {0x6969, "NFS"},         {0xff534d42, "SMB"},    {0xfe534d42, "SMB"},   {0x517b, "SMB"},
        {0x65735546, "FUSE"},    {0x01021997, "9p"},     {0x0bd00bd0, "Lustre"}, {0x00c36400, "Ceph"},
        {0x5346414f, "AFS"},     {0x6b414653, "AFS"},    {0x73757245, "Coda"},  {0x47504653, "GPFS"},
        {0x19830326, "BeeGFS"},  {0x20030528, "OrangeFS"}, {0x01161970, "GFS2"}, {0x7461636f, "OCFS2"},
        {0x786f4256, "vboxsf"},
    };
    struct statfs info;
    if (fstatfs(fd, &info)) {
        return NULL;
    }
    for (size_t i = 0; i < sizeof(remote) / sizeof(remote[0]); i++) {
        if (remote[i].magic == (uint32_t) info.f_type) {
            return remote[i].name;
        }
    }
    return NULL;
}
#elif defined(__APPLE__)
#include <sys/mount.h>
#include <sys/param.h>

const char * pyggml_remote_file_system(int fd) {
    static _Thread_local char name[MFSTYPENAMELEN];
    struct statfs             info;
    if (fstatfs(fd, &info) || (info.f_flags & MNT_LOCAL)) {
        return NULL;
    }
    memcpy(name, info.f_fstypename, sizeof(name));
    return name;
}
#else
const char * pyggml_remote_file_system(int fd) {
    (void) fd;
    return NULL;
}
#endif
