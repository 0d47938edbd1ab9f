// Frames with the layout of distkv_dask/worker/channels/frames.py, and code that both ends of an exchange share.
#pragma once
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "../../../kernels/native/exports.h"

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
// As in frames.py; tests/worker/test_frames_and_bodies.py compares the two.
static_assert(sizeof(Header) == 64 && offsetof(Header, magic) == 0 && offsetof(Header, kind) == 4);
static_assert(offsetof(Header, layer) == 6 && offsetof(Header, step) == 8 && offsetof(Header, epoch) == 12);
static_assert(offsetof(Header, gang) == 16 && offsetof(Header, length) == 24 && offsetof(Header, scale) == 32);
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

// The part of `whole` after its first `skipped` bytes; returns the number of pieces in it.
inline int remaining(const iovec* whole, int pieces, int64_t skipped, iovec* left) {
  int count = 0;
  for (int i = 0; i < pieces; ++i) {
    const int64_t size = static_cast<int64_t>(whole[i].iov_len);
    if (skipped < size) left[count++] = {static_cast<char*>(whole[i].iov_base) + skipped, whole[i].iov_len - skipped};
    skipped = skipped > size ? skipped - size : 0;
  }
  return count;
}

// Calls send() or receive() for the pieces after the first `done` bytes; returns the number of bytes, or -1 with errno.
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
