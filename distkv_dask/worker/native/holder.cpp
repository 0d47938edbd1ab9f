// The holder's side of layers that go as expected: a request is read and answered, and the next one is awaited.
//
// Everything else (another frame, a closed channel, a full socket, the end of a step, a new connection) returns to
// Python, which decides what to do.
#include <sys/epoll.h>

#include <cstring>

#include "frames.h"
#include "marks.h"

namespace distkv {

// One session. Python fills it (holder/native_turns.py): every field has 8 bytes, except the headers.
struct Session {
  int64_t fd;
  char* frame;  // header and payload of the request that is being read
  int64_t filled;
  int64_t frame_bytes;
  const void* batch;  // first argument of distkv_layer
  const void* q;      // within the frame
  const void* k;
  const void* v;
  const char* answer;
  int64_t answer_bytes;
  int64_t layer;
  const int64_t* next;  // [layers] the layer that is asked after each; where a step ends, not a later one
  Header expected, reply;
  int64_t answered;
  double busy;     // seconds spent on answers
  int64_t sent;    // bytes of the last answer that were sent, if not all were
  int64_t status;  // distkv::Turn of the last call
  Marks* marks;    // trace marks, shared with other sessions of its engine; null: no trace
  int64_t peer;    // number of the home's name in the trace
};

enum Turn : int64_t { kAwaits = 0, kStepDone = 1, kPython = 2, kUnsent = 3, kBadBatch = 4 };

namespace {

// Reads the bytes of the frame that have arrived; returns whether it is complete and the expected one.
bool request(Session& session) {
  while (session.filled < session.frame_bytes) {
    const iovec whole = {session.frame, static_cast<size_t>(session.frame_bytes)};
    const int64_t count =
        transfer(recvmsg, static_cast<int>(session.fd), &whole, 1, session.filled, MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
    if (count <= 0) {
      session.status = kPython;
      return false;
    }
    session.filled += count;
    if (session.filled >= kHeaderBytes && std::memcmp(session.frame, &session.expected, kTurnBytes) != 0) {
      session.status = kPython;
      return false;
    }
  }
  return true;
}

// Records a mark for a turn.
void note(const Session& session, What what, int64_t began, const Header& turn, int64_t size = -1) {
  put(session.marks, what, began, static_cast<int64_t>(turn.gang), turn.step, turn.layer, session.peer, size);
}

void answer(Session& session, const Header& asked, LayerCall layer) {
  session.reply.layer = asked.layer;
  session.reply.step = asked.step;
  const int64_t attends_since = nanos_now(session.marks);
  const int failed = layer(session.batch, session.q, session.k, session.v, session.layer, asked.scale);
  note(session, kAttend, attends_since, asked);
  if (failed) {
    session.status = kBadBatch;
    return;
  }
  const iovec whole[2] = {{&session.reply, sizeof(Header)},
                          {const_cast<char*>(session.answer), static_cast<size_t>(session.answer_bytes)}};
  const int64_t replies_since = nanos_now(session.marks);
  const int64_t sent = transfer(send_message, static_cast<int>(session.fd), whole, 2, 0, MSG_DONTWAIT);
  note(session, kReply, replies_since, asked);
  session.filled = 0;
  ++session.answered;
  const int64_t next = session.next[session.layer];
  const bool step_done = next <= session.layer;
  session.layer = next;
  session.expected.layer = static_cast<uint16_t>(next);
  session.expected.step += step_done;
  if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
    session.status = kPython;  // which finds out why the home is gone
    return;
  }
  session.sent = sent < 0 ? 0 : sent;
  if (session.sent < kHeaderBytes + session.answer_bytes) session.status = kUnsent;
  else if (step_done) session.status = kStepDone;
}

// Answers frames that have arrived; returns whether the session continues without Python.
bool serve(Session& session, LayerCall layer) {
  const Marks* marks = session.marks;
  if (marks && marks->last) put(session.marks, kIdle, marks->last, -1, -1, -1);
  for (;;) {
    const int64_t takes_since = nanos_now(marks), before = session.filled;
    const bool whole = session.status == kAwaits && request(session);
    if (session.filled > before) note(session, kTake, takes_since, session.expected);
    if (!whole) break;
    const int64_t answers_since = nanos_now(marks);
    const double began = seconds_now();
    Header asked;
    std::memcpy(&asked, session.frame, sizeof(asked));
    answer(session, asked, layer);
    session.busy += seconds_now() - began;
    note(session, kAnswer, answers_since, asked, static_cast<int64_t>(asked.length));
  }
  return session.status == kAwaits;
}

}  // namespace
}  // namespace distkv

// Answers requests of sessions until there is something for Python to do, for at most `seconds`. `poller` is an epoll
// descriptor that watches, level-triggered and by descriptor, everything that Python waits for, including sessions.
DISTKV_EXPORT void distkv_serve(int64_t poller, distkv::Session** sessions, int64_t count, distkv::LayerCall layer,
                                double seconds) {
  const double deadline = distkv::seconds_now() + seconds;
  epoll_event events[64];
  for (bool ours = true; ours;) {
    const double left = (deadline - distkv::seconds_now()) * 1e3;
    if (left <= 0) return;
    const int ready = epoll_wait(static_cast<int>(poller), events, 64, static_cast<int>(left) + 1);
    if (ready <= 0) {
      if (ready < 0 && errno == EINTR) continue;
      return;
    }
    for (int i = 0; i < ready; ++i) {
      distkv::Session* session = nullptr;
      for (int64_t s = 0; s < count && !session; ++s)
        if (sessions[s]->fd == events[i].data.fd) session = sessions[s];
      ours &= session && events[i].events == EPOLLIN && distkv::serve(*session, layer);
    }
  }
}

#define AT(field) DISTKV_AT(distkv::Session, field)
DISTKV_LAYOUT(session, distkv::Session,
              AT(fd), AT(frame), AT(filled), AT(frame_bytes), AT(batch), AT(q), AT(k), AT(v), AT(answer),
              AT(answer_bytes), AT(layer), AT(next), AT(expected), AT(reply), AT(answered), AT(busy), AT(sent),
              AT(status), AT(marks), AT(peer))
#undef AT

#define AT(field) DISTKV_AT(distkv::Mark, field)
DISTKV_LAYOUT(mark, distkv::Mark,
              AT(what), AT(began), AT(ended), AT(gang), AT(step), AT(layer), AT(peer), AT(size))
#undef AT

#define AT(field) DISTKV_AT(distkv::Marks, field)
DISTKV_LAYOUT(marks, distkv::Marks, AT(room), AT(capacity), AT(count), AT(lost), AT(last))
#undef AT
