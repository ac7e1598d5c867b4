// The threads of one call: torch's own OpenMP pool, and a counter that hands out tasks.
//
// The idea: a denoising step is about nine phases a block. One parallel region spans the step; in
// each phase every thread takes the next task from a shared counter until none is left, then waits
// for the others. Cost: a locked add per task and a barrier per phase (1-2 us at 2 threads), against
// 10 us for a new parallel region and 20-100 us for a call from Python. Handing tasks out as they
// are asked for, not in equal shares, keeps a thread that lost its core from stopping the others.
#pragma once
#include <omp.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace sd35 {

// What a phase does; names for a profile.
enum Part : int64_t { EMBED, NORM, QKV, ATTENTION, QUANTISE, OUT, UP, DOWN, FINAL, PARTS };

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
};

// One thread's view of the team; all threads go through the same phases in the same order.
struct Team {
  Counter* counters;
  float* scratch;  // this thread's own
  int64_t* nanoseconds;  // [PARTS], or null: only the first thread keeps the time
  int64_t phase = 0;

  template <class F>
  void tasks(Part part, int64_t count, F&& run) {
    const int64_t started = nanoseconds ? now() : 0;
    std::atomic<int64_t>& next = counters[phase++].next;
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) run(i);
#pragma omp barrier
    if (nanoseconds) nanoseconds[part] += now() - started;
  }

  // Time that this thread had a core: on a shared machine the only clock that repeats.
  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
  }
};

// Run body(team) on `threads` threads. scratch: `scratch_floats` for each.
template <class F>
void run_team(int threads, int64_t phases, float* scratch, int64_t scratch_floats,
              int64_t* nanoseconds, F&& body) {
  std::vector<Counter> counters(phases);
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    Team team{counters.data(), scratch + me * scratch_floats, me ? nullptr : nanoseconds};
    body(team);
  }
}

}  // namespace sd35
