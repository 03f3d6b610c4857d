#include "cpu/threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace exl3 {
namespace {

// One call of parallel_chunks. Threads join it, take chunks until none is left, and leave.
struct Job {
  int64_t items, chunk;
  const std::function<void(int64_t, int64_t)>& work;
  int seats;                         // how many pool threads may still join; guarded by the pool
  int present = 0;                   // pool threads that have joined and not left; guarded too
  std::atomic<int64_t> next{0};      // first item that nobody has taken
  std::exception_ptr failure{};      // of a pool thread; guarded by the pool
  std::condition_variable left{};    // a pool thread has left

  void take_chunks() {
    for (int64_t first; (first = next.fetch_add(chunk)) < items;) {
      work(first, std::min(first + chunk, items));
    }
  }
};

class Pool {
 public:
  static Pool& instance();

  void run(Job& job) {
    offer(job);
    std::exception_ptr failure;
    try {
      job.take_chunks();
    } catch (...) {
      job.next = job.items;
      failure = std::current_exception();
    }
    withdraw(job);
    if (!failure) failure = job.failure;
    if (failure) std::rethrow_exception(failure);
  }

 private:
  void offer(Job& job) {
    const std::lock_guard lock(mutex_);
    while (threads_ < job.seats) {
      std::thread([this] { serve(); }).detach();
      ++threads_;
    }
    jobs_.push_back(&job);
    for (int i = 0; i < job.seats; ++i) offered_.notify_one();
  }

  // Nobody joins any more; waits for those who have.
  void withdraw(Job& job) {
    std::unique_lock lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    job.left.wait(lock, [&job] { return job.present == 0; });
  }

  [[noreturn]] void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      offered_.wait(lock, [this] { return !jobs_.empty(); });
      Job& job = *jobs_.front();
      if (--job.seats == 0) jobs_.pop_front();
      ++job.present;
      lock.unlock();
      std::exception_ptr failure;
      try {
        job.take_chunks();
      } catch (...) {
        job.next = job.items;
        failure = std::current_exception();
      }
      lock.lock();
      if (failure) job.failure = failure;
      --job.present;
      // The job lives on its caller's stack: notified under the lock, before it can go away.
      job.left.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable offered_;
  std::deque<Job*> jobs_;  // those with free seats
  int threads_ = 0;
};

// Never destroyed: its threads wait on it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& Pool::instance() {
  if (Pool* pool = the_pool.load(std::memory_order_acquire)) return *pool;
#ifndef _WIN32
  // A forked child has none of the pool's threads, and perhaps a locked mutex: it starts afresh.
  static std::atomic<bool> registered{false};
  if (!registered.exchange(true)) {
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_relaxed); });
  }
#endif
  auto made = std::make_unique<Pool>();
  Pool* expected = nullptr;
  if (the_pool.compare_exchange_strong(expected, made.get())) return *made.release();
  return *expected;
}

constexpr std::align_val_t kAlignment{64};

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { release(); }

  std::byte* at_least(size_t bytes) {
    if (bytes > bytes_) {
      release();
      data_ = static_cast<std::byte*>(::operator new(bytes, kAlignment));
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
    data_ = nullptr;
    bytes_ = 0;
  }

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace

void parallel_chunks(int64_t items, int64_t chunk, int threads,
                     const std::function<void(int64_t, int64_t)>& work) {
  const int64_t chunks = (items + chunk - 1) / chunk;
  const int seats = static_cast<int>(std::min<int64_t>(threads, chunks)) - 1;
  Job job{items, chunk, work, seats};
  if (seats <= 0) {
    job.take_chunks();
  } else {
    Pool::instance().run(job);
  }
}

std::byte* thread_workspace(size_t bytes) {
  thread_local Workspace workspace;
  return workspace.at_least(bytes);
}

}  // namespace exl3
