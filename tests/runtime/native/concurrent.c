/* concurrent BUNDLE THREADS: four threads, of which two share a session, run the golden input many times at once. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xceptile.h"

enum { RUNS = 300 };

static uint8_t input[4096], expected[4096];
static size_t input_bytes, output_bytes;

static size_t read_file(const char *bundle, const char *name, uint8_t *data)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/golden/%s", bundle, name);
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        exit(3);
    size_t size = fread(data, 1, 4096, file);
    fclose(file);
    return size;
}

static void *run(void *session)
{
    uint8_t output[4096];
    for (int i = 0; i < RUNS; i++)
        if (xct_run(session, input, input_bytes, output, output_bytes) != XCT_OK
            || memcmp(output, expected, output_bytes) != 0)
            return "different";
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 4;
    xct_options options = {.struct_bytes = sizeof options, .threads = (uint32_t)atoi(argv[2]), .flags = XCT_TIME_STEPS};
    xct_session *sessions[3];
    for (int i = 0; i < 3; i++)
        if (xct_open(argv[1], &options, &sessions[i]) != XCT_OK)
            return 5;
    input_bytes = xct_input_bytes(sessions[0]);
    output_bytes = xct_output_bytes(sessions[0]);
    if (read_file(argv[1], "input.bin", input) < input_bytes || read_file(argv[1], "output.bin", expected) < output_bytes)
        return 6;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        if (pthread_create(&threads[i], NULL, run, sessions[i % 3]) != 0)
            return 7;
    int different = 0;
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        different += result != NULL;
    }
    for (int i = 0; i < 3; i++)
        xct_close(sessions[i]);
    return different > 0;
}
