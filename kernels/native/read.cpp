// Reads memory and does nothing else: the bandwidth that benchmarks compare decode with.
#include <algorithm>
#include <atomic>

#include "core.h"
#include "pool.h"

// Reads `bytes` of memory on `threads` threads and returns a checksum.
DISTKV_EXPORT int64_t distkv_read(const void* memory, int64_t bytes, int64_t threads) {
  struct Read {
    const int64_t* words;
    int64_t count;
    std::atomic<int64_t> sum{0};
  } read{static_cast<const int64_t*>(memory), bytes / 8};
  constexpr int64_t kPiece = 1 << 20, kLine = 8, kAhead = 512;  // words
  const auto piece = [](void* context, int64_t index) {
    Read& all = *static_cast<Read*>(context);
    int64_t sum[kLine] = {};
    for (int64_t i = index * kPiece, end = std::min(all.count / kLine * kLine, i + kPiece); i < end; i += kLine) {
      __builtin_prefetch(all.words + i + kAhead, 0, 3);
      for (int64_t w = 0; w < kLine; ++w) sum[w] ^= all.words[i + w];
    }
    for (const int64_t word : sum) all.sum ^= word;
  };
  distkv::run_items(piece, &read, (read.count + kPiece - 1) / kPiece, threads);
  return read.sum;
}
