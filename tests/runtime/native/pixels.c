/* Usage: pixels BUNDLE < PIXELS > INPUT. Converts one image's pixels, in place and aside, and tries wrong sizes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xceptile.h"

int main(int count, char **words)
{
    xct_session *session = NULL;
    if (count != 2 || xct_open(words[1], NULL, &session) != XCT_OK)
        return 2;
    size_t size = (size_t)xct_input_bytes(session);
    unsigned char *pixels = malloc(size), *input = malloc(size);
    int sound = pixels != NULL && input != NULL && fread(pixels, 1, size, stdin) == size;
    sound = sound && xct_quantize_pixels(session, pixels, size, input, size) == XCT_OK;
    sound = sound && xct_quantize_pixels(session, pixels, size - 1, input, size) == XCT_ERROR_ARGUMENT;
    sound = sound && xct_quantize_pixels(session, pixels, size, input, size + 1) == XCT_ERROR_ARGUMENT;
    sound = sound && xct_quantize_pixels(session, NULL, size, input, size) == XCT_ERROR_ARGUMENT;
    sound = sound && xct_quantize_pixels(NULL, pixels, size, input, size) == XCT_ERROR_ARGUMENT;
    sound = sound && xct_quantize_pixels(session, pixels, size, pixels, size) == XCT_OK;
    sound = sound && memcmp(pixels, input, size) == 0 && fwrite(input, 1, size, stdout) == size;
    free(pixels);
    free(input);
    xct_close(session);
    return sound ? 0 : 1;
}
