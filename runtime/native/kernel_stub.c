/* Linked into every kernel library. The code that TVM generates reports a failed check through one function of TVM's
 * runtime; this is that function without TVM. The message waits until the runtime fetches it, on the thread that the
 * kernel failed on: TVM's interface has no context in which to hand it over. It waits in a table, not in a _Thread_local:
 * that needs the C library's loader on x86-64, and a relocation that Android knows from version 10 on. */
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
/* In a process that has TVM loaded for all to see, a call to an exported function would go to TVM's of this name. */
#define HIDDEN __attribute__((visibility("hidden")))

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
EXPORT size_t xct_take_kernel_error(char *text, size_t size);

enum { MESSAGES = 64 }; /* that wait at once; a thread takes its own as soon as the kernel has returned */

static struct message {
    void *thread; /* whose it is, by its thread pointer; NULL: nobody's */
    char text[256];
} messages[MESSAGES];

/* The calling thread's message; a free one if it has none and new is set; or NULL. */
static struct message *own_message(int new)
{
    void *thread = __builtin_thread_pointer();
    for (int i = 0; i < MESSAGES; i++)
        if (__atomic_load_n(&messages[i].thread, __ATOMIC_RELAXED) == thread)
            return &messages[i];
    for (int i = 0; new && i < MESSAGES; i++) {
        void *nobody = NULL;
        if (__atomic_compare_exchange_n(&messages[i].thread, &nobody, thread, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return &messages[i];
    }
    return NULL;
}

static size_t append(char *text, size_t used, size_t size, const char *more)
{
    while (more != NULL && *more != 0 && used + 1 < size)
        text[used++] = *more++;
    text[used] = 0;
    return used;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count)
{
    struct message *message = own_message(1);
    if (message == NULL)
        return;
    size_t used = append(message->text, append(message->text, 0, sizeof message->text, kind), sizeof message->text, ": ");
    for (int32_t i = 0; i < count; i++)
        used = append(message->text, used, sizeof message->text, parts[i]);
}

/* Copies the calling thread's message and forgets it; returns its length, 0 if there is none. size is at least 1. */
size_t xct_take_kernel_error(char *text, size_t size)
{
    struct message *message = own_message(0);
    size_t length = append(text, 0, size, message != NULL ? message->text : NULL);
    if (message != NULL)
        __atomic_store_n(&message->thread, NULL, __ATOMIC_RELEASE);
    return length;
}
