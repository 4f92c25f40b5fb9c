/* Messages of errors. */
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

int xct_fail(struct xct_error *error, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (vsnprintf(error->message, sizeof error->message, format, arguments) < 0)
        error->message[0] = 0;
    va_end(arguments);
    error->code = code;
    return code;
}
