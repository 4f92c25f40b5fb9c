/* Kernels fail on many threads at once, and each thread gets the message of its own failure. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
size_t xct_take_kernel_error(char *text, size_t size);

enum { THREADS = 48, ROUNDS = 2000 };

static void *fail_often(void *context)
{
    char number[16], expected[64], seen[256];
    for (int i = 0; i < ROUNDS; i++) {
        snprintf(number, sizeof number, "%d", (int)(intptr_t)context * ROUNDS + i);
        const char *parts[] = {"expected ", number, NULL};
        TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 3);
        snprintf(expected, sizeof expected, "ValueError: expected %s", number);
        if (xct_take_kernel_error(seen, sizeof seen) != strlen(expected) || strcmp(seen, expected) != 0)
            abort();
        if (xct_take_kernel_error(seen, sizeof seen) != 0 || seen[0] != 0) /* it is forgotten */
            abort();
    }
    return NULL;
}

int main(void)
{
    pthread_t threads[THREADS];
    for (intptr_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, fail_often, (void *)i) != 0)
            return 1;
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    char cut[8];
    const char *long_part[] = {"a message of more than eight bytes"};
    TVMFFIErrorSetRaisedFromCStrParts(NULL, long_part, 1);
    return xct_take_kernel_error(cut, sizeof cut) == 7 && strcmp(cut, ": a mes") == 0 ? 0 : 1;
}
