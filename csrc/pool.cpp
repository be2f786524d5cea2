#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

namespace idefics2 {
namespace {

struct Job {
    const std::function<void(int64_t)>& task;
    const int64_t count;
    int64_t next = 0;     // the next task to begin
    int64_t running = 0;  // threads at work on it
    int helpers;          // more threads that may join
    std::exception_ptr error = nullptr;
    std::condition_variable idle;
};

class Pool {
public:
    void run(Job& job) {
        std::unique_lock lock(mutex_);
        while (workers_ < std::min(job.helpers, kMostWorkers)) {
            std::thread([this] { work(); }).detach();
            ++workers_;
        }
        jobs_.push_back(&job);
        for (int i = 0; i < job.helpers; ++i) wake_.notify_one();
        take_part(job, lock);
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        job.idle.wait(lock, [&] { return job.running == 0; });
        if (job.error) std::rethrow_exception(job.error);
    }

private:
    static constexpr int kMostWorkers = 1024;

    void work() {
        std::unique_lock lock(mutex_);
        while (true) {
            const auto open = std::find_if(jobs_.begin(), jobs_.end(), [](Job* job) { return job->next < job->count && job->helpers > 0; });
            if (open == jobs_.end()) {
                wake_.wait(lock);
                continue;
            }
            Job& job = **open;
            --job.helpers;
            take_part(job, lock);
            if (job.running == 0) job.idle.notify_one();  // under the lock: the job's owner cannot leave before this
        }
    }

    // Called and left with the lock held.
    static void take_part(Job& job, std::unique_lock<std::mutex>& lock) {
        ++job.running;
        while (job.next < job.count) {
            const int64_t index = job.next++;
            lock.unlock();
            std::exception_ptr error;
            try {
                job.task(index);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            if (error && !job.error) {
                job.error = error;
                job.next = job.count;
            }
        }
        --job.running;
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Job*> jobs_;
    int workers_ = 0;
};

// Never destroyed, for its threads may outlive all else. A forked child has none of the threads, and its copy of the lock may be held
// by one of them: it starts with a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& own_pool() {
    static const int registered = [] {
        pool.store(new Pool);
        return pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
    }();
    if (registered != 0) throw std::runtime_error("pthread_atfork failed with " + std::to_string(registered));
    return *pool.load();
}

int cpus_here() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(std::thread::hardware_concurrency());
}

std::atomic<int> wanted{0};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
    if (helpers > 0) {
        Job job{task, count, 0, 0, helpers, nullptr, {}};
        own_pool().run(job);
        return;
    }
    for (int64_t index = 0; index < count; ++index) task(index);
}

int num_threads() {
    const int set = wanted.load();
    return set > 0 ? set : std::max(cpus_here(), 1);
}

void set_num_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("the number of threads is " + std::to_string(threads) + ", expected 1 or more");
    wanted.store(threads);
}

}  // namespace idefics2
