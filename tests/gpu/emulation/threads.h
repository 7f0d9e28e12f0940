// The threads of a block as coroutines of one operating-system thread.
//
// Each runs on to its next barrier, those of low numbers first or those of high ones: so a run can be
// repeated, and of two threads that no barrier keeps apart either comes first in one of two runs.
// What would hang or be undefined on a GPU ends the launch with a sentence.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define UNSEEN __attribute__((no_sanitize("thread")))
#else
#define UNSEEN
#endif

struct Index { int x, y, z; };
static Index threadIdx, blockIdx;

constexpr int WARP = 32, GROUP = 128, MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 << 10;
// NaN in every floating-point type, and far out of bounds as an index.
constexpr int POISON = 0xFF;

alignas(1024) static unsigned char buf_dyn_shmem_ptr[232448];
// Arrays of `__shared__` lie together in a section, whose ends the linker names.
#define STATIC_SHARED __attribute__((section("static_shared"), used))
STATIC_SHARED static unsigned char first_of_static_shared[64] = {};
extern unsigned char __start_static_shared[] __attribute__((visibility("hidden")));
extern unsigned char __stop_static_shared[] __attribute__((visibility("hidden")));

struct Barrier {
  int expected, arrived, phase, line;
  // Two, so that who goes ahead to the next meeting is not taken to have been at this one.
  char synchronised[2];
};

struct Coroutine {
  ucontext_t start;
  char* stack;
  const Barrier* waits_at;
  int phase;
  bool done;
#ifdef __SANITIZE_THREAD__
  void* fiber;
#else
  jmp_buf place;
#endif
};

static Coroutine coroutines[MOST_THREADS];
static Barrier block_barrier, warp_barriers[MOST_THREADS / WARP];
static int thread_count, running, last_first;
static long skipped_statements;  // a bit for each that can be left out, as a mistake
static const void* body_of_block;
static void (*call_body)();
static char block_begins, block_ends;
static Coroutine main_routine;
static char failure[256];

static inline int thread_number() { return threadIdx.y * WARP + threadIdx.x; }
static inline int lane_number() { return threadIdx.x; }

UNSEEN static Coroutine& routine(int number) {
  return number < 0 ? main_routine : coroutines[number];
}

// Goes on with thread `next`, or with the launch itself for -1.
UNSEEN static void switch_to(int next) {
  Coroutine &from = routine(running), &to = routine(next);
  running = next;
  if (next >= 0) threadIdx = {next % WARP, next / WARP, 0};
  if (&from == &to) return;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&from.start, &to.start);
#else
  // Without the system call that swapcontext makes for signal masks.
  if (_setjmp(from.place)) return;
  if (to.phase < 0) {
    to.phase = 0;
    setcontext(&to.start);
  }
  _longjmp(to.place, 1);
#endif
}

// Ends the launch.
UNSEEN static void fail(const char* sentence, int line = 0) {
  if (!failure[0]) {
    int n = snprintf(failure, sizeof failure, "block %d, thread %d: %s", blockIdx.x, running, sentence);
    if (line) snprintf(failure + n, sizeof failure - n, " (line %d)", line);
  }
  switch_to(-1);
}

UNSEEN static bool ready(const Coroutine& thread) {
  if (thread.done) return false;
  return !thread.waits_at || thread.waits_at->phase != thread.phase;
}

// Goes on with the first thread of [begin, begin + count) that can; false if none can.
UNSEEN static bool run_one_of(int begin, int count) {
  for (int i = 0; i < count; ++i) {
    int number = begin + (last_first ? count - 1 - i : i);
    if (ready(coroutines[number])) {
      switch_to(number);
      return true;
    }
  }
  return false;
}

// Who runs when the running thread waits: the first that can, of its warp or of the block.
UNSEEN static void run_next(bool in_warp) {
  if (in_warp && run_one_of(running / WARP * WARP, WARP)) return;
  if (run_one_of(0, thread_count)) return;
  for (int number = 0; number < thread_count; ++number)
    if (!coroutines[number].done) {
      running = number;
      fail("waits at a barrier that not all threads reach", coroutines[number].waits_at->line);
    }
  switch_to(-1);
}

// Waits until all have come; the last one to come does `last` for all of them.
template <class Last>
UNSEEN static void meet(Barrier& barrier, int line, Last last) {
  if (barrier.arrived && barrier.line != line) fail("is at another barrier than others", line);
  barrier.line = line;
  char* synchronised = &barrier.synchronised[barrier.phase & 1];
#ifdef __SANITIZE_THREAD__
  __tsan_release(synchronised);
#endif
  Coroutine& self = coroutines[running];
  self.waits_at = &barrier;
  self.phase = barrier.phase;
  if (++barrier.arrived == barrier.expected) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(synchronised);
#endif
    last();
#ifdef __SANITIZE_THREAD__
    __tsan_release(synchronised);
#endif
    barrier.arrived = 0;
    ++barrier.phase;
  }
  run_next(&barrier != &block_barrier);
  self.waits_at = nullptr;
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(synchronised);
#endif
}

#define __syncthreads() meet(block_barrier, __LINE__, [] {})
static inline void __syncwarp(unsigned = ~0u) { meet(warp_barriers[threadIdx.y], 0, [] {}); }

// A warp's lanes give what they have, and the last to come does `work` with that of all.
template <class Given, class Work>
static void as_warp(Given& mine, Work work) {
  static void* given[MOST_THREADS];
  given[thread_number()] = &mine;
  Given** all = (Given**)given + threadIdx.y * WARP;
  meet(warp_barriers[threadIdx.y], 0, [=] { work(all); });
}

UNSEEN static void live() {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(&block_begins);
#endif
  call_body();
#ifdef __SANITIZE_THREAD__
  __tsan_release(&block_ends);
#endif
  coroutines[running].done = true;
  run_next(false);
}

UNSEEN static void start(Coroutine& thread) {
  if (!thread.stack) thread.stack = (char*)malloc(STACK_BYTES);
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack;
  thread.start.uc_stack.ss_size = STACK_BYTES;
  makecontext(&thread.start, live, 0);
  thread.waits_at = nullptr;
  thread.done = false;
  thread.phase = -1;
}

UNSEEN static void forget_shared_memory() {
  std::memset(buf_dyn_shmem_ptr, POISON, sizeof buf_dyn_shmem_ptr);
  std::memset(__start_static_shared, POISON, __stop_static_shared - __start_static_shared);
}

// Runs blocks one after the other; the sentence of what went wrong, or null.
template <class Body>
UNSEEN static const char* run_blocks(int blocks, int threads, int reversed, const Body& body) {
  thread_count = threads, last_first = reversed, running = -1;
  body_of_block = &body;
  call_body = [] { (*(const Body*)body_of_block)(); };
  failure[0] = 0;
#ifdef __SANITIZE_THREAD__
  main_routine.fiber = __tsan_get_current_fiber();
  for (int number = 0; number < threads; ++number)
    coroutines[number].fiber = __tsan_create_fiber(0);
#endif
  for (int block = 0; block < blocks && !failure[0]; ++block) {
    blockIdx = {block, 0, 0};
    block_barrier = {threads, 0, 0, 0, {}};
    for (int warp = 0; warp < threads / WARP; ++warp) warp_barriers[warp] = {WARP, 0, 0, 0, {}};
    forget_shared_memory();
    for (int number = 0; number < threads; ++number) start(coroutines[number]);
#ifdef __SANITIZE_THREAD__
    __tsan_release(&block_begins);
#endif
    run_next(false);
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(&block_ends);
#endif
  }
  return failure[0] ? failure : nullptr;
}
