/* A FAKE of NVIDIA's driver library for the tests of runtime/native/cuda.c, and with -DNVRTC a fake of NVRTC. It writes
 * down every call, moves the bytes that are copied and computes nothing: a kernel leaves memory as it is.
 *
 * A "module" is text: a first line, "cubin sm_87", "ptx" or anything else, which does not load, and then one line for
 * each kernel: its name and how many pointers it takes. Real PTX loads too, if it is for this capability or an older
 * one. The environment says what kind of machine is played:
 *   FAKE_LOG         the file that calls are appended to
 *   FAKE_FAIL_AT     the call of this number (from 0) fails, FAKE_FAIL_CODE is its result (999); FAKE_NVRTC_FAIL_AT
 *   FAKE_CAPABILITY  such as 87 (the default); FAKE_INTEGRATED, FAKE_NO_DEVICE, FAKE_NO_CAPTURE: if set
 * Compiled with -DOLD it has the names of CUDA 10.0, without graphs; with -DTOO_OLD it lacks a function. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

#ifdef NVRTC
#define FAIL_AT "FAKE_NVRTC_FAIL_AT"
#else
#define FAIL_AT "FAKE_FAIL_AT"
#endif

static int calls;

static int number(const char *name, int otherwise)
{
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : otherwise;
}

/* Writes a call down; returns what it shall result in. */
__attribute__((format(printf, 1, 2))) static int record(const char *format, ...)
{
    FILE *log = getenv("FAKE_LOG") != NULL ? fopen(getenv("FAKE_LOG"), "a") : NULL;
    if (log != NULL) {
        va_list arguments;
        va_start(arguments, format);
        vfprintf(log, format, arguments);
        va_end(arguments);
        fputc('\n', log);
        fclose(log);
    }
    return calls++ == number(FAIL_AT, -1) ? number("FAKE_FAIL_CODE", 999) : 0;
}

#ifndef NVRTC

struct function {
    char name[200];
    int arguments;
};

#define MAX_FUNCTIONS 512
#define MAX_COPIES 1024

struct module {
    int count;
    struct function functions[MAX_FUNCTIONS];
};

struct node {
    void *target;
    const void *source;
    size_t size;
};

struct graph {
    int launches, copies;
    struct node nodes[MAX_COPIES];
};

struct memory {
    uint8_t *data;
    size_t size;
    const char *kind;
};

static struct memory memories[16];
static struct graph *capturing;
static int pushed;

API int cuInit(unsigned flags) { return record("cuInit %u", flags); }
API int cuGetErrorName(int result, const char **name)
{
    *name = result == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : result == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : result == 218 ? "CUDA_ERROR_INVALID_PTX" : "CUDA_ERROR_FAKE";
    return 0;
}
API int cuGetErrorString(int result, const char **text)
{
    (void)result;
    *text = "says the fake";
    return 0;
}
API int cuDriverGetVersion(int *version)
{
    *version = 12060;
    return record("cuDriverGetVersion");
}
API int cuDeviceGetCount(int *count)
{
    *count = getenv("FAKE_NO_DEVICE") == NULL;
    int result = record("cuDeviceGetCount");
    return result != 0 ? result : *count > 0 ? 0 : 100;
}
API int cuDeviceGet(int *device, int ordinal)
{
    *device = 7;
    return record("cuDeviceGet %d", ordinal);
}
API int cuDeviceGetName(char *name, int size, int device)
{
    snprintf(name, (size_t)size, "Fake GPU\t1");
    return record("cuDeviceGetName %d", device);
}
API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    int capability = number("FAKE_CAPABILITY", 87);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : getenv("FAKE_INTEGRATED") != NULL;
    return record("cuDeviceGetAttribute %d of %d", attribute, device);
}
API int cuDevicePrimaryCtxRetain(void **context, int device)
{
    *context = malloc(1);
    memories[15].data = *context;
    int result = record("cuDevicePrimaryCtxRetain %d", device);
    if (result != 0)
        free(*context);
    return result;
}
#ifdef OLD
#define cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRelease
#endif
API int cuDevicePrimaryCtxRelease_v2(int device)
{
    free(memories[15].data);
    return record("cuDevicePrimaryCtxRelease %d", device);
}
API int cuCtxPushCurrent_v2(void *context)
{
    (void)context;
    int result = record("cuCtxPushCurrent");
    pushed += result == 0;
    return result;
}
API int cuCtxPopCurrent_v2(void **context)
{
    *context = NULL;
    pushed--;
    return record("cuCtxPopCurrent");
}
static int need_context(int result) { return pushed > 0 ? result : 201; }

