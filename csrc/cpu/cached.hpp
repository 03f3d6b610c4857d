// A table made on first use and kept for the life of the process.
#pragma once

#include <atomic>
#include <memory>

namespace exl3 {

// Without a lock, so that a process forked in the middle of a call cannot inherit a held one: two
// threads that come first at the same time both make the table and one of the two is dropped.
template <class Table>
class Cached {
 public:
  template <class Make>
  const Table& get(Make make) {
    if (const Table* table = table_.load(std::memory_order_acquire)) return *table;
    std::unique_ptr<const Table> made(make());
    const Table* expected = nullptr;
    if (table_.compare_exchange_strong(expected, made.get(), std::memory_order_acq_rel)) {
      return *made.release();
    }
    return *expected;
  }

 private:
  std::atomic<const Table*> table_{nullptr};
};

}  // namespace exl3
