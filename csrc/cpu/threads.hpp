// A pool of threads that outlives the calls, since a matrix is encoded in thousands of short ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace exl3 {

// Calls work(first, last) for chunks of at most `chunk` items that together cover [0, items) once,
// from at most `threads` threads, the caller's among them. Returns when all are done; an exception
// of one of them is thrown on. Any thread may call it, also several at once, also after a fork.
void parallel_chunks(int64_t items, int64_t chunk, int threads,
                     const std::function<void(int64_t, int64_t)>& work);

// At least `bytes` of memory that belongs to the calling thread, aligned to 64 bytes. It stays
// allocated for the thread's next call; what it holds is unspecified.
std::byte* thread_workspace(size_t bytes);

}  // namespace exl3
