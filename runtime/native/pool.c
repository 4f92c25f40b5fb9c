/* The threads of a session.
 *
 * The steps of a network run one after the other; the tasks of one step run on all threads. One 64-bit word says
 * everything: the position (which step of which run is open) in its upper 40 bits, the next task that nobody has taken
 * in its lower 24. A thread takes a chunk of tasks by compare-and-swap on that word, so a thread that comes late, or
 * was put to sleep between reading and swapping, can only fail to swap: it never takes a task of another step, and
 * nobody waits for it. Whoever finishes the last task of a step opens the next one.
 *
 * Chunks shrink as a step nears its end (guided self-scheduling, Polychronopoulos and Kuck 1987), so that a slow core
 * beside a fast one delays a step by one small chunk at most. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

#define MAX_THREADS 64u
#define SPIN_NS 100000u /* a waiting thread spins so long, about one step, before it sleeps */
#define CLOSED UINT64_MAX
#define TASK_MASK ((UINT64_C(1) << XCT_TASK_BITS) - 1)

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "the claim word must be lock-free");

struct xct_pool {
    _Alignas(64) _Atomic uint64_t claim; /* position << XCT_TASK_BITS | next task; CLOSED: the threads end */
    _Alignas(64) _Atomic uint32_t finished; /* tasks of the open step */
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic bool failed;
    uint32_t steps;
    uint64_t positions; /* after so many they begin again: a multiple of a run's, and CLOSED has none of them */
    const uint32_t *tasks;
    xct_task_fn function;
    void *context;
    uint64_t *step_ns;
    uint64_t opened_ns; /* when the open step was opened */
    uint64_t spin_ns;
    uint64_t core_mask;
    uint32_t threads;
    uint32_t started; /* of the threads - 1 workers */
    pthread_t workers[MAX_THREADS];
    struct xct_error error; /* of the first task that failed; under lock */
    pthread_mutex_t lock;
    pthread_cond_t changed; /* the position */
};

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The word is compared with `claim` in its position only: claims made by others are no reason to wake. */
static bool moved(struct xct_pool *pool, uint64_t claim)
{
    return atomic_load(&pool->claim) >> XCT_TASK_BITS != claim >> XCT_TASK_BITS;
}

static void wait_past(struct xct_pool *pool, uint64_t claim)
{
    uint64_t start = pool->spin_ns > 0 ? now_ns() : 0;
    while (pool->spin_ns > 0 && now_ns() - start < pool->spin_ns)
        for (int i = 0; i < 32; i++) {
            if (moved(pool, claim))
                return;
            relax();
        }
    pthread_mutex_lock(&pool->lock);
    /* Sequentially consistent with set_claim: either it sees this sleeper, or this thread sees its position. */
    atomic_fetch_add(&pool->sleepers, 1);
    while (!moved(pool, claim))
        pthread_cond_wait(&pool->changed, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
}

static void set_claim(struct xct_pool *pool, uint64_t claim)
{
    atomic_store(&pool->claim, claim);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->changed);
        pthread_mutex_unlock(&pool->lock);
    }
}

static void run_tasks(struct xct_pool *pool, uint32_t step, uint32_t begin, uint32_t end)
{
    struct xct_error error = {0};
    /* After a failure the remaining tasks are only counted off. */
    if (atomic_load_explicit(&pool->failed, memory_order_relaxed)
        || pool->function(pool->context, step, begin, end, &error) == XCT_OK)
        return;
    pthread_mutex_lock(&pool->lock);
    if (!atomic_load(&pool->failed))
        pool->error = error;
    atomic_store(&pool->failed, true);
    pthread_mutex_unlock(&pool->lock);
}

static void finish_step(struct xct_pool *pool, uint64_t position, uint32_t step)
{
    if (pool->step_ns != NULL) {
        uint64_t now = now_ns();
        pool->step_ns[step] = now - pool->opened_ns;
        pool->opened_ns = now;
    }
    atomic_store_explicit(&pool->finished, 0, memory_order_relaxed);
    set_claim(pool, (position + 1) % pool->positions << XCT_TASK_BITS);
}

/* Works until the pool closes (a worker) or the run ends (the caller). */
static void work(struct xct_pool *pool, bool is_caller)
{
    for (;;) {
        uint64_t claim = atomic_load_explicit(&pool->claim, memory_order_acquire);
        if (claim == CLOSED)
            return;
        uint64_t position = claim >> XCT_TASK_BITS;
        uint32_t step = (uint32_t)(position % (pool->steps + 1u));
        if (step == pool->steps) { /* between two runs */
            if (is_caller)
                return;
            wait_past(pool, claim);
            continue;
        }
        uint32_t next = (uint32_t)(claim & TASK_MASK), tasks = pool->tasks[step];
        if (next >= tasks) {
            wait_past(pool, claim);
            continue;
        }
        uint32_t shares = pool->threads == 1 ? 1 : 2 * pool->threads;
        uint32_t chunk = (tasks - next + shares - 1) / shares;
        if (!atomic_compare_exchange_strong(&pool->claim, &claim, claim + chunk))
            continue;
        run_tasks(pool, step, next, next + chunk);
        if (atomic_fetch_add_explicit(&pool->finished, chunk, memory_order_acq_rel) + chunk == tasks)
            finish_step(pool, position, step);
    }
}

