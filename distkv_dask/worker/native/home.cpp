// The home's side of one layer: sends queries to all holders, then receives their partials and merges them in a fixed
// order.
#include <poll.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "frames.h"
#include "marks.h"

namespace distkv {

// One holder. Python fills it (home/native_exchange.py): every field has 8 bytes, except the headers.
struct Holder {
  int64_t fd;
  const int64_t* q_index;  // [queries] tokens whose queries the holder gets; null: all, sent without a copy
  int64_t queries, q_bytes;
  const int64_t* kv_index;  // [appended] tokens whose KV is appended there; null: all
  int64_t appended, kv_bytes;
  char* packed;  // memory for everything that is selected by an index
  float* answer;
  int64_t answer_bytes;
  float* part_lse;  // within the answer
  Header ask, expected, got;
  int64_t received;
  int64_t peer;  // number of its name in a trace
  const uint8_t* asked;  // [layers] whether it gets queries in a layer
  int64_t due;           // whether it sends a partial in the current layer
};

// Partials that are merged together: `count` of a holder's answer from `query` on, for the tokens from `token` on.
struct Run {
  int64_t holder;  // -1: the home's own
  int64_t query, token, count;
};
static_assert(sizeof(Run) == 4 * sizeof(int64_t), "Python packs runs as rows of four");

struct Home {
  Holder* holders;
  int64_t count;
  MergeCall merge;
  float* out;
  float* lse;
  int64_t tokens, heads, d;
  const float* local_out;  // the home's own partials, complete before distkv_gather; null: none
  const float* local_lse;
  const Run* runs;  // [run_count] in the order of merging, whatever the order of arrival
  int64_t run_count;
  double sent;      // seconds spent sending, all layers together
  double waited;    // seconds spent waiting, likewise
  int64_t culprit;  // holder that a status other than kDone is about
  int64_t error;    // errno, or 0
  int64_t bytes_out, bytes_in;  // payloads of questions and of partials, all layers together
  Marks* marks;     // trace marks; null: no trace
};

enum Status : int { kDone = 0, kBroken = 1, kLate = 2, kUnexpected = 3 };

namespace {

char* pick(char* to, const void* rows, const int64_t* index, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i, to += bytes)
    std::memcpy(to, static_cast<const char*>(rows) + index[i] * bytes, bytes);
  return to;
}

Status send(Holder& holder, const void* q, const void* k, const void* v) {
  iovec whole[4] = {{&holder.ask, sizeof(Header)}};
  int pieces = 1;
  char* packed = holder.packed;
  const auto add = [&](const void* rows, const int64_t* index, int64_t count, int64_t bytes) {
    const void* from = rows;
    if (index) {
      from = packed;
      packed = pick(packed, rows, index, count, bytes);
    }
    whole[pieces++] = {const_cast<void*>(from), static_cast<size_t>(count * bytes)};
  };
  add(q, holder.q_index, holder.queries, holder.q_bytes);
  if (holder.appended) {
    add(k, holder.kv_index, holder.appended, holder.kv_bytes);
    if (v) add(v, holder.kv_index, holder.appended, holder.kv_bytes);  // null: values are a part of the keys
  }
  const int64_t size = kHeaderBytes + static_cast<int64_t>(holder.ask.length);
  for (int64_t sent = 0; sent < size;) {
    const int64_t count = transfer(send_message, static_cast<int>(holder.fd), whole, pieces, sent, 0);
    if (count < 0) return kBroken;
    sent += count;
  }
  return kDone;
}

bool is_whole(const Holder& holder) { return holder.received == kHeaderBytes + holder.answer_bytes; }

// Reads bytes that have arrived; returns whether the partial is complete.
bool receive(Home& home, Holder& holder, Status& status) {
  const iovec whole[2] = {{&holder.got, sizeof(Header)}, {holder.answer, static_cast<size_t>(holder.answer_bytes)}};
  const int64_t count = transfer(recvmsg, static_cast<int>(holder.fd), whole, 2, holder.received, MSG_DONTWAIT);
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
  if (count <= 0) {
    home.error = count < 0 ? errno : 0;
    status = kBroken;
    return false;
  }
  holder.received += count;
  if (holder.received < kHeaderBytes) return false;
  if (std::memcmp(&holder.got, &holder.expected, sizeof(Header)) != 0) status = kUnexpected;
  return status == kDone && is_whole(holder);
}

// Records a mark for the current layer.
void note(const Home& home, What what, int64_t began, int64_t peer = -1, int64_t size = -1) {
  const Header& turn = home.holders[0].expected;
  put(home.marks, what, began, static_cast<int64_t>(turn.gang), turn.step, turn.layer, peer, size);
}

// Merges what is next in order and has arrived, from run `next` on; returns the first run that has to wait.
int64_t merge(const Home& home, int64_t next) {
  for (; next < home.run_count; ++next) {
    const Run& run = home.runs[next];
    const float *out = home.local_out, *lse = home.local_lse;
    if (run.holder >= 0) {
      const Holder& holder = home.holders[run.holder];
      if (!holder.due) continue;
      if (!is_whole(holder)) break;
      out = holder.answer;
      lse = holder.part_lse;
    }
    const int64_t began = nanos_now(home.marks);
    const int64_t to = run.token * home.heads, from = run.query * home.heads;
    home.merge(home.out + to * home.d, home.lse + to, out + from * home.d, lse + from, nullptr, run.count, run.count,
               home.heads, home.d);
    if (run.holder >= 0) note(home, kMerge, began, home.holders[run.holder].peer);
  }
  return next;
}

Status gather(Home& home, double seconds) {
  thread_local std::vector<pollfd> waiting;
  thread_local std::vector<int64_t> whose;
  waiting.clear();
  whose.clear();
  for (int64_t i = 0; i < home.count; ++i) {
    if (!home.holders[i].due) continue;
    waiting.push_back({static_cast<int>(home.holders[i].fd), POLLIN, 0});
    whose.push_back(i);
  }
  int64_t next = merge(home, 0);
  double began = seconds_now();
  const double deadline = began + seconds;
  while (!waiting.empty()) {
    const double left = std::ceil((deadline - began) * 1e3);
    const int64_t waits_since = nanos_now(home.marks);
    const int ready = left > 0 ? poll(waiting.data(), waiting.size(), static_cast<int>(std::min(left, 2e9))) : 0;
    const double now = seconds_now();
    home.waited += now - began;
    note(home, kWait, waits_since);
    began = now;
    home.culprit = whose[0];
    if (ready == 0) return kLate;
    if (ready < 0 && errno != EINTR) {
      home.error = errno;
      return kBroken;
    }
    for (size_t at = waiting.size(); ready > 0 && at-- > 0;) {
      if (!waiting[at].revents) continue;
      Status status = kDone;
      Holder& holder = home.holders[home.culprit = whose[at]];
      const int64_t reads_since = nanos_now(home.marks);
      const bool whole = receive(home, holder, status);
      note(home, kReceive, reads_since, whole ? holder.peer : -1, whole ? holder.answer_bytes : -1);
      if (whole) {
        home.bytes_in += holder.answer_bytes;
        waiting[at] = waiting.back();
        whose[at] = whose.back();
        waiting.pop_back();
        whose.pop_back();
      }
      if (status != kDone) return status;
    }
    next = merge(home, next);
  }
  return kDone;
}

}  // namespace
}  // namespace distkv

