// The thread pool alone: built and run by tests/test_threads.py. Leaves with the line of the first thing that does not hold.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pool.hpp"

using namespace idefics2;

#define REQUIRE(condition)                                              \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("line %d: %s\n", __LINE__, #condition);        \
            std::exit(1);                                               \
        }                                                               \
    } while (false)

static void each_task_runs_once() {
    for (const int threads : {1, 2, 3, 8, 20})
        for (const int64_t count : {0, 1, 2, 7, 200}) {
            std::vector<std::atomic<int>> runs(count);
            parallel_for(count, threads, [&](int64_t i) { ++runs[i]; });
            for (const auto& times : runs) REQUIRE(times == 1);
        }
}

static void threads_are_as_many_as_asked() {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    std::mutex lock;
    std::condition_variable grown;
    std::set<std::thread::id> seen;
    parallel_for(60, 3, [&](int64_t) {
        std::unique_lock guard(lock);
        seen.insert(std::this_thread::get_id());
        grown.notify_all();
        grown.wait_until(guard, deadline, [&] { return seen.size() >= 3; });  // however seldom a thread gets its turn
        guard.unlock();
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // a fourth thread would come in here
    });
    REQUIRE(seen.size() == 3);
    REQUIRE(seen.count(std::this_thread::get_id()) == 1);
}

static void errors_reach_the_caller() {
    for (const int threads : {1, 2, 5}) {
        std::atomic<int> begun{0};
        std::atomic<bool> thrown{false};
        std::string message;
        try {
            parallel_for(2000, threads, [&](int64_t i) {
                ++begun;
                if (i == 10) {
                    thrown = true;
                    throw std::invalid_argument("ten");
                }
                // Time for the error to get through, however seldom its thread runs: 2000 of these take 20 seconds or more.
                while (i > 10 && !thrown) std::this_thread::yield();
                if (i > 10) std::this_thread::sleep_for(std::chrono::milliseconds(50));
            });
        } catch (const std::invalid_argument& error) {
            message = error.what();
        }
        REQUIRE(message == "ten");
        REQUIRE(begun < 2000);
        each_task_runs_once();  // and the pool still works
    }
}

static void calls_may_nest() {
    std::atomic<int> runs{0};
    parallel_for(6, 3, [&](int64_t) { parallel_for(6, 3, [&](int64_t) { parallel_for(6, 3, [&](int64_t) { ++runs; }); }); });
    REQUIRE(runs == 216);
}

static void calls_may_come_from_many_threads() {
    std::atomic<int64_t> sum{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller)
        callers.emplace_back([&] {
            for (int round = 0; round < 15; ++round) parallel_for(20, 4, [&](int64_t i) { sum += i; });
        });
    for (std::thread& caller : callers) caller.join();
    REQUIRE(sum == 6 * 15 * 190);
}

static void a_fork_gets_threads_of_its_own() {
    std::atomic<bool> stop{false};
    std::thread busy([&] {  // the pool's lock is taken all the time, at the moment of the fork too
        while (!stop) parallel_for(50, 3, [](int64_t) {});
    });
    for (int round = 0; round < 20; ++round) {
        const pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            alarm(20);
            std::atomic<int> runs{0};
            parallel_for(100, 4, [&](int64_t) { ++runs; });
            _exit(runs == 100 ? 0 : 1);
        }
        int status = 1;
        waitpid(child, &status, 0);
        REQUIRE(status == 0);
    }
    stop = true;
    busy.join();
}

static void waiting_costs_nothing() {
    parallel_for(100, 4, [](int64_t) {});
    const std::clock_t before = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    // and the caller sleeps too, while another thread works
    parallel_for(2, 2, [](int64_t i) { std::this_thread::sleep_for(std::chrono::milliseconds(i == 0 ? 300 : 1)); });
    REQUIRE(std::clock() - before < CLOCKS_PER_SEC / 20);
}

int main(int count, char**) {
    each_task_runs_once();
    threads_are_as_many_as_asked();
    errors_reach_the_caller();
    calls_may_nest();
    calls_may_come_from_many_threads();
    if (count == 1) {  // a sanitizer's threads do not survive a fork, and cost time
        a_fork_gets_threads_of_its_own();
        waiting_costs_nothing();
    }
    std::puts("all holds");
}
