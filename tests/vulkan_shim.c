// Put before libvulkan by LD_PRELOAD: a Vulkan whose device is lost, or has no memory left, once fail() says so.
// Built by tests/test_vulkan.py; without Vulkan's headers.
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

enum { OUT_OF_DEVICE_MEMORY = -2, DEVICE_LOST = -4 };

typedef void (*function)(void);
typedef function (*finder)(void *, const char *);

static int failing;
static finder find, find_in_device;
static int (*submit)(void *, uint32_t, const void *, void *);
static int (*allocate)(void *, const void *, const void *, void *);

void fail(int how) {
    failing = how;
}

static int our_submit(void * queue, uint32_t n, const void * submits, void * fence) {
    return failing == DEVICE_LOST ? DEVICE_LOST : submit(queue, n, submits, fence);
}

static int our_allocate(void * device, const void * info, const void * allocator, void * memory) {
    return failing == OUT_OF_DEVICE_MEMORY ? OUT_OF_DEVICE_MEMORY : allocate(device, info, allocator, memory);
}

static function replaced(const char * name, function found);

static function our_find_in_device(void * device, const char * name) {
    return replaced(name, find_in_device(device, name));
}

static function replaced(const char * name, function found) {
    if (found && !strcmp(name, "vkQueueSubmit")) {
        *(function *) &submit = found;
        return (function) our_submit;
    }
    if (found && !strcmp(name, "vkAllocateMemory")) {
        *(function *) &allocate = found;
        return (function) our_allocate;
    }
    if (found && !strcmp(name, "vkGetDeviceProcAddr")) {
        *(function *) &find_in_device = found;
        return (function) our_find_in_device;
    }
    return found;
}

function vkGetInstanceProcAddr(void * instance, const char * name) {
    if (!find) {
        find = (finder) dlsym(dlopen("libvulkan.so.1", RTLD_LAZY), "vkGetInstanceProcAddr");
    }
    return replaced(name, find(instance, name));
}
