// Part of ggml's Vulkan backend, between it and the loader (--wrap in vendor/ggml/CMakeLists.txt): what Mesa's lavapipe before
// 23.3 needs, so as not to end the process.
//
// When that driver binds a set of descriptors it counts references to the buffers of all its bindings, also of those that
// the shader does not use. ggml's sets have a binding for as many buffers as any operation has, and ggml writes those that
// an operation has: the others may name buffers of an earlier one, which are gone. Vulkan allows that; this driver then
// writes into freed memory. So buffers of such devices are not destroyed. Each costs about a kilobyte; the memory behind it
// is ggml's to free, and is freed. Since 23.3 that driver keeps addresses in its descriptors, and counts nothing.

#include <stdatomic.h>
#include <string.h>

#include <vulkan/vulkan_core.h>

#define FIXED_IN VK_MAKE_API_VERSION(0, 23, 3, 0)
#define MAX_DEVICES 64

// By their names the linker knows them: the loader's function, and what is called in its place.
VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL __real_vkGetInstanceProcAddr(VkInstance instance, const char * name);
VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL __wrap_vkGetInstanceProcAddr(VkInstance instance, const char * name);

static PFN_vkGetPhysicalDeviceProperties properties_of;
static PFN_vkCreateDevice                create_device;
static PFN_vkGetDeviceProcAddr           find_in_device;
static PFN_vkDestroyBuffer               destroy_buffer;

static _Atomic(VkDevice) keeping[MAX_DEVICES];  // devices whose buffers are not destroyed
static atomic_int        n_keeping;

static VKAPI_ATTR VkResult VKAPI_CALL our_create_device(VkPhysicalDevice physical, const VkDeviceCreateInfo * info,
                                                        const VkAllocationCallbacks * allocator, VkDevice * device) {
    VkPhysicalDeviceProperties is;
    const VkResult             result = create_device(physical, info, allocator, device);
    if (result == VK_SUCCESS) {
        properties_of(physical, &is);
        if (is.vendorID == VK_VENDOR_ID_MESA && is.deviceType == VK_PHYSICAL_DEVICE_TYPE_CPU && is.driverVersion < FIXED_IN) {
            atomic_store(&keeping[atomic_fetch_add(&n_keeping, 1) % MAX_DEVICES], *device);
        }
    }
    return result;
}

static VKAPI_ATTR void VKAPI_CALL our_destroy_buffer(VkDevice device, VkBuffer buffer, const VkAllocationCallbacks * allocator) {
    for (int i = 0; i < MAX_DEVICES && i < atomic_load(&n_keeping); i++) {
        if (atomic_load(&keeping[i]) == device) {
            return;
        }
    }
    destroy_buffer(device, buffer, allocator);
}

static PFN_vkVoidFunction ours(const char * name, PFN_vkVoidFunction found);

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL our_find_in_device(VkDevice device, const char * name) {
    return ours(name, find_in_device(device, name));
}

static PFN_vkVoidFunction ours(const char * name, PFN_vkVoidFunction found) {
    if (found && !strcmp(name, "vkCreateDevice")) {
        create_device = (PFN_vkCreateDevice) found;
        return (PFN_vkVoidFunction) our_create_device;
    }
    if (found && !strcmp(name, "vkDestroyBuffer")) {
        destroy_buffer = (PFN_vkDestroyBuffer) found;
        return (PFN_vkVoidFunction) our_destroy_buffer;
    }
    if (found && !strcmp(name, "vkGetDeviceProcAddr")) {
        find_in_device = (PFN_vkGetDeviceProcAddr) found;
        return (PFN_vkVoidFunction) our_find_in_device;
    }
    return found;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL __wrap_vkGetInstanceProcAddr(VkInstance instance, const char * name) {
    if (instance) {
        properties_of = (PFN_vkGetPhysicalDeviceProperties) __real_vkGetInstanceProcAddr(instance, "vkGetPhysicalDeviceProperties");
    }
    return ours(name, __real_vkGetInstanceProcAddr(instance, name));
}
