/* What an exported TVM module asks of its runtime on a CPU, linked into the module itself.
 *
 * TVM emits three pointers as weak symbols that its own runtime fills when a module is loaded. The
 * strong, hidden ones below take their place at link time, so a module never depends on which
 * runtime the process has or when it came: it runs serially as it is, and on torch's OpenMP pool
 * once deft_set_pool has been called. __TVMBackendParallelBarrier has no counterpart here: tasks
 * are pulled, not held by one thread each, and a barrier among them would never be passed. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define EXPORTED __attribute__((visibility("default")))

/* Plan items come in descending cost: many more tasks than threads, pulled one by one, keep every
 * thread busy to the end, where one contiguous range a thread would give the first all the work. */
enum { TASKS_PER_THREAD = 32 };

/* TVM cuts a parallel loop into num_task contiguous ranges; sync serves barriers only. */
typedef struct {
  void *sync;
  int32_t num_task;
} TaskEnv;
typedef int (*Task)(int task_id, TaskEnv *env, void *closure);

typedef void (*Parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*CountThreads)(void);

static Parallel run_parallel;
static CountThreads count_threads;

EXPORTED void deft_set_pool(Parallel parallel, CountThreads threads) {
  count_threads = threads;
  run_parallel = parallel;
}

/* From apache-tvm-ffi: an error is kept by the thread in which it was raised. */
extern void TVMFFIErrorMoveFromRaised(void **error);
extern void TVMFFIErrorSetRaised(void *error);
extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);
extern int TVMFFIObjectDecRef(void *object);

typedef struct {
  Task task;
  void *closure;
  int num_task;
  atomic_int next;
  atomic_int code; /* of the first task that failed */
  void *error;
} Launch;

static void fail(Launch *launch, int code) {
  int none = 0;
  if (atomic_compare_exchange_strong(&launch->code, &none, code))
    TVMFFIErrorMoveFromRaised(&launch->error);
}

static void pull_tasks(void *data) {
  Launch *launch = data;
  TaskEnv env = {NULL, launch->num_task};
  while (!atomic_load_explicit(&launch->code, memory_order_relaxed)) {
    int id = atomic_fetch_add_explicit(&launch->next, 1, memory_order_relaxed);
    if (id >= launch->num_task) return;
    int code = launch->task(id, &env, launch->closure);
    if (code) fail(launch, code);
  }
}

static int finish(Launch *launch) {
  if (!launch->code) return 0;
  if (!launch->error) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a task of a parallel loop failed");
    return launch->code;
  }
  TVMFFIErrorSetRaised(launch->error);
  TVMFFIObjectDecRef(launch->error);
  return launch->code;
}

static int launch_parallel(Task task, void *closure, int num_task) {
  int threads = run_parallel ? count_threads() : 1;
  if (num_task <= 0) num_task = threads > 1 ? threads * TASKS_PER_THREAD : 1;
  Launch launch = {.task = task, .closure = closure, .num_task = num_task};
  if (threads > 1 && num_task > 1)
    run_parallel(pull_tasks, &launch, (unsigned)threads, 0);
  else
    pull_tasks(&launch);
  return finish(&launch);
}

/* Workspaces: each thread keeps a few blocks until it ends; large ones go back at once. */
enum { KEPT = 8, ALIGNMENT = 64, PAGE = 4096, LARGEST_KEPT = 16 << 20 };
typedef struct {
  void *block;
  size_t size;
  int used;
} Kept;

static pthread_key_t cache_key;
static pthread_once_t cache_once = PTHREAD_ONCE_INIT;

static void drop_cache(void *cache) {
  for (int i = 0; i < KEPT; ++i) free(((Kept *)cache)[i].block);
  free(cache);
}

static void make_key(void) { pthread_key_create(&cache_key, drop_cache); }

static Kept *thread_cache(void) {
  pthread_once(&cache_once, make_key);
  Kept *cache = pthread_getspecific(cache_key);
  if (!cache && (cache = calloc(KEPT, sizeof(Kept)))) pthread_setspecific(cache_key, cache);
  return cache;
}

/* The unused block that fits, else the smallest unused one, to be replaced. */
static Kept *choose(Kept *cache, size_t size) {
  Kept *smallest = NULL;
  for (Kept *kept = cache; cache && kept < cache + KEPT; ++kept) {
    if (kept->used) continue;
    if (kept->size >= size) return kept;
    if (!smallest || kept->size < smallest->size) smallest = kept;
  }
  return smallest;
}

static void *allocate(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  size_t size = (bytes / PAGE + 1) * PAGE; /* never 0: a null block would mean failure */
  Kept *kept = size > LARGEST_KEPT ? NULL : choose(thread_cache(), size);
  if (!kept) return aligned_alloc(ALIGNMENT, size);
  if (kept->size < size) {
    free(kept->block);
    kept->block = aligned_alloc(ALIGNMENT, size);
    kept->size = kept->block ? size : 0;
  }
  kept->used = kept->block != NULL;
  return kept->block;
}

static int release(int device, int id, void *block) {
  (void)device, (void)id;
  Kept *cache = thread_cache();
  for (int i = 0; cache && i < KEPT; ++i)
    if (cache[i].block == block) return cache[i].used = 0;
  free(block);
  return 0;
}

HIDDEN void *__TVMBackendParallelLaunch = (void *)launch_parallel;
HIDDEN void *__TVMBackendAllocWorkspace = (void *)allocate;
HIDDEN void *__TVMBackendFreeWorkspace = (void *)release;
