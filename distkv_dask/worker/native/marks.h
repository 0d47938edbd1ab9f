// Records of a trace for layers that run without Python: what was done, from when to when on the monotonic clock.
#pragma once
#include <stdint.h>
#include <time.h>

#include "../../../kernels/native/exports.h"

namespace distkv {

// Names are in marks.py: the home's first, then the holder's.
enum What : int64_t { kSend, kWait, kReceive, kMerge, kIdle, kTake, kAttend, kReply, kAnswer };

// Python reads them after a call (marks.py): every field has 8 bytes.
struct Mark {
  int64_t what, began, ended, gang, step, layer;
  int64_t peer;  // number of a name; -1: none
  int64_t size;  // bytes; -1: none
};

struct Marks {
  Mark* room;
  int64_t capacity, count;
  int64_t lost;  // marks that did not fit
  int64_t last;  // end of the last mark, 0 at first
};

// Nanoseconds of the monotonic clock; without a trace 0, and the clock is not read.
inline int64_t nanos_now(const Marks* marks) {
  if (!marks) return 0;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Records something that began at `began` and ends now.
inline void put(Marks* marks, What what, int64_t began, int64_t gang, int64_t step, int64_t layer,
                int64_t peer = -1, int64_t size = -1) {
  if (!marks) return;
  const int64_t ended = nanos_now(marks);
  marks->last = ended;
  if (marks->count == marks->capacity) {
    ++marks->lost;
    return;
  }
  marks->room[marks->count++] = {what, began, ended, gang, step, layer, peer, size};
}

}  // namespace distkv
