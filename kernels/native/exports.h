// Macros for the exports of both C++ libraries (the kernels' core, and the exchange in distkv_dask/worker/native).
#pragma once
#include <stddef.h>
#include <stdint.h>

#define DISTKV_EXPORT extern "C" __attribute__((visibility("default")))

// The layout of a structure, which Python compares with its own when it loads the library: the size, the offset of each
// field in order, and -1 at the end.
#define DISTKV_LAYOUT(name, Structure, ...)                                                     \
  DISTKV_EXPORT const int64_t* distkv_layout_##name() {                                         \
    static const int64_t layout[] = {static_cast<int64_t>(sizeof(Structure)), __VA_ARGS__, -1}; \
    return layout;                                                                              \
  }
#define DISTKV_AT(Structure, field) static_cast<int64_t>(offsetof(Structure, field))
