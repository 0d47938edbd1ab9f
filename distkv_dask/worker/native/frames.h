// Frames as distkv_dask/worker/channels/frames.py lays them out, and what both ends of an exchange share.
#pragma once
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define DISTKV_EXPORT extern "C" __attribute__((visibility("default")))

// What Python compares with its own idea of a structure when it loads the library: its size, the offset of each field in
// order, and -1 at the end.
#define DISTKV_LAYOUT(name, Structure, ...)                                                     \
  DISTKV_EXPORT const int64_t* distkv_layout_##name() {                                         \
    static const int64_t layout[] = {static_cast<int64_t>(sizeof(Structure)), __VA_ARGS__, -1}; \
    return layout;                                                                              \
  }
#define DISTKV_AT(Structure, field) static_cast<int64_t>(offsetof(Structure, field))

namespace distkv {

struct Header {
  char magic[4];
  uint8_t kind, pad;
  uint16_t layer;
  uint32_t step, epoch;
  uint64_t gang, length;
  double scale;
  char rest[24];
};
static_assert(sizeof(Header) == 64, "a header has 64 bytes");
constexpr int64_t kHeaderBytes = 64;
constexpr int64_t kTurnBytes = 32;  // all but the scale

// distkv_layer and distkv_merge of the kernels' core (kernels/native), given by address: this library links to neither.
using LayerCall = int (*)(const void* batch, const void* q, const void* k, const void* v, int64_t layer, double scale);
using MergeCall = int (*)(float* out, float* lse, const float* part_out, const float* part_lse, const int64_t* index,
                          int64_t count, int64_t tokens, int64_t heads, int64_t d);

inline double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The part of `whole` behind its first `skipped` bytes; the number of pieces that are left.
inline int remaining(const iovec* whole, int pieces, int64_t skipped, iovec* left) {
  int count = 0;
  for (int i = 0; i < pieces; ++i) {
    const int64_t size = static_cast<int64_t>(whole[i].iov_len);
    if (skipped < size) left[count++] = {static_cast<char*>(whole[i].iov_base) + skipped, whole[i].iov_len - skipped};
    skipped = skipped > size ? skipped - size : 0;
  }
  return count;
}

// send() or receive() of what is left of some pieces; the number of bytes, or -1 with errno.
inline int64_t transfer(ssize_t (*call)(int, msghdr*, int), int fd, const iovec* whole, int pieces, int64_t done,
                        int flags) {
  iovec left[4];
  msghdr message{};
  message.msg_iov = left;
  message.msg_iovlen = remaining(whole, pieces, done, left);
  ssize_t count;
  do count = call(fd, &message, flags);
  while (count < 0 && errno == EINTR);
  return count;
}

inline ssize_t send_message(int fd, msghdr* message, int flags) { return sendmsg(fd, message, flags | MSG_NOSIGNAL); }

}  // namespace distkv
