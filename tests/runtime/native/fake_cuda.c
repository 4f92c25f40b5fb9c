/* A FAKE of NVIDIA's driver library for the tests of runtime/native/cuda.c, and with -DNVRTC a fake of NVRTC. It writes
 * down every call and moves the bytes that are copied. Kernels compute nothing, or they run on the processor where
 * FAKE_KERNELS names them.
 *
 * What is put into a stream happens as late as it may: when the stream is waited for. Memory begins as rubbish (as
 * zeros where nothing is computed) and lies between guards: a kernel that writes there fails, as on a GPU.
 *
 * A "module" is text: a first line, "cubin sm_87", "ptx" or anything else, which does not load, and then one line for
 * each kernel: its name, how many pointers it takes, and perhaps how many bytes the last of them has. Real machine code loads too, if it is for this very capability,
 * and real PTX, if it is for this one or an older one. The environment says what kind of machine is played:
 *   FAKE_LOG         the file that calls are appended to
 *   FAKE_FAIL_AT     the call of this number (from 0) fails, FAKE_FAIL_CODE is its result (999); FAKE_NVRTC_FAIL_AT
 *   FAKE_CAPABILITY  such as 87 (the default); FAKE_INTEGRATED, FAKE_NO_DEVICE, FAKE_NO_CAPTURE: if set
 *   FAKE_KERNELS     libraries, separated by colons, that cuda_emulator.py made of kernels.cu: a module's kernels
 *                    run by the first that has all of them
 *   FAKE_SEED        the order of a block's threads; odd: asynchronous copies arrive at once
 * Compiled with -DOLD it has the names of CUDA 10.0, without graphs; with -DTOO_OLD it lacks a function. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdarg.h>
#include <stdbool.h>
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

#define MAX_PARAMETERS 16
#define MAX_FUNCTIONS 512
#define MAX_MEMORIES 64
#define GUARD 4352 /* with it memory is aligned to 256 bytes and no more, as a driver aligns it */
#define GUARD_BYTE 0xC5
#define RUBBISH 0xA5
#define NO_HANDLE ((void *)(uintptr_t)RUBBISH) /* what a call that failed leaves where a handle was to be */

struct function {
    char name[200];
    int arguments, threads; /* at most; 0: not said */
    int last_bytes;         /* of the last parameter; 0: a pointer's */
    int shared_bytes;       /* that it was given leave to have */
    const struct module *module;
    void *code; /* NULL: computes nothing */
};

typedef const char *emulator(void *function, void **pointers, int count, const unsigned *groups, unsigned threads,
                             unsigned seed, int early);

struct module {
    int count;
    void *library; /* of FAKE_KERNELS, or NULL */
    emulator *emulate;
    const uint8_t *shared; /* the library's shared memory */
    size_t shared_size;
    struct function functions[MAX_FUNCTIONS];
};

struct event {
    int happened; /* the number of this event among all; 0: it has not */
};

struct node { /* a copy, a launch or an event */
    void *target;
    const void *source;
    size_t size;
    struct function *function;
    unsigned grid[3], threads, shared_bytes;
    void *parameters[MAX_PARAMETERS];
    struct event *event;
};

struct list {
    int count, launches, copies;
    struct node *nodes;
};

struct memory {
    uint8_t *data; /* between two guards; NULL: free */
    size_t size;
    const char *kind;
    bool reachable; /* by kernels */
};

static struct memory memories[MAX_MEMORIES];
static struct list queue, *capturing;
static int pushed, retained, events;
static void *primary;
static char broken[400]; /* what a kernel did wrong: everything fails from then on */