API int cuMemGetInfo_v2(size_t *available, size_t *total)
{
    *available = 1000;
    *total = 2000;
    return need_context(record("cuMemGetInfo"));
}
static int allocate(void **memory, size_t size, const char *kind, int result)
{
    *memory = NULL;
    for (int i = 0; result == 0 && i < 15; i++)
        if (memories[i].data == NULL) {
            memories[i] = (struct memory){calloc(1, size), size, kind};
            *memory = memories[i].data;
            return need_context(0);
        }
    return result != 0 ? result : 2;
}
static void release(void *memory)
{
    for (int i = 0; i < 15; i++)
        if (memories[i].data == memory)
            memories[i].data = NULL;
    free(memory);
}
API int cuMemAlloc_v2(uint64_t *memory, size_t size)
{
    void *data;
    int result = allocate(&data, size, "device", record("cuMemAlloc %zu", size));
    *memory = (uint64_t)(uintptr_t)data;
    return result;
}
API int cuMemFree_v2(uint64_t memory)
{
    release((void *)(uintptr_t)memory);
    return record("cuMemFree");
}
API int cuMemHostAlloc(void **memory, size_t size, unsigned flags)
{
    return allocate(memory, size, "host", record("cuMemHostAlloc %zu flags %u", size, flags));
}
API int cuMemFreeHost(void *memory)
{
    release(memory);
    return record("cuMemFreeHost");
}
API int cuMemHostGetDevicePointer_v2(uint64_t *memory, void *host, unsigned flags)
{
    *memory = (uint64_t)(uintptr_t)host;
    return record("cuMemHostGetDevicePointer %u", flags);
}
static int copy(void *target, const void *source, size_t size, const char *name)
{
    int result = need_context(record("%s %zu%s", name, size, capturing != NULL ? " captured" : ""));
    if (result != 0)
        return result;
    if (capturing == NULL)
        memcpy(target, source, size);
    else if (capturing->copies == MAX_COPIES)
        return 2;
    else
        capturing->nodes[capturing->copies++] = (struct node){target, source, size};
    return 0;
}
API int cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t size, void *stream)
{
    (void)stream;
    return copy((void *)(uintptr_t)target, source, size, "cuMemcpyHtoDAsync");
}
API int cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t size, void *stream)
{
    (void)stream;
    return copy(target, (const void *)(uintptr_t)source, size, "cuMemcpyDtoHAsync");
}
/* Kernels of real PTX by their declarations: ".entry NAME(", then ".param" for each parameter up to ")". */
static int load_ptx(void **module, const char *text)
{
    struct module *made = calloc(1, sizeof *made);
    while (made != NULL && made->count < MAX_FUNCTIONS && (text = strstr(text, ".entry ")) != NULL) {
        struct function *function = &made->functions[made->count++];
        const char *end = strchr(text, ')');
        sscanf(text, ".entry %199[^( \n]", function->name);
        for (const char *at = text; (at = strstr(at, ".param ")) != NULL && at < end; at++)
            function->arguments++;
        text = end;
    }
    *module = made;
    return 0;
}
API int cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values)
{
    char kind[64] = "", first[64];
    sscanf(image, "%63[^\n]", kind);
    int result = record("cuModuleLoadDataEx \"%s\" options %u", kind, count);
    snprintf(first, sizeof first, "cubin sm_%d", number("FAKE_CAPABILITY", 87));
    const char *real = result == 0 ? strstr(image, "\n.target sm_") : NULL;
    if (real != NULL)
        return atoi(real + 12) <= number("FAKE_CAPABILITY", 87) ? load_ptx(module, image) : 209;
    if (result == 0 && strncmp(kind, "cubin", 5) == 0 && strcmp(kind, first) != 0)
        result = 209;
    else if (result == 0 && strcmp(kind, first) != 0 && strncmp(kind, "ptx", 3) != 0) {
        result = 218;
        if (count == 2 && options[0] == 5 && options[1] == 6)
            snprintf(values[0], (size_t)(uintptr_t)values[1], "ptxas fake: what is this");
    }
    if (result != 0)
        return result;
    struct module *made = calloc(1, sizeof *made);
    const char *line = strchr(image, '\n');
    while (made != NULL && line != NULL && made->count < MAX_FUNCTIONS
           && sscanf(line, "%199s %d", made->functions[made->count].name, &made->functions[made->count].arguments) == 2) {
        made->count++;
        line = strchr(line + 1, '\n');
    }
    *module = made;
    return need_context(0);
}
API int cuModuleUnload(void *module)
{
    free(module);
    return record("cuModuleUnload");
}
API int cuModuleGetFunction(void **function, void *module, const char *name)
{
    struct module *of = module;
    int result = record("cuModuleGetFunction %s", name);
    for (int i = 0; result == 0 && i < of->count; i++)
        if (strcmp(of->functions[i].name, name) == 0) {
            *function = &of->functions[i];
            return 0;
        }
    return result != 0 ? result : 500;
}
#ifndef TOO_OLD
API int cuFuncSetAttribute(void *function, int attribute, int value)
{
    return record("cuFuncSetAttribute %s %d = %d", ((struct function *)function)->name, attribute, value);
}
#endif
API int cuStreamCreate(void **stream, unsigned flags)
{
    int result = need_context(record("cuStreamCreate %u", flags));
    *stream = result == 0 ? malloc(1) : NULL;
    return result;
}
API int cuStreamDestroy_v2(void *stream)
{
    free(stream);
    return record("cuStreamDestroy");
}
API int cuStreamSynchronize(void *stream)
{
    (void)stream;
    return need_context(record("cuStreamSynchronize"));
}
API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared_bytes, void *stream, void **parameters, void **extra)
{
    struct function *of = function;
    char places[512] = "";
    size_t used = 0;
    for (int i = 0; i < of->arguments; i++) {
        uint8_t *pointer;
        memcpy(&pointer, parameters[i], sizeof pointer);
        for (int k = 0; k < 15; k++)
            if (memories[k].data != NULL && pointer >= memories[k].data && pointer < memories[k].data + memories[k].size)
                used += (size_t)snprintf(places + used, sizeof places - used, " %s%d+%td", memories[k].kind, k,
                                         pointer - memories[k].data);
    }
    (void)stream, (void)extra;
    int result = need_context(record("cuLaunchKernel %s %u,%u,%u x %u,%u,%u shared %u:%s", of->name, gx, gy, gz, bx, by,
                                     bz, shared_bytes, places));
    if (capturing != NULL)
        capturing->launches++;
    return result;
}
API int cuEventCreate(void **event, unsigned flags)
{
    int result = need_context(record("cuEventCreate %u", flags));
    *event = result == 0 ? malloc(1) : NULL;
    return result;
}
API int cuEventRecord(void *event, void *stream)
{
    (void)event, (void)stream;
    return need_context(record("cuEventRecord"));
}
API int cuEventElapsedTime(float *ms, void *start, void *end)
{
    (void)start, (void)end;
    *ms = 1.5f;
    return need_context(record("cuEventElapsedTime"));
}
API int cuEventDestroy_v2(void *event)
{
    free(event);
    return record("cuEventDestroy");
}
#ifndef OLD
API int cuStreamBeginCapture_v2(void *stream, int mode)
{
    (void)stream;
    int result = need_context(record("cuStreamBeginCapture %d", mode));
    if (result == 0 && getenv("FAKE_NO_CAPTURE") != NULL)
        result = 801;
    capturing = result == 0 ? calloc(1, sizeof *capturing) : NULL;
    return result;
}
API int cuStreamEndCapture(void *stream, void **graph)
{
    (void)stream;
    int result = need_context(record("cuStreamEndCapture"));
    *graph = capturing;
    if (result != 0) {
        free(capturing);
        *graph = NULL;
    }
    capturing = NULL;
    return result;
}
API int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags)
{
    int result = need_context(record("cuGraphInstantiate %llu", flags));
    struct graph *made = result == 0 ? malloc(sizeof *made) : NULL;
    if (made != NULL)
        memcpy(made, graph, sizeof *made);
    *executable = made;
    return result;
}
API int cuGraphDestroy(void *graph)
{
    free(graph);
    return record("cuGraphDestroy");
}
API int cuGraphExecDestroy(void *executable)
{
    free(executable);
    return record("cuGraphExecDestroy");
}
API int cuGraphLaunch(void *executable, void *stream)
{
    struct graph *graph = executable;
    (void)stream;
    int result = need_context(record("cuGraphLaunch %d kernels %d copies", graph->launches, graph->copies));
    for (int i = 0; result == 0 && i < graph->copies; i++)
        memcpy(graph->nodes[i].target, graph->nodes[i].source, graph->nodes[i].size);
    return result;
}
#endif

