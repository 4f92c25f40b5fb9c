/* misuse BUNDLE: every call of the library with arguments that are wrong; none may crash, each says so. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "xceptile.h"

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition);                                            \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

/* In a child of fork: its parent's session has no threads here, and a call that waited for them would never end. */
static int check_child(xct_session *session, const char *bundle)
{
    static uint8_t buffer[4096];
    char message[512];
    xct_session *own;
    (void)alarm(30);
    EXPECT(xct_run(session, buffer, 1800, buffer, 10) == XCT_ERROR_ARGUMENT && xct_input_bytes(session) == 0);
    xct_last_error(session, message, sizeof message);
    EXPECT(strstr(message, "before a fork") != NULL);
    xct_close(session);
    EXPECT(xct_open(bundle, NULL, &own) == XCT_OK);
    EXPECT(xct_run(own, buffer, xct_input_bytes(own), buffer + 2000, xct_output_bytes(own)) == XCT_OK);
    xct_close(own);
    return 0;
}

int main(int argc, char **argv)
{
    EXPECT(argc == 2);
    char message[512];
    xct_session *session = NULL;
    xct_tensor_info tensor;
    xct_step_info step;
    uint8_t buffer[4096] = {0};

    EXPECT(xct_open(argv[1], NULL, NULL) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_open(NULL, NULL, &session) == XCT_ERROR_ARGUMENT && session != NULL);
    xct_close(session);
    EXPECT(xct_open("", NULL, &session) == XCT_ERROR_ARGUMENT);
    xct_close(session);
    static char long_path[10000];
    memset(long_path, 'x', sizeof long_path - 1);
    EXPECT(xct_open(long_path, NULL, &session) == XCT_ERROR_ARGUMENT);
    xct_close(session);
    EXPECT(xct_open("no/such/folder", NULL, &session) == XCT_ERROR_FILE);
    xct_last_error(session, message, sizeof message);
    EXPECT(strstr(message, "no/such/folder is no bundle") != NULL);
    EXPECT(xct_run(session, buffer, 1, buffer, 1) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_tensor_count(session) == 0 && xct_step_count(session) == 0 && xct_threads(session) == 0);
    EXPECT(xct_input_bytes(session) == 0 && xct_output_bytes(session) == 0 && xct_arena_bytes(session) == 0);
    EXPECT(xct_tensor(session, 0, &tensor) == XCT_ERROR_ARGUMENT && xct_step(session, 0, &step) == XCT_ERROR_ARGUMENT);
    xct_close(session);

    xct_options options = {.struct_bytes = 4};
    EXPECT(xct_open(argv[1], &options, &session) == XCT_ERROR_ARGUMENT);
    xct_close(session);
    options = (xct_options){.struct_bytes = sizeof options, .flags = 1u << 31};
    EXPECT(xct_open(argv[1], &options, &session) == XCT_ERROR_ARGUMENT);
    xct_close(session);
    options = (xct_options){.struct_bytes = sizeof options, .device = XCT_DEVICE_ANY + 1};
    EXPECT(xct_open(argv[1], &options, &session) == XCT_ERROR_ARGUMENT);
    xct_close(session);
    options = (xct_options){.struct_bytes = sizeof options, .device = XCT_DEVICE_GPU};
    EXPECT(xct_open(argv[1], &options, &session) == XCT_ERROR_UNSUPPORTED);
    EXPECT(xct_device(session)[0] == 0);
    xct_close(session);
    options = (xct_options){.struct_bytes = sizeof options, .threads = 65};
    EXPECT(xct_open(argv[1], &options, &session) == XCT_ERROR_ARGUMENT);
    xct_close(session);
    options = (xct_options){.struct_bytes = sizeof options, .threads = 3, .core_mask = 1, .flags = XCT_SKIP_HASHES};
    EXPECT(xct_open(argv[1], &options, &session) == XCT_OK && xct_threads(session) == 3);
    xct_last_error(session, message, sizeof message);
    EXPECT(message[0] == 0 && strcmp(xct_device(session), "cpu") == 0);

    size_t in = xct_input_bytes(session), out = xct_output_bytes(session);
    EXPECT(in > 0 && in < sizeof buffer && out > 0 && out < sizeof buffer);
    EXPECT(xct_run(session, NULL, in, buffer, out) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_run(session, buffer, in, NULL, out) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_run(session, buffer, in + 1, buffer, out) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_run(session, buffer, in, buffer, out - 1) == XCT_ERROR_ARGUMENT);
    xct_last_error(session, message, sizeof message);
    EXPECT(strstr(message, "xct_run was given") != NULL);
    xct_last_error(session, message, 5);
    EXPECT(strlen(message) == 4);
    xct_last_error(session, NULL, 5);
    xct_last_error(session, message, 0);
    xct_last_error(NULL, message, sizeof message);
    EXPECT(message[0] != 0);
    EXPECT(xct_tensor(session, xct_tensor_count(session), &tensor) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_tensor(session, 0, NULL) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_step(session, xct_step_count(session), &step) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_step(session, 0, NULL) == XCT_ERROR_ARGUMENT);
    EXPECT(xct_step(session, 0, &step) == XCT_OK && step.last_ns == 0);
    EXPECT(xct_run(session, buffer + 1, in, buffer + 2001, out) == XCT_OK); /* callers need not align */
    const struct timespec asleep = {.tv_nsec = 10000000}; /* the threads are, after so long */
    nanosleep(&asleep, NULL);
    int status = 0;
    pid_t child = fork();
    EXPECT(child >= 0);
    if (child == 0)
        _exit(check_child(session, argv[1]));
    EXPECT(waitpid(child, &status, 0) == child && status == 0);
    xct_close(session);
    xct_close(NULL);
    EXPECT(xct_version()[0] != 0);
    return 0;
}
