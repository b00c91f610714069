#pragma once

#include "shim.h"

// Keep pages in memory (mlock), or no longer. 0, or the system's error number.
PYGGML_API int pyggml_lock_pages(const void * address, size_t n_bytes);
PYGGML_API int pyggml_unlock_pages(const void * address, size_t n_bytes);

// Name of the file system that the open file lies on when it is a network's or FUSE; NULL when it is another.
PYGGML_API const char * pyggml_remote_file_system(int fd);

// Survive a mapped file that becomes shorter: when a page of the range cannot be read, it and those behind it become
// zeros, and the place is remembered. An id above 0, or 0 when nothing can be done. Take it back after the range is unmapped.
PYGGML_API int64_t pyggml_watch_pages(const void * address, size_t n_bytes);
PYGGML_API void pyggml_unwatch_pages(int64_t id);

// Offset of the first byte that was lost, -1 while all could be read.
PYGGML_API int64_t pyggml_lost_page(int64_t id);
