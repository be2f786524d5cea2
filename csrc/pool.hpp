// Threads of this module's own. They sleep on a condition variable while there is nothing to do: they never spin.
#pragma once

#include <cstdint>
#include <functional>

namespace idefics2 {

// Runs task(0) .. task(count - 1) on at most `threads` threads, the caller's among them, and returns when all have ended. The first
// exception of a task is thrown here, after which no further task begins. May be called from any number of threads at once, from within
// a task, and after a fork.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// How many threads are used where a call does not say: the CPUs this process may run on, until set otherwise.
int num_threads();
void set_num_threads(int threads);

}  // namespace idefics2