#else

struct program {
    char *source;
    char ptx[1024];
    char log[128];
};

API const char *nvrtcGetErrorString(int result) { return result == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_FAKE"; }
API int nvrtcVersion(int *major, int *minor)
{
    *major = 12, *minor = 2;
    return record("nvrtcVersion");
}
API int nvrtcCreateProgram(void **program, const char *source, const char *name, int count, const char *const *headers,
                           const char *const *names)
{
    (void)headers, (void)names;
    int result = record("nvrtcCreateProgram %s headers %d", name, count);
    struct program *made = result == 0 ? calloc(1, sizeof *made) : NULL;
    if (made != NULL)
        made->source = strdup(source);
    *program = made;
    return result;
}
API int nvrtcDestroyProgram(void **program)
{
    free(((struct program *)*program)->source);
    free(*program);
    return record("nvrtcDestroyProgram");
}
API int nvrtcCompileProgram(void *program, int count, const char *const *options)
{
    struct program *of = program;
    char text[256] = "";
    for (int i = 0; i < count; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), " %s", options[i]);
    int result = record("nvrtcCompileProgram%s", text);
    snprintf(of->ptx, sizeof of->ptx, "ptx\n%s", of->source);
    if (result == 0 && strstr(of->source, "#error") != NULL) {
        snprintf(of->log, sizeof of->log, "kernels.cu(1): error: #error says the fake");
        result = 6;
    }
    return result;
}
API int nvrtcGetProgramLogSize(void *program, size_t *size)
{
    *size = program != NULL ? strlen(((struct program *)program)->log) + 1 : 0;
    return program != NULL ? record("nvrtcGetProgramLogSize") : 4;
}
API int nvrtcGetProgramLog(void *program, char *text)
{
    strcpy(text, ((struct program *)program)->log);
    return record("nvrtcGetProgramLog");
}
API int nvrtcGetPTXSize(void *program, size_t *size)
{
    *size = strlen(((struct program *)program)->ptx) + 1;
    return record("nvrtcGetPTXSize");
}
API int nvrtcGetPTX(void *program, char *text)
{
    strcpy(text, ((struct program *)program)->ptx);
    return record("nvrtcGetPTX");
}

#endif
