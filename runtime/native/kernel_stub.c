/* Linked into every kernel library. The code that TVM generates reports a failed check through one function of TVM's
 * runtime; this is that function without TVM. The message waits in the failing thread until the runtime fetches it
 * with xct_kernel_error: TVM's interface has no context in which to hand it over. */
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
/* In a process that has TVM loaded for all to see, a call to an exported function would go to TVM's of this name. */
#define HIDDEN __attribute__((visibility("hidden")))

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
EXPORT const char *xct_kernel_error(void);

static _Thread_local char message[256];

static size_t append(size_t used, const char *text)
{
    while (text != NULL && *text != 0 && used + 1 < sizeof message)
        message[used++] = *text++;
    message[used] = 0;
    return used;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count)
{
    size_t used = append(append(0, kind), ": ");
    for (int32_t i = 0; i < count; i++)
        used = append(used, parts[i]);
}

const char *xct_kernel_error(void)
{
    return message;
}
