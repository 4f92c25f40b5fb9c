/* A fake OpenCL library, for tests of the runtime's driver: it is no OpenCL. There is one device, without a compiler:
 * a program is its source, and a kernel one of the two C functions below that opencl_network.py has in OpenCL C.
 * It fails where it is told to and counts its objects, so that a test sees what was not released.
 *
 * FAKE_OPENCL_DEVICE changes what the device says of itself: "CODE=VALUE;..." with hexadecimal codes of
 * clGetDeviceInfo and clGetKernelWorkGroupInfo; behind a "|" there is another device. FAKE_OPENCL_PLATFORMS is how many
 * platforms have the devices in turns. FAKE_OPENCL_BUILDS names a file that gets the options of every build; options
 * that contain FAKE_OPENCL_REFUSES, or REFUSES of their device, are refused. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum { SUCCESS = 0, BUILD_FAILURE = -11, INVALID_VALUE = -30, INVALID_BINARY = -42, INVALID_KERNEL_NAME = -46 };
enum { DEVICE_TYPE = 0x1000, REFUSES = 0xF000, MAX_DEVICES = 4 };
enum kind { CONTEXT = 1, QUEUE, PROGRAM, KERNEL, MEMORY, EVENT };

/* Every object: kind says which fields it uses. */
struct object {
    enum kind kind;
    struct object *parent; /* of a sub-buffer or a kernel */
    uint8_t *data;         /* of a buffer: its memory; of a program: its text */
    size_t size;
    struct object *arguments[4];
    char name[32];
    uint64_t time_ns;
    int references; /* by sub-buffers and kernels */
};

/* ---- what a test controls ---- */

static const char *failing;
static int failing_call, failing_code, calls, live_objects;
static uint64_t clock_ns;
static char devices[MAX_DEVICES], platforms[MAX_DEVICES]; /* their addresses are the handles */

/* The n-th call of the function from now on returns the code. */
API void fake_opencl_fail(const char *name, int n, int code)
{
    failing = name;
    failing_call = n;
    failing_code = code;
    calls = 0;
}

/* Whether it has. */
API int fake_opencl_failed(void)
{
    return calls >= failing_call;
}

API int fake_opencl_live_objects(void)
{
    return live_objects;
}

static int fails(const char *name)
{
    return failing != NULL && strcmp(failing, name) == 0 && ++calls == failing_call ? failing_code : SUCCESS;
}

#define MAYBE_FAIL() \
    do { \
        int code_ = fails(__func__); \
        if (code_ != SUCCESS) \
            return code_; \
    } while (0)

/* For the functions that return an object: the code goes to *status. */
#define MAYBE_FAIL_TO(status) \
    do { \
        *(status) = fails(__func__); \
        if (*(status) != SUCCESS) \
            return NULL; \
    } while (0)

static void check(const struct object *object, enum kind kind)
{
    if (object == NULL || object->kind != kind) {
        fprintf(stderr, "fake OpenCL: an object of kind %d is expected\n", (int)kind);
        abort();
    }
}

static struct object *make(enum kind kind)
{
    struct object *object = calloc(1, sizeof *object);
    if (object == NULL)
        abort();
    object->kind = kind;
    live_objects++;
    return object;
}

static int release(struct object *object, enum kind kind)
{
    check(object, kind);
    if (object->references > 0) {
        fprintf(stderr, "fake OpenCL: an object of kind %d is released before what refers to it\n", (int)kind);
        abort();
    }
    if (object->parent != NULL)
        object->parent->references--;
    else
        free(object->data);
    free(object);
    live_objects--;
    return SUCCESS;
}

/* ---- queries ---- */

static int answer(const void *value, size_t bytes, size_t room, void *out, size_t *size)
{
    if (size != NULL)
        *size = bytes;
    if (out != NULL && room < bytes)
        return INVALID_VALUE;
    if (out != NULL)
        memcpy(out, value, bytes);
    return SUCCESS;
}

/* What the test says of a device, or NULL. */
static const char *description(int device)
{
    const char *text = getenv("FAKE_OPENCL_DEVICE");
    if (text == NULL)
        text = "";
    for (; device > 0 && text != NULL; device--) {
        text = strchr(text, '|');
        if (text != NULL)
            text++;
    }
    return text;
}

