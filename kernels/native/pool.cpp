// The caller always works too and takes what its helpers leave, so a helper that wakes late (or was lost in a fork)
// delays nothing. A layer posts several jobs with short pauses in between, and waking a thread takes as long as a small
// job: a helper that has worked looks for the next job for a moment before it sleeps, as does a caller for the helpers'
// end. Not for longer: other processes need the cores too.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace distkv {
namespace {

constexpr std::chrono::microseconds kMoment{50};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done(), but not longer than a moment.
template <class Done>
void wait_a_moment(Done done) {
  const auto until = std::chrono::steady_clock::now() + kMoment;
  while (!done() && std::chrono::steady_clock::now() < until)
    for (int i = 0; i < 8; ++i) pause();
}

struct Job {
  void (*work)(void*, int64_t);
  void* context;
  int64_t items;
  int64_t wanted;  // helpers that may still join
  Job* next;
  std::atomic<int64_t> active{0};  // helpers at work; changed with the mutex
  std::atomic<int64_t> taken{0};
  std::condition_variable idle;

  void help() {
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < items;) work(context, i);
  }
};

struct Pool {
  std::mutex mutex;
  std::condition_variable posted;
  Job* jobs = nullptr;
  int64_t helpers = 0;
  std::atomic<uint64_t> jobs_posted{0};

  Job* open_job() {
    for (Job* job = jobs; job; job = job->next)
      if (job->wanted > 0) return job;
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      Job* job;
      if (!(job = open_job())) {
        const uint64_t seen = jobs_posted.load(std::memory_order_relaxed);
        lock.unlock();
        wait_a_moment([&] { return jobs_posted.load(std::memory_order_relaxed) != seen; });
        lock.lock();
      }
      posted.wait(lock, [&] { return (job = open_job()) != nullptr; });
      --job->wanted;
      ++job->active;
      lock.unlock();
      job->help();
      lock.lock();
      if (--job->active == 0) job->idle.notify_one();
    }
  }

  void post(Job* job) {
    std::lock_guard<std::mutex> lock(mutex);
    int64_t demand = job->wanted;
    for (Job* other = jobs; other; other = other->next) demand += other->wanted + other->active;
    try {
      for (; helpers < demand; ++helpers) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // the system allows no more threads: fewer help
    }
    job->next = jobs;
    jobs = job;
    jobs_posted.fetch_add(1, std::memory_order_relaxed);
  }

  void close(Job* job) {
    std::unique_lock<std::mutex> lock(mutex);
    for (Job** at = &jobs; *at; at = &(*at)->next)
      if (*at == job) {
        *at = job->next;
        break;
      }
    if (job->active > 0) {
      lock.unlock();
      wait_a_moment([&] { return job->active.load(std::memory_order_relaxed) == 0; });
      lock.lock();  // the last helper has told, and touches the job no longer
    }
    job->idle.wait(lock, [&] { return job->active == 0; });
  }
};

Pool* pool = new Pool;  // never deleted: helpers may outlive static destructors

#if defined(__unix__) || defined(__APPLE__)
// A forked child has none of the helpers, and perhaps a locked mutex: it gets a new pool.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif

}  // namespace

void run_items(void (*work)(void*, int64_t), void* context, int64_t items, int64_t threads) {
  Job job{work, context, items, (threads < items ? threads : items) - 1, nullptr};
  if (job.wanted <= 0) {
    job.help();
    return;
  }
  Pool* mine = pool;
  const int64_t wake = job.wanted;
  mine->post(&job);
  for (int64_t i = 0; i < wake; ++i) mine->posted.notify_one();
  job.help();
  mine->close(&job);
}

}  // namespace distkv