API int cuInit(unsigned flags)
{
    int result = record("cuInit %u", flags);
    return result != 0 ? result : getenv("FAKE_NO_DEVICE") != NULL ? 100 : 0;
}
API int cuGetErrorName(int result, const char **name)
{
    *name = result == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : result == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : result == 218 ? "CUDA_ERROR_INVALID_PTX" : result == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : result == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_FAKE";
    return 0;
}
API int cuGetErrorString(int result, const char **text)
{
    *text = result == 700 && broken[0] != 0 ? broken : "says the fake";
    return 0;
}
API int cuDriverGetVersion(int *version)
{
    *version = 12060;
    return record("cuDriverGetVersion");
}
API int cuDeviceGetCount(int *count)
{
    *count = 1;
    return record("cuDeviceGetCount");
}
API int cuDeviceGet(int *device, int ordinal)
{
    *device = 7;
    return record("cuDeviceGet %d", ordinal);
}
API int cuDeviceGetName(char *name, int size, int device)
{
    snprintf(name, (size_t)size, "Fake GPU\t1");
    return record("cuDeviceGetName %d in %d bytes", device, size);
}
API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    int capability = number("FAKE_CAPABILITY", 87);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : getenv("FAKE_INTEGRATED") != NULL;
    return record("cuDeviceGetAttribute %d of %d", attribute, device);
}
API int cuDevicePrimaryCtxRetain(void **context, int device)
{
    int result = record("cuDevicePrimaryCtxRetain %d", device);
    if (result == 0 && retained++ == 0)
        primary = malloc(1);
    *context = primary;
    return result;
}
#ifdef OLD
#define cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRelease
#endif
API int cuDevicePrimaryCtxRelease_v2(int device)
{
    if (--retained == 0) {
        free(primary);
        broken[0] = 0;
    }
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
static int need_context(int result) { return pushed <= 0 ? 201 : broken[0] != 0 ? 700 : result; }
/* A stream of the session's own: what is put into the default stream waits for others, and no capture sees it. */
static int need_stream(const void *stream, int result)
{
    return need_context(result == 0 && stream == NULL ? 400 : result);
}

/* ---- memory ---- */

API int cuMemGetInfo_v2(size_t *available, size_t *total)
{
    *available = 1000;
    *total = 2000;
    return need_context(record("cuMemGetInfo"));
}
static bool guards_hold(const struct memory *memory)
{
    for (size_t i = 0; i < GUARD; i++)
        if (memory->data[-1 - (ptrdiff_t)i] != GUARD_BYTE || memory->data[memory->size + i] != GUARD_BYTE)
            return false;
    return true;
}
static int allocate(void **memory, size_t size, const char *kind, bool reachable, int result)
{
    *memory = NO_HANDLE;
    if (result == 0)
        result = need_context(0);
    for (int i = 0; result == 0 && i < MAX_MEMORIES; i++)
        if (memories[i].data == NULL) {
            bool computes = getenv("FAKE_KERNELS") != NULL;
            size_t whole = (size + 2 * GUARD + 511) / 512 * 512;
            uint8_t *room = computes ? aligned_alloc(512, whole) : calloc(1, whole);
            if (room == NULL)
                return 2;
            if (computes) {
                memset(room, GUARD_BYTE, whole);
                memset(room + GUARD, RUBBISH, size);
            }
            memories[i] = (struct memory){room + GUARD, size, kind, reachable};
            *memory = memories[i].data;
            return 0;
        }
    return result != 0 ? result : 2;
}
static void release(void *memory)
{
    for (int i = 0; i < MAX_MEMORIES; i++)
        if (memory != NULL && memories[i].data == memory) {
            free(memories[i].data - GUARD);
            memories[i].data = NULL;
        }
}
/* The allocation that a pointer points into, or NULL. */
static const struct memory *find(const void *pointer)
{
    const uint8_t *at = pointer;
    for (int i = 0; i < MAX_MEMORIES; i++)
        if (memories[i].data != NULL && at >= memories[i].data && at < memories[i].data + memories[i].size)
            return &memories[i];
    return NULL;
}
API int cuMemAlloc_v2(uint64_t *memory, size_t size)
{
    void *data;
    int result = allocate(&data, size, "device", true, record("cuMemAlloc %zu", size));
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
    bool reachable = flags == 2 && getenv("FAKE_INTEGRATED") != NULL;
    return allocate(memory, size, "host", reachable, record("cuMemHostAlloc %zu flags %u", size, flags));
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

/* ---- what is put into a stream, and is done when it is waited for ---- */

static int add(struct node node)
{
    struct list *list = capturing != NULL ? capturing : &queue;
    struct node *nodes = realloc(list->nodes, ((size_t)list->count + 1) * sizeof *nodes);
    if (nodes == NULL)
        return 2;
    list->nodes = nodes;
    nodes[list->count++] = node;
    list->launches += node.function != NULL;
    list->copies += node.size > 0;
    return 0;
}
static void clear(struct list *list)
{
    free(list->nodes);
    *list = (struct list){0};
}
static void execute(struct node *node)
{
    if (node->size > 0)
        memcpy(node->target, node->source, node->size);
    if (node->event != NULL)
        node->event->happened = ++events;
    if (node->function == NULL || node->function->code == NULL)
        return;
    const struct function *function = node->function;
    const struct module *module = function->module;
    unsigned seed = (unsigned)number("FAKE_SEED", 0);
    const char *wrong = module->emulate(function->code, node->parameters, function->arguments, node->grid, node->threads,
                                        seed, (int)(seed & 1));
    for (size_t i = node->shared_bytes; wrong == NULL && i < module->shared_size; i++)
        if (module->shared[i] != RUBBISH)
            wrong = "shared memory written past what was asked for";
    for (int i = 0; wrong == NULL && i < MAX_MEMORIES; i++)
        if (memories[i].data != NULL && !guards_hold(&memories[i]))
            wrong = "memory written outside of what was allocated";
    if (wrong != NULL)
        snprintf(broken, sizeof broken, "%s: %s", function->name, wrong);
}
static int copy(void *target, const void *source, size_t size, const void *stream, const char *name)
{
    int result = need_stream(stream, record("%s %zu%s", name, size, capturing != NULL ? " captured" : ""));
    return result != 0 ? result : add((struct node){.target = target, .source = source, .size = size});
}
API int cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t size, void *stream)
{
    return copy((void *)(uintptr_t)target, source, size, stream, "cuMemcpyHtoDAsync");
}
API int cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t size, void *stream)
{
    return copy(target, (const void *)(uintptr_t)source, size, stream, "cuMemcpyDtoHAsync");
}
API int cuStreamCreate(void **stream, unsigned flags)
{
    int result = need_context(record("cuStreamCreate %u", flags));
    *stream = result == 0 ? malloc(1) : NO_HANDLE;
    return result;
}
API int cuStreamDestroy_v2(void *stream)
{
    free(stream);
    return record("cuStreamDestroy");
}
API int cuStreamSynchronize(void *stream)
{
    int result = need_stream(stream, record("cuStreamSynchronize"));
    for (int i = 0; result == 0 && i < queue.count; i++) {
        execute(&queue.nodes[i]);
        result = need_context(0);
    }
    clear(&queue);
    return result;
}