/* The value that the test has set for a code, or NULL. */
static const char *changed(int device, uint32_t code, char value[128])
{
    const char *text = description(device);
    while (text != NULL && *text != 0 && *text != '|') {
        char *end;
        unsigned long found = strtoul(text, &end, 16);
        size_t length = strcspn(end, ";|");
        if (*end == '=' && found == code) {
            snprintf(value, 128, "%.*s", (int)length - 1, end + 1);
            return value;
        }
        text = end + length + (end[length] == ';');
    }
    return NULL;
}

static int answer_text(int device, uint32_t code, const char *text, size_t room, void *out, size_t *size)
{
    char value[128];
    const char *other = changed(device, code, value);
    if (other != NULL)
        text = other;
    return answer(text, strlen(text) + 1, room, out, size);
}

static int answer_number(int device, uint32_t code, uint64_t number, size_t bytes, size_t room, void *out, size_t *size)
{
    char value[128];
    if (changed(device, code, value) != NULL)
        number = strtoull(value, NULL, 0);
    return answer(&number, bytes, room, out, size);
}

static int platform_count(void)
{
    const char *text = getenv("FAKE_OPENCL_PLATFORMS");
    return text != NULL ? atoi(text) : 1;
}

API int clGetPlatformIDs(uint32_t room, void **handles, uint32_t *count)
{
    MAYBE_FAIL();
    *count = (uint32_t)platform_count();
    for (uint32_t i = 0; i < room && i < *count; i++)
        handles[i] = &platforms[i];
    return SUCCESS;
}

API int clGetPlatformInfo(char *platform, uint32_t what, size_t room, void *out, size_t *size)
{
    MAYBE_FAIL();
    return answer_text((int)(platform - platforms), what, what == 0x0902 ? "fake" : "OpenCL 1.2 fake", room, out, size);
}

API int clGetDeviceIDs(char *platform, uint64_t type, uint32_t room, void **handles, uint32_t *count)
{
    char value[128];
    MAYBE_FAIL();
    *count = 0;
    for (int i = 0; i < MAX_DEVICES && description(i) != NULL; i++) {
        uint64_t own = changed(i, DEVICE_TYPE, value) != NULL ? strtoull(value, NULL, 0) : 4; /* a GPU */
        if (i % platform_count() != platform - platforms || type != own)
            continue;
        if (*count < room)
            handles[*count] = &devices[i];
        ++*count;
    }
    return *count > 0 ? SUCCESS : -1; /* CL_DEVICE_NOT_FOUND */
}

API int clGetDeviceInfo(char *handle, uint32_t what, size_t room, void *out, size_t *size)
{
    char value[128];
    size_t sizes[3] = {1024, 1024, 64};
    int device = (int)(handle - devices);
    MAYBE_FAIL();
    switch (what) {
    case 0x1005: /* work-items of a group in each dimension; a test sets the first */
        sizes[0] = changed(device, what, value) != NULL ? strtoull(value, NULL, 0) : sizes[0];
        return answer(sizes, sizeof sizes, room, out, size);
    case 0x1010: return answer_number(device, what, 1 << 30, 8, room, out, size); /* largest buffer */
    case 0x1019: return answer_number(device, what, 1024, 4, room, out, size);    /* alignment, bits */
    case 0x101B: return answer_number(device, what, 0x3f, 8, room, out, size);    /* float32 */
    case 0x1023: return answer_number(device, what, 32768, 8, room, out, size);   /* local memory */
    case 0x1026:                                                          /* little endian */
    case 0x1027:                                                          /* available */
    case 0x1028:                                                          /* has a compiler */
    case 0x1035: return answer_number(device, what, 1, 4, room, out, size);       /* shares the host's memory */
    case 0x102B: return answer_text(device, what, "fake GPU", room, out, size);
    case 0x102C: return answer_text(device, what, "fake vendor", room, out, size);
    case 0x102D: return answer_text(device, what, "driver 1", room, out, size);
    case 0x102F: return answer_text(device, what, "OpenCL 1.2 fake", room, out, size);
    case 0x1030: return answer_text(device, what, "cl_khr_fp16 cl_khr_integer_dot_products", room, out, size);
    default: return INVALID_VALUE;
    }
}

/* ---- objects ---- */

API void *clCreateContext(const intptr_t *properties, uint32_t count, void *const *handles, void *notify, void *data,
                          int *status)
{
    (void)properties, (void)count, (void)handles, (void)notify, (void)data;
    MAYBE_FAIL_TO(status);
    return make(CONTEXT);
}

API int clReleaseContext(struct object *context)
{
    return release(context, CONTEXT);
}

API void *clCreateCommandQueue(struct object *context, void *device, uint64_t properties, int *status)
{
    (void)device, (void)properties;
    check(context, CONTEXT);
    MAYBE_FAIL_TO(status);
    return make(QUEUE);
}