// Sends a layer's queries, and the KV of tails on other workers, to its holders. Returns a distkv::Status.
DISTKV_EXPORT int distkv_ask(distkv::Home* home, const void* q, const void* k, const void* v, int64_t layer,
                             int64_t step, double scale) {
  const double began = distkv::seconds_now();
  for (int64_t i = 0; i < home->count; ++i) {
    distkv::Holder& holder = home->holders[i];
    for (distkv::Header* header : {&holder.ask, &holder.expected}) {
      header->layer = static_cast<uint16_t>(layer);
      header->step = static_cast<uint32_t>(step);
    }
    holder.ask.scale = scale;
    holder.received = 0;
    holder.due = holder.asked[layer];
    if (!holder.due) continue;
    const int64_t sends_since = distkv::nanos_now(home->marks);
    const distkv::Status status = distkv::send(holder, q, k, v);
    distkv::note(*home, distkv::kSend, sends_since, holder.peer, static_cast<int64_t>(holder.ask.length));
    if (status) {
      home->culprit = i;
      home->error = errno;
      return status;
    }
    home->bytes_out += static_cast<int64_t>(holder.ask.length);
  }
  home->sent += distkv::seconds_now() - began;
  std::memset(home->out, 0, home->tokens * home->heads * home->d * sizeof(float));
  for (int64_t i = 0; i < home->tokens * home->heads; ++i) home->lse[i] = -INFINITY;
  return distkv::kDone;
}

// Waits at most `seconds` for all partials of the layer. Returns a distkv::Status.
DISTKV_EXPORT int distkv_gather(distkv::Home* home, double seconds) {
  home->error = 0;
  try {
    return distkv::gather(*home, seconds);
  } catch (const std::bad_alloc&) {
    home->error = ENOMEM;
    return distkv::kBroken;
  }
}

#define AT(field) DISTKV_AT(distkv::Holder, field)
DISTKV_LAYOUT(holder, distkv::Holder,
              AT(fd), AT(q_index), AT(queries), AT(q_bytes), AT(kv_index), AT(appended), AT(kv_bytes), AT(packed),
              AT(answer), AT(answer_bytes), AT(part_lse), AT(ask), AT(expected), AT(got), AT(received),
              AT(peer), AT(asked), AT(due))
#undef AT

#define AT(field) DISTKV_AT(distkv::Home, field)
DISTKV_LAYOUT(home, distkv::Home,
              AT(holders), AT(count), AT(merge), AT(out), AT(lse), AT(tokens), AT(heads), AT(d), AT(local_out),
              AT(local_lse), AT(runs), AT(run_count), AT(sent), AT(waited), AT(culprit), AT(error),
              AT(bytes_out), AT(bytes_in), AT(marks))
#undef AT
