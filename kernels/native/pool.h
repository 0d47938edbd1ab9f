// Threads that help a caller through a list of items and sleep in between.
#pragma once
#include <cstdint>

namespace distkv {

// Calls work(context, item) for every item in [0, items), on the calling thread and at most threads - 1 others.
// Any number of threads may call at once; none of them waits for another's items. Never throws.
void run_items(void (*work)(void* context, int64_t item), void* context, int64_t items, int64_t threads);

}  // namespace distkv