static void *worker(void *argument)
{
    struct xct_pool *pool = argument;
    if (pool->core_mask != 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (unsigned i = 0; i < 64; i++)
            if (pool->core_mask >> i & 1)
                CPU_SET(i, &set);
        /* A core that is offline or forbidden costs speed, not correctness: the thread then stays where it was. */
        (void)sched_setaffinity(0, sizeof set, &set);
    }
    work(pool, false);
    return NULL;
}

/* How many processors this process may use, of those in core_mask (0: all). At least 1. */
static uint32_t count_processors(uint64_t core_mask)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 1;
    uint32_t count = 0;
    for (unsigned i = 0; i < CPU_SETSIZE; i++)
        count += CPU_ISSET(i, &set) && (core_mask == 0 || (i < 64 && core_mask >> i & 1));
    return count > 0 ? count : 1;
}

static int start_workers(struct xct_pool *pool, struct xct_error *error)
{
    /* The application's signals are for its own threads; those that a thread raises itself by a fault are not to be
     * blocked, or the application's crash handler would not be called. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS};
    sigset_t others, before;
    sigfillset(&others);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++)
        sigdelset(&others, faults[i]);
    int failure = pthread_sigmask(SIG_SETMASK, &others, &before);
    if (failure != 0)
        return xct_fail(error, XCT_ERROR_THREAD, "cannot block signals: %s", strerror(failure));
    while (pool->started < pool->threads - 1 && failure == 0) {
        failure = pthread_create(&pool->workers[pool->started], NULL, worker, pool);
        if (failure == 0)
            pool->started++;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failure != 0)
        return xct_fail(error, XCT_ERROR_THREAD, "cannot start thread %u of %u: %s", pool->started + 2, pool->threads,
                        strerror(failure));
    return XCT_OK;
}

int xct_pool_open(struct xct_pool **out, uint32_t threads, uint64_t core_mask, uint32_t steps, const uint32_t *tasks,
                  xct_task_fn function, void *context, uint64_t *step_ns, struct xct_error *error)
{
    *out = NULL;
    uint32_t processors = count_processors(core_mask);
    if (threads == 0)
        threads = processors < MAX_THREADS ? processors : MAX_THREADS;
    if (threads > MAX_THREADS)
        return xct_fail(error, XCT_ERROR_ARGUMENT, "%u threads, at most %u are possible", threads, MAX_THREADS);
    void *memory = NULL;
    if (posix_memalign(&memory, 64, sizeof(struct xct_pool)) != 0)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory for the threads");
    struct xct_pool *pool = memory;
    memset(pool, 0, sizeof *pool);
    pool->steps = steps;
    pool->positions = (CLOSED >> XCT_TASK_BITS) / (steps + UINT64_C(1)) * (steps + UINT64_C(1));
    pool->tasks = tasks;
    pool->function = function;
    pool->context = context;
    pool->step_ns = step_ns;
    pool->threads = threads;
    pool->core_mask = core_mask;
    /* With more threads than processors a spinning thread keeps a processor from one that has work. */
    pool->spin_ns = threads <= count_processors(0) ? SPIN_NS : 0;
    atomic_init(&pool->claim, (uint64_t)steps << XCT_TASK_BITS);
    if (pthread_mutex_init(&pool->lock, NULL) != 0) {
        free(pool);
        return xct_fail(error, XCT_ERROR_THREAD, "cannot make a mutex");
    }
    if (pthread_cond_init(&pool->changed, NULL) != 0) {
        pthread_mutex_destroy(&pool->lock);
        free(pool);
        return xct_fail(error, XCT_ERROR_THREAD, "cannot make a condition variable");
    }
    int code = start_workers(pool, error);
    if (code != XCT_OK) {
        xct_pool_close(pool);
        return code;
    }
    *out = pool;
    return XCT_OK;
}

int xct_pool_run(struct xct_pool *pool, struct xct_error *error)
{
    uint64_t position = atomic_load(&pool->claim) >> XCT_TASK_BITS;
    atomic_store(&pool->failed, false);
    if (pool->step_ns != NULL)
        pool->opened_ns = now_ns();
    set_claim(pool, (position + 1) % pool->positions << XCT_TASK_BITS);
    work(pool, true);
    if (!atomic_load(&pool->failed))
        return XCT_OK;
    pthread_mutex_lock(&pool->lock);
    *error = pool->error;
    pthread_mutex_unlock(&pool->lock);
    return error->code;
}

uint32_t xct_pool_threads(const struct xct_pool *pool)
{
    return pool->threads;
}

void xct_pool_close(struct xct_pool *pool)
{
    if (pool == NULL)
        return;
    set_claim(pool, CLOSED);
    for (uint32_t i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}