API int clReleaseCommandQueue(struct object *queue)
{
    return release(queue, QUEUE);
}

API void *clCreateBuffer(struct object *context, uint64_t flags, size_t size, const void *host, int *status)
{
    check(context, CONTEXT);
    MAYBE_FAIL_TO(status);
    struct object *buffer = make(MEMORY);
    buffer->size = size;
    buffer->data = calloc(size, 1);
    if (buffer->data != NULL && (flags & 1 << 5) != 0)
        memcpy(buffer->data, host, size);
    return buffer;
}

API void *clCreateSubBuffer(struct object *buffer, uint64_t flags, uint32_t type, const size_t region[2], int *status)
{
    (void)flags;
    check(buffer, MEMORY);
    MAYBE_FAIL_TO(status);
    *status = INVALID_VALUE;
    if (type != 0x1220 || region[0] > buffer->size || region[1] > buffer->size - region[0])
        return NULL;
    *status = SUCCESS;
    struct object *slice = make(MEMORY);
    slice->parent = buffer;
    slice->data = buffer->data + region[0];
    slice->size = region[1];
    buffer->references++;
    return slice;
}

API int clReleaseMemObject(struct object *memory)
{
    return release(memory, MEMORY);
}

static void *make_program(const void *text, size_t size)
{
    struct object *program = make(PROGRAM);
    program->size = size;
    program->data = malloc(size + 1);
    if (program->data == NULL)
        abort();
    memcpy(program->data, text, size);
    program->data[size] = 0;
    return program;
}

API void *clCreateProgramWithSource(struct object *context, uint32_t count, const char **texts, const size_t *sizes,
                                    int *status)
{
    (void)count;
    check(context, CONTEXT);
    MAYBE_FAIL_TO(status);
    return make_program(texts[0], sizes[0]);
}

API void *clCreateProgramWithBinary(struct object *context, uint32_t count, void *const *handles, const size_t *sizes,
                                    const unsigned char **binaries, int *verdict, int *status)
{
    (void)count, (void)handles;
    check(context, CONTEXT);
    MAYBE_FAIL_TO(status);
    *verdict = sizes[0] > 7 && memcmp(binaries[0], "binary ", 7) == 0 ? SUCCESS : INVALID_BINARY;
    *status = *verdict;
    return *verdict == SUCCESS ? make_program(binaries[0] + 7, sizes[0] - 7) : NULL;
}

API int clBuildProgram(struct object *program, uint32_t count, char *const *handles, const char *options, void *notify,
                       void *data)
{
    char value[128];
    (void)count, (void)notify, (void)data;
    check(program, PROGRAM);
    MAYBE_FAIL();
    const char *list = getenv("FAKE_OPENCL_BUILDS"), *refused = getenv("FAKE_OPENCL_REFUSES");
    FILE *file = list != NULL ? fopen(list, "a") : NULL;
    if (file != NULL) {
        fprintf(file, "%s\n", options);
        fclose(file);
    }
    if (refused == NULL)
        refused = changed((int)(handles[0] - devices), REFUSES, value);
    return refused != NULL && strstr(options, refused) != NULL ? BUILD_FAILURE : SUCCESS;
}

API int clGetProgramInfo(struct object *program, uint32_t what, size_t room, void *out, size_t *size)
{
    check(program, PROGRAM);
    MAYBE_FAIL();
    size_t bytes = program->size + 7;
    if (what == 0x1165)
        return answer(&bytes, sizeof bytes, room, out, size);
    unsigned char *binary = *(unsigned char **)out;
    memcpy(binary, "binary ", 7);
    memcpy(binary + 7, program->data, program->size);
    return SUCCESS;
}

API int clGetProgramBuildInfo(struct object *program, void *device, uint32_t what, size_t room, void *out, size_t *size)
{
    (void)device;
    check(program, PROGRAM);
    MAYBE_FAIL();
    return answer_text(0, what, "line 1: the fake's compiler\nline 2: is not content\n\n", room, out, size);
}

API int clReleaseProgram(struct object *program)
{
    return release(program, PROGRAM);
}

API void *clCreateKernel(struct object *program, const char *name, int *status)
{
    check(program, PROGRAM);
    MAYBE_FAIL_TO(status);
    char declared[64];
    snprintf(declared, sizeof declared, "__kernel void %s(", name);
    *status = strstr((const char *)program->data, declared) != NULL ? SUCCESS : INVALID_KERNEL_NAME;
    if (*status != SUCCESS)
        return NULL;
    struct object *kernel = make(KERNEL);
    kernel->parent = program;
    program->references++;
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    return kernel;
}