/* ---- modules ---- */

/* Kernels of real PTX by their declarations: ".entry NAME(", then ".param" for each parameter up to ")", and then
 * perhaps ".maxntid THREADS". */
static void read_ptx(struct module *module, const char *text)
{
    while (module->count < MAX_FUNCTIONS && (text = strstr(text, ".entry ")) != NULL) {
        struct function *function = &module->functions[module->count++];
        const char *end = strchr(text, ')'), *body = strchr(end, '{'), *most = strstr(end, ".maxntid ");
        sscanf(text, ".entry %199[^( \n]", function->name);
        for (const char *at = text; (at = strstr(at, ".param ")) != NULL && at < end; at++)
            function->arguments++;
        if (most != NULL && most < body)
            function->threads = atoi(most + strlen(".maxntid "));
        text = end;
    }
}
/* Kernels of real machine code by the sections ".nv.info.NAME": attribute 0x17 for each parameter, 5 the threads. */
static void read_cubin(struct module *module, const uint8_t *image)
{
    const Elf64_Ehdr *header = (const void *)image;
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum && module->count < MAX_FUNCTIONS; i++) {
        const char *name = names + sections[i].sh_name;
        if (strncmp(name, ".nv.info.", 9) != 0)
            continue;
        struct function *function = &module->functions[module->count++];
        snprintf(function->name, sizeof function->name, "%s", name + 9);
        const uint8_t *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
        for (uint16_t size; at < end; at += 4 + (at[0] == 4 ? size : 0)) {
            memcpy(&size, at + 2, sizeof size);
            function->arguments += at[1] == 0x17;
            if (at[1] == 5)
                memcpy(&function->threads, at + 4, sizeof function->threads);
        }
    }
}
static void read_text(struct module *module, const char *text)
{
    for (const char *line = strchr(text, '\n'); line != NULL && module->count < MAX_FUNCTIONS; module->count++) {
        struct function *function = &module->functions[module->count];
        if (sscanf(line, "%199s %d", function->name, &function->arguments) != 2)
            return;
        sscanf(line, "%*s %*d%*[ ]%d", &function->last_bytes);
        line = strchr(line + 1, '\n');
    }
}
/* The first library of FAKE_KERNELS that has all of the module's kernels. */
static bool find_code(struct module *module)
{
    char *rest = getenv("FAKE_KERNELS") != NULL ? strdup(getenv("FAKE_KERNELS")) : NULL;
    char *all = rest, *path;
    while (module->library == NULL && (path = strsep(&rest, ":")) != NULL) {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL), *symbol = NULL;
        int found = 0;
        while (library != NULL && found < module->count) {
            struct function *function = &module->functions[found];
            function->module = module;
            if ((function->code = dlsym(library, function->name)) == NULL)
                break;
            found++;
        }
        if (library != NULL && found == module->count) {
            module->library = library;
            *(void **)&module->emulate = dlsym(library, "emulate");
            module->shared = dlsym(library, "_ptr");
            Dl_info info;
            if (dladdr1(module->shared, &info, &symbol, RTLD_DL_SYMENT) != 0 && symbol != NULL)
                module->shared_size = ((const ElfW(Sym) *)symbol)->st_size;
        } else if (library != NULL)
            dlclose(library);
    }
    bool found = all == NULL || (module->library != NULL && module->emulate != NULL && module->shared_size > 0);
    free(all);
    return found;
}
/* The image's result; what the log says of it. */
static int judge_image(const uint8_t *image, const char *kind, const char **said)
{
    int capability = number("FAKE_CAPABILITY", 87);
    char own[64];
    snprintf(own, sizeof own, "cubin sm_%d", capability);
    if (memcmp(image, ELFMAG, SELFMAG) == 0)
        return (int)(((const Elf64_Ehdr *)image)->e_flags & 0xff) == capability ? 0 : 209;
    const char *real = strstr((const char *)image, "\n.target sm_");
    if (real != NULL && atoi(real + 12) > capability)
        *said = "ptxas fatal   : SM version specified by .target is higher than default SM version assumed";
    else if (real == NULL && strncmp(kind, "cubin", 5) == 0)
        return strcmp(kind, own) == 0 ? 0 : 209;
    else if (real == NULL && strncmp(kind, "ptx", 3) != 0)
        *said = "ptxas fake: what is this";
    return *said != NULL ? 218 : 0;
}
API int cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values)
{
    char kind[64] = "";
    const char *said = NULL;
    bool is_elf = memcmp(image, ELFMAG, SELFMAG) == 0;
    sscanf(is_elf ? "ELF" : image, "%63[^\n]", kind);
    int result = need_context(record("cuModuleLoadDataEx \"%s\" options %u", kind, count));
    if (result == 0)
        result = judge_image(image, kind, &said);
    if (count == 2 && options[0] == 5 && options[1] == 6)
        memset(values[0], 0, (size_t)(uintptr_t)values[1]); /* all of it is the driver's to write to */
    if (said != NULL && count == 2 && options[0] == 5 && options[1] == 6)
        snprintf(values[0], (size_t)(uintptr_t)values[1], "%s", said);
    struct module *made = result == 0 ? calloc(1, sizeof *made) : NULL;
    *module = NO_HANDLE;
    if (result != 0)
        return result;
    if (made == NULL)
        return 2;
    if (is_elf)
        read_cubin(made, image);
    else if (strstr(image, "\n.target sm_") != NULL)
        read_ptx(made, image);
    else
        read_text(made, image);
    *module = made;
    if (find_code(made))
        return 0;
    fprintf(stderr, "fake driver: no library of FAKE_KERNELS has all of the module's kernels\n");
    free(made);
    return 209;
}
API int cuModuleUnload(void *module)
{
    if (((struct module *)module)->library != NULL)
        dlclose(((struct module *)module)->library);
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
    struct function *of = function;
    if (attribute == 8)
        of->shared_bytes = value;
    return record("cuFuncSetAttribute %s %d = %d", of->name, attribute, value);
}
#endif
#ifndef OLD
API int cuFuncLoad(void *function)
{
    return record("cuFuncLoad %s", ((struct function *)function)->name);
}
API int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size)
{
    struct function *of = function;
    int result = record("cuFuncGetParamInfo %s %zu", of->name, index);
    if (result != 0 || index >= (size_t)of->arguments)
        return result != 0 ? result : 1;
    *offset = 8 * index;
    *size = 8;
    return 0;
}
#endif
API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared_bytes, void *stream, void **parameters, void **extra)
{
    struct function *of = function;
    char places[512] = "";
    size_t used = 0;
    bool reachable = true;
    uint8_t read[32764]; /* what a driver may read of parameters; the sanitizer's concern */
    struct node node = {.function = of, .grid = {gx, gy, gz}, .threads = bx, .shared_bytes = shared_bytes};
    for (int i = 0; i < of->arguments; i++) {
        memcpy(read, parameters[i], i + 1 == of->arguments && of->last_bytes > 0 ? (size_t)of->last_bytes : 8);
        if (i >= MAX_PARAMETERS)
            continue;
        memcpy(&node.parameters[i], parameters[i], sizeof node.parameters[i]);
        const struct memory *memory = find(node.parameters[i]);
        if (memory != NULL)
            used += (size_t)snprintf(places + used, sizeof places - used, " %s%d+%td", memory->kind,
                                     (int)(memory - memories), (uint8_t *)node.parameters[i] - memory->data);
        reachable = reachable && memory != NULL && memory->reachable;
    }
    (void)extra;
    int result = need_stream(stream, record("cuLaunchKernel %s %u,%u,%u x %u,%u,%u shared %u:%s", of->name, gx, gy, gz,
                                            bx, by, bz, shared_bytes, places));
    bool fits = (of->threads == 0 || bx * by * bz <= (unsigned)of->threads)
                && shared_bytes <= (of->shared_bytes > 48 << 10 ? (unsigned)of->shared_bytes : 48u << 10);
    if (of->code != NULL && result == 0) { /* the emulation's blocks are rows of threads */
        fits = fits && by * bz == 1 && of->arguments <= MAX_PARAMETERS;
        if (!reachable)
            snprintf(broken, sizeof broken, "%s: a pointer to nothing that a kernel reaches", of->name);
    }
    return result != 0 ? result : fits ? add(node) : 1;
}

