// The threads of a call, and when it does without them.
//
// They are OpenMP's, which torch uses as well. Between two parallel regions these spin for some milliseconds, and in
// decoding they never stop: threads of our own would have to share the cores with them. In a loop of OpenMP regions and
// of work as long as an MLP's, that work took up to twice as long with a thread of our own, without any neighbour.
//
// A region ends when each of its threads has been there, whether or not work was left for it. If another process has
// the core of one, that takes until the scheduler's next tick, or several: milliseconds, where a layer takes tenths of
// one. Hence:
// - A call has few regions. Within one, work is handed out in pieces, and only pieces that somebody has taken are
//   waited for.
// - Time that a region lost, compared with the caller doing all of the work, is a debt, and kRest times as long has to
//   pass until it is paid. While more than kAllowed is owed, calls work alone. So threads that are kept waiting cost about
//   a share of 1 / kRest of the time (more where kLongest cuts a debt short), and what happens now and then on an idle
//   machine changes nothing.
//
// What is computed does not depend on the number of threads, so nobody sees it in the results.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace {

#if defined(HFS_POISON)  // for tests: all threads work whatever the machine is doing
constexpr int64_t kRest = 0;
#else
constexpr int64_t kRest = 30;
#endif
constexpr int64_t kUnnoticed = 100 * 1000;        // nanoseconds, as long as it may take to wake a thread
constexpr int64_t kAllowed = 10 * 1000 * 1000;    // nanoseconds, of a few ticks
constexpr int64_t kLongest = 1000 * 1000 * 1000;  // nanoseconds of working alone: a process may have been stopped
constexpr int kSpins = 1000;                      // some microseconds

std::atomic<int64_t> all_paid{0};  // the time when nothing will be owed

int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Of `threads` as many as it is wise to use now.
inline int sensible(int threads) {
  if (threads <= 1) return 1;
  const int64_t paid = all_paid.load(std::memory_order_relaxed);
  return paid - nanoseconds(CLOCK_MONOTONIC) > kRest * kAllowed ? 1 : threads;
}

// One thread in a region.
struct Worker {
  int64_t index;     // from 0, less than the number of threads
  int64_t idle = 0;  // nanoseconds on its core without work
};

// One phase of the work of a region, in pieces 0 … count - 1.
class Pieces {
 public:
  explicit Pieces(int64_t count) : left_(count), count_(count) {}

  // Works on pieces until all are taken.
  template <class Work>
  void share(Work work) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      work(i);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Until all are done, by whomever; then what they wrote can be read.
  void wait(Worker& me) const {
    if (done()) return;
    const int64_t start = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    // Who holds the last piece may be waiting for this very core.
    for (int i = 0; !done(); ++i)
      if (i >= kSpins) std::this_thread::yield();
    me.idle += nanoseconds(CLOCK_THREAD_CPUTIME_ID) - start;
  }

 private:
  bool done() const { return left_.load(std::memory_order_acquire) == 0; }

  std::atomic<int64_t> next_{0}, left_;
  const int64_t count_;
};

// How many rows of so many bytes are a piece, of `rows` in all: a few microseconds to read, where to take a piece takes
// tens of nanoseconds, and so many pieces for each thread that none waits long for the last.
inline int64_t rows_of_piece(int64_t bytes, int64_t rows, int threads) {
  constexpr int64_t kPieceBytes = 32 * 1024, kEach = 32;
  return std::max((kPieceBytes + bytes - 1) / bytes, rows / (kEach * threads));
}

// A region: calls work(Worker&) on each of so many threads.
template <class Work>
void together(int threads, Work work) {
  if (threads <= 1) {
    Worker alone = {0};
    return work(alone);
  }
  std::atomic<int64_t> workers{0}, worked{0};
  const int64_t start = nanoseconds(CLOCK_MONOTONIC);
#pragma omp parallel num_threads(threads)
  {
    const int64_t before = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    Worker me = {workers.fetch_add(1, std::memory_order_relaxed)};
    work(me);
    worked.fetch_add(nanoseconds(CLOCK_THREAD_CPUTIME_ID) - before - me.idle, std::memory_order_relaxed);
  }
  const int64_t end = nanoseconds(CLOCK_MONOTONIC), lost = end - start - worked.load(std::memory_order_relaxed);
  if (lost <= kUnnoticed) return;
  const int64_t paid = all_paid.load(std::memory_order_relaxed);  // another thread's debt may be lost: then it owes less
  all_paid.store(std::min(std::max(paid, end) + kRest * lost, end + kRest * kAllowed + kLongest),
                 std::memory_order_relaxed);
}

}  // namespace
