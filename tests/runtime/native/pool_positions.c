/* A pool whose positions are about to begin again: every run must still do every task of every step once, in order, and
 * the threads must still end. */
#include "pool.c"

enum { STEPS = 2, TASKS = 40, RUNS = 6 }; /* 2 ** 40 is no multiple of STEPS + 1 */

struct count {
    _Atomic uint32_t done[STEPS];
    _Atomic bool early;
};

static int count_tasks(void *context, uint32_t step, uint32_t begin, uint32_t end, struct xct_error *error)
{
    struct count *count = context;
    (void)error;
    if (step > 0 && atomic_load(&count->done[step - 1]) % TASKS != 0)
        atomic_store(&count->early, true);
    atomic_fetch_add(&count->done[step], end - begin);
    return XCT_OK;
}

int main(void)
{
    static const uint32_t tasks[STEPS] = {TASKS, TASKS};
    struct count count = {0};
    struct xct_error error = {0};
    struct xct_pool *pool;
    if (xct_pool_open(&pool, 3, 0, STEPS, tasks, count_tasks, &count, NULL, &error) != XCT_OK)
        return 1;
    /* As after some 3e11 runs. */
    set_claim(pool, (((UINT64_C(1) << 40) - 2) / (STEPS + 1) * (STEPS + 1) - 2 * (STEPS + 1) + STEPS) << XCT_TASK_BITS);
    for (uint32_t i = 1; i <= RUNS; i++) {
        if (xct_pool_run(pool, &error) != XCT_OK)
            return 2;
        for (uint32_t k = 0; k < STEPS; k++)
            if (atomic_load(&count.done[k]) != i * TASKS)
                return 3;
    }
    xct_pool_close(pool);
    return atomic_load(&count.early) ? 4 : 0;
}