/* ---- events and graphs ---- */

API int cuEventCreate(void **event, unsigned flags)
{
    int result = need_context(record("cuEventCreate %u", flags));
    *event = result == 0 ? calloc(1, sizeof(struct event)) : NO_HANDLE;
    return result;
}
API int cuEventRecord(void *event, void *stream)
{
    ((struct event *)event)->happened = 0;
    int result = need_stream(stream, record("cuEventRecord"));
    return result != 0 ? result : capturing == NULL ? add((struct node){.event = event}) : 0; /* in a graph: no time */
}
#ifndef OLD
API int cuEventRecordWithFlags(void *event, void *stream, unsigned flags)
{
    ((struct event *)event)->happened = 0;
    int result = need_stream(stream, record("cuEventRecordWithFlags %u", flags));
    return result != 0 ? result : capturing != NULL && flags == 1 ? add((struct node){.event = event}) : 1;
}
#endif
API int cuEventElapsedTime(float *ms, void *start, void *end)
{
    int from = ((struct event *)start)->happened, to = ((struct event *)end)->happened;
    *ms = 1.5f * (float)(to - from);
    int result = need_context(record("cuEventElapsedTime %g", *ms));
    return result != 0 ? result : from != 0 && to != 0 ? 0 : 600;
}
API int cuEventDestroy_v2(void *event)
{
    free(event);
    return record("cuEventDestroy");
}
#ifndef OLD
API int cuStreamBeginCapture_v2(void *stream, int mode)
{
    int result = need_stream(stream, record("cuStreamBeginCapture %d", mode));
    if (result == 0 && getenv("FAKE_NO_CAPTURE") != NULL)
        result = 801;
    capturing = result == 0 ? calloc(1, sizeof *capturing) : NULL;
    return result;
}
API int cuGraphDestroy(void *graph);
API int cuStreamEndCapture(void *stream, void **graph)
{
    int result = need_stream(stream, record("cuStreamEndCapture"));
    *graph = capturing;
    if (result != 0 && capturing != NULL) {
        clear(capturing);
        free(capturing);
        *graph = NULL;
    }
    capturing = NULL;
    return result;
}
API int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags)
{
    int result = need_context(record("cuGraphInstantiate %llu", flags));
    const struct list *from = graph;
    struct list *made = result == 0 ? calloc(1, sizeof *made) : NULL;
    if (made != NULL) {
        *made = *from;
        made->nodes = malloc((size_t)from->count * sizeof *from->nodes);
        memcpy(made->nodes, from->nodes, (size_t)from->count * sizeof *from->nodes);
    }
    *executable = made != NULL ? (void *)made : NO_HANDLE;
    return result;
}
API int cuGraphDestroy(void *graph)
{
    clear(graph);
    free(graph);
    return record("cuGraphDestroy");
}
API int cuGraphExecDestroy(void *executable)
{
    clear(executable);
    free(executable);
    return record("cuGraphExecDestroy");
}
API int cuGraphLaunch(void *executable, void *stream)
{
    struct list *graph = executable;
    int result = need_stream(stream, record("cuGraphLaunch %d kernels %d copies", graph->launches, graph->copies));
    for (int i = 0; result == 0 && i < graph->count; i++)
        result = add(graph->nodes[i]);
    return result;
}
#endif

#else

struct program {
    char *source;
    char code[1024];
    bool is_binary;
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
    const char *real = strstr(text, "=sm_");
    of->is_binary = real != NULL;
    if (real != NULL)
        snprintf(of->code, sizeof of->code, "cubin sm_%d\n%s", atoi(real + 4), of->source);
    else
        snprintf(of->code, sizeof of->code, "ptx\n%s", of->source);
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
    *size = strlen(((struct program *)program)->code) + 1;
    return record("nvrtcGetPTXSize");
}
API int nvrtcGetPTX(void *program, char *text)
{
    strcpy(text, ((struct program *)program)->code);
    return record("nvrtcGetPTX");
}
#ifndef OLD
API int nvrtcGetCUBINSize(void *program, size_t *size)
{
    const struct program *of = program;
    *size = of->is_binary ? strlen(of->code) + 1 : 0;
    return record("nvrtcGetCUBINSize");
}
API int nvrtcGetCUBIN(void *program, char *code)
{
    strcpy(code, ((struct program *)program)->code);
    return record("nvrtcGetCUBIN");
}
#endif

#endif
