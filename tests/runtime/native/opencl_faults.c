/* opencl_faults BUNDLE: opens and runs the bundle on the fake OpenCL that XCEPTILE_OPENCL names, once for every call
 * that can fail: of the library's functions, and of malloc and calloc (linked with --wrap). Writes a line for each:
 * the function, which call of it, whether opening or the first run failed, the code and the first line of the message.
 * Whatever failed, nothing may be left behind, an output that failed is untouched, and the next run is right. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xceptile.h"

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s, call %d: not so in line %d: %s\n", function, n, __LINE__, #condition);                \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static int allocations, failing_allocation; /* 0: none fails */

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);

void *__wrap_malloc(size_t size)
{
    return ++allocations == failing_allocation ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    return ++allocations == failing_allocation ? NULL : __real_calloc(count, size);
}

static void (*fail)(const char *name, int n, int code);
static int (*has_failed)(void);
static int (*live_objects)(void);

static uint8_t input[4096], right[4096], output[4096];
static size_t input_bytes, output_bytes;

static void report(xct_session *session, const char *function, int n, const char *when, int code)
{
    char message[4096];
    xct_last_error(session, message, sizeof message);
    message[strcspn(message, "\n")] = 0;
    EXPECT(code == 0 || message[0] != 0);
    printf("%s\t%d\t%s\t%d\t%s\n", function, n, when, code, code != 0 ? message : "");
}

static void run(xct_session *session, const char *function, int n)
{
    memset(output, 0x55, sizeof output);
    int code = xct_run(session, input, input_bytes, output, output_bytes);
    report(session, function, n, "run", code);
    for (size_t i = 0; code != XCT_OK && i < sizeof output; i++)
        EXPECT(output[i] == 0x55);
    EXPECT(code != XCT_OK || memcmp(output, right, output_bytes) == 0);
    failing_allocation = 0;
    EXPECT(code == XCT_OK || xct_run(session, input, input_bytes, output, output_bytes) == XCT_OK);
    EXPECT(memcmp(output, right, output_bytes) == 0);
}

/* Returns whether the n-th call was reached. */
static int try_one(const char *bundle, const char *function, int n, int code)
{
    const xct_options options = {.struct_bytes = sizeof options, .flags = XCT_TIME_STEPS};
    xct_session *session = NULL;
    int is_malloc = strcmp(function, "malloc") == 0;
    allocations = 0;
    failing_allocation = is_malloc ? n : 0;
    fail(is_malloc ? "" : function, n, code);
    int opened = xct_open(bundle, &options, &session);
    if (opened != XCT_OK)
        report(session, function, n, "open", opened);
    else
        run(session, function, n);
    failing_allocation = 0;
    int reached = is_malloc ? allocations >= n : has_failed();
    xct_close(session);
    EXPECT(live_objects() == 0);
    return reached;
}

static void *need(void *library, const char *name)
{
    void *symbol = dlsym(library, name);
    if (symbol == NULL) {
        fprintf(stderr, "no %s\n", name);
        exit(1);
    }
    return symbol;
}

int main(int argc, char **argv)
{
    static const char *const functions[] = {
        "clGetPlatformIDs", "clGetPlatformInfo", "clGetDeviceIDs", "clGetDeviceInfo", "clCreateContext",
        "clCreateCommandQueue", "clCreateBuffer", "clCreateSubBuffer", "clCreateProgramWithSource",
        "clCreateProgramWithBinary", "clBuildProgram", "clGetProgramInfo", "clGetProgramBuildInfo", "clCreateKernel",
        "clSetKernelArg", "clGetKernelInfo", "clGetKernelWorkGroupInfo", "clEnqueueNDRangeKernel", "clEnqueueMapBuffer",
        "clEnqueueUnmapMemObject", "clFlush", "clFinish", "clGetEventProfilingInfo", "malloc",
    };
    const char *function = "none";
    int n = 0;
    EXPECT(argc == 2);
    void *library = dlopen(getenv("XCEPTILE_OPENCL"), RTLD_NOW);
    EXPECT(library != NULL);
    void *symbols[] = {need(library, "fake_opencl_fail"), need(library, "fake_opencl_failed"),
                       need(library, "fake_opencl_live_objects")};
    memcpy(&fail, &symbols[0], sizeof fail);
    memcpy(&has_failed, &symbols[1], sizeof has_failed);
    memcpy(&live_objects, &symbols[2], sizeof live_objects);

    xct_session *session = NULL;
    EXPECT(xct_open(argv[1], NULL, &session) == XCT_OK);
    input_bytes = xct_input_bytes(session);
    output_bytes = xct_output_bytes(session);
    EXPECT(input_bytes < sizeof input && output_bytes < sizeof right);
    for (size_t i = 0; i < input_bytes; i++)
        input[i] = (uint8_t)(i * 31);
    EXPECT(xct_run(session, input, input_bytes, right, output_bytes) == XCT_OK);
    xct_close(session);

    static const int codes[] = {-5 /* out of resources */, -4 /* no memory */};
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++)
        for (size_t k = 0; k < sizeof codes / sizeof codes[0]; k++) {
            function = functions[i];
            for (n = 1; try_one(argv[1], function, n, codes[k]); n++)
                EXPECT(n < 1000);
        }
    dlclose(library);
    return 0;
}