static int is_fold(const struct object *kernel)
{
    return strcmp(kernel->name, "fold") == 0;
}

API int clSetKernelArg(struct object *kernel, uint32_t index, size_t size, struct object *const *value)
{
    check(kernel, KERNEL);
    MAYBE_FAIL();
    if (index >= (is_fold(kernel) ? 2u : 3u) || size != sizeof *value)
        return INVALID_VALUE;
    check(*value, MEMORY);
    kernel->arguments[index] = *value;
    return SUCCESS;
}

API int clGetKernelInfo(struct object *kernel, uint32_t what, size_t room, void *out, size_t *size)
{
    check(kernel, KERNEL);
    MAYBE_FAIL();
    return answer_number(0, what, is_fold(kernel) ? 2 : 3, 4, room, out, size);
}

API int clGetKernelWorkGroupInfo(struct object *kernel, char *handle, uint32_t what, size_t room, void *out, size_t *size)
{
    check(kernel, KERNEL);
    MAYBE_FAIL();
    return answer_number((int)(handle - devices), what, what == 0x11B0 ? 256 : 128, 8, room, out, size);
}

API int clReleaseKernel(struct object *kernel)
{
    return release(kernel, KERNEL);
}

/* ---- running ---- */

static void add_weights(const int8_t *x, const int8_t *weights, int8_t *y, size_t count)
{
    for (size_t i = 0; i < count; i++)
        y[i] = (int8_t)(x[i] + weights[i % 7]);
}

static void fold(const int8_t *x, int8_t *logits, size_t classes)
{
    for (size_t k = 0; k < classes; k++) {
        int total = 0;
        for (size_t i = 0; i < 180; i++)
            total += x[i * 10 + k];
        logits[k] = (int8_t)total;
    }
}

API int clEnqueueNDRangeKernel(struct object *queue, struct object *kernel, uint32_t dimensions, const size_t *offset,
                               const size_t *global, const size_t *local, uint32_t waits, void *const *wait,
                               struct object **event)
{
    (void)waits, (void)wait;
    check(queue, QUEUE);
    check(kernel, KERNEL);
    MAYBE_FAIL();
    if (dimensions != 3 || offset != NULL)
        return INVALID_VALUE;
    struct object *const *arguments = kernel->arguments;
    if (is_fold(kernel))
        fold((int8_t *)arguments[0]->data, (int8_t *)arguments[1]->data, global[0] / local[0]);
    else
        add_weights((int8_t *)arguments[0]->data, (int8_t *)arguments[1]->data, (int8_t *)arguments[2]->data,
                    global[0] * global[1] * global[2]);
    if (event != NULL) {
        *event = make(EVENT);
        (*event)->time_ns = clock_ns += 1000;
    }
    return SUCCESS;
}

API void *clEnqueueMapBuffer(struct object *queue, struct object *buffer, uint32_t blocking, uint64_t flags, size_t offset,
                             size_t size, uint32_t waits, void *const *wait, struct object **event, int *status)
{
    (void)flags, (void)waits, (void)wait, (void)event;
    check(queue, QUEUE);
    check(buffer, MEMORY);
    MAYBE_FAIL_TO(status);
    *status = blocking && offset + size <= buffer->size ? SUCCESS : INVALID_VALUE;
    return *status == SUCCESS ? buffer->data + offset : NULL;
}

API int clEnqueueUnmapMemObject(struct object *queue, struct object *buffer, void *mapped, uint32_t waits,
                                void *const *wait, struct object **event)
{
    (void)mapped, (void)waits, (void)wait, (void)event;
    check(queue, QUEUE);
    check(buffer, MEMORY);
    MAYBE_FAIL();
    return SUCCESS;
}

API int clFlush(struct object *queue)
{
    check(queue, QUEUE);
    MAYBE_FAIL();
    return SUCCESS;
}

API int clFinish(struct object *queue)
{
    check(queue, QUEUE);
    MAYBE_FAIL();
    return SUCCESS;
}

API int clGetEventProfilingInfo(struct object *event, uint32_t what, size_t room, void *out, size_t *size)
{
    check(event, EVENT);
    MAYBE_FAIL();
    return answer_number(0, what, event->time_ns + (what == 0x1283 ? 500 : 0), 8, room, out, size);
}

API int clReleaseEvent(struct object *event)
{
    return release(event, EVENT);
}
