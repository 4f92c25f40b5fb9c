/* The driver for NVIDIA GPUs: kernels are a module of the CUDA driver API, the whole plan is one CUDA graph. The driver's
 * library is opened at run time, and so is NVRTC, if it is needed; the few prototypes are declared here. CUDA 10.0
 * (JetPack 4) is the oldest that has all of what is required. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

/* ---- the driver API (cuda.h): results, attributes and flags by the names they have there ---- */

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_BINARY_FOR_GPU = 209, UNSUPPORTED_PTX_VERSION = 222,
    SYSTEM_DRIVER_MISMATCH = 803
};
enum { INTEGRATED = 18, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 }; /* CUdevice_attribute */
enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };                             /* CUfunction_attribute */
enum { ERROR_LOG_BUFFER = 5, ERROR_LOG_BUFFER_SIZE_BYTES = 6 };         /* CUjit_option */
enum { STREAM_NON_BLOCKING = 1, CAPTURE_THREAD_LOCAL = 1, HOST_DEVICEMAP = 2, EVENT_DEFAULT = 0, RECORD_EXTERNAL = 1 };

typedef uint64_t address; /* CUdeviceptr */

/* Handles (CUcontext, CUmodule, CUfunction, CUstream, CUevent, CUgraph, CUgraphExec) are pointers, CUdevice is an int. */
struct api {
    int (*init)(unsigned flags);
    int (*driver_version)(int *version);
    int (*error_name)(int result, const char **name);
    int (*error_text)(int result, const char **text);
    int (*device_count)(int *count);
    int (*device_get)(int *device, int ordinal);
    int (*device_name)(char *name, int size, int device);
    int (*device_attribute)(int *value, int attribute, int device);
    int (*context_retain)(void **context, int device);
    int (*context_release)(int device);
    int (*context_push)(void *context);
    int (*context_pop)(void **context);
    int (*memory_info)(size_t *available, size_t *total);
    int (*memory_alloc)(address *memory, size_t size);
    int (*memory_free)(address memory);
    int (*host_alloc)(void **memory, size_t size, unsigned flags);
    int (*host_free)(void *memory);
    int (*host_address)(address *memory, void *host, unsigned flags);
    int (*copy_to_device_async)(address target, const void *source, size_t size, void *stream);
    int (*copy_to_host_async)(void *target, address source, size_t size, void *stream);
    int (*module_load)(void **module, const void *image, unsigned count, int *options, void **values);
    int (*module_unload)(void *module);
    int (*module_function)(void **function, void *module, const char *name);
    int (*function_set)(void *function, int attribute, int value);
    int (*stream_create)(void **stream, unsigned flags);
    int (*stream_destroy)(void *stream);
    int (*stream_synchronize)(void *stream);
    int (*launch)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                  unsigned block_z, unsigned shared_bytes, void *stream, void **parameters, void **extra);
    int (*event_create)(void **event, unsigned flags);
    int (*event_record)(void *event, void *stream);
    int (*event_elapsed)(float *ms, void *start, void *end);
    int (*event_destroy)(void *event);
    /* What follows may be NULL: CUDA 12.4 is the first to tell a kernel's parameters and to load one on demand, and older
     * drivers launch kernel by kernel. */
    int (*function_load)(void *function);
    int (*parameter_info)(void *function, size_t index, size_t *offset, size_t *size);
    int (*event_record_with_flags)(void *event, void *stream, unsigned flags); /* since CUDA 11.1 */
    int (*capture_begin)(void *stream, int mode);
    int (*capture_end)(void *stream, void **graph);
    int (*instantiate_with_flags)(void **executable, void *graph, unsigned long long flags);
    int (*instantiate)(void **executable, void *graph, void **error_node, char *log, size_t log_size);
    int (*graph_launch)(void *executable, void *stream);
    int (*graph_destroy)(void *graph);
    int (*executable_destroy)(void *executable);
};

_Static_assert(sizeof(void *) == 8, "a CUdeviceptr is as wide as a pointer");

struct symbol {
    const char *name;     /* the one that new drivers have */
    const char *old_name; /* what older ones call it, or NULL */
    size_t offset;        /* in the struct of functions */
    bool optional;
};

/* CUDA C++ Programming Guide, "Function Parameters": 32,764 bytes of them (4,096 before CUDA 12.1 and before Volta). So
 * a kernel has no more parameters than that, and none is larger. */
#define MAX_PARAMETER_BYTES 32764u
#define PADDING_ADDRESSES (MAX_PARAMETER_BYTES / sizeof(address) + 1)

#define SYMBOL(name, field) {name, NULL, offsetof(struct api, field), false}

static const struct symbol driver_symbols[] = {
    SYMBOL("cuInit", init),
    SYMBOL("cuDriverGetVersion", driver_version),
    SYMBOL("cuGetErrorName", error_name),
    SYMBOL("cuGetErrorString", error_text),
    SYMBOL("cuDeviceGetCount", device_count),
    SYMBOL("cuDeviceGet", device_get),
    SYMBOL("cuDeviceGetName", device_name),
    SYMBOL("cuDeviceGetAttribute", device_attribute),
    SYMBOL("cuDevicePrimaryCtxRetain", context_retain),
    {"cuDevicePrimaryCtxRelease_v2", "cuDevicePrimaryCtxRelease", offsetof(struct api, context_release), false},
    SYMBOL("cuCtxPushCurrent_v2", context_push),
    SYMBOL("cuCtxPopCurrent_v2", context_pop),
    SYMBOL("cuMemGetInfo_v2", memory_info),
    SYMBOL("cuMemAlloc_v2", memory_alloc),
    SYMBOL("cuMemFree_v2", memory_free),
    SYMBOL("cuMemHostAlloc", host_alloc),
    SYMBOL("cuMemFreeHost", host_free),
    SYMBOL("cuMemHostGetDevicePointer_v2", host_address),
    SYMBOL("cuMemcpyHtoDAsync_v2", copy_to_device_async),
    SYMBOL("cuMemcpyDtoHAsync_v2", copy_to_host_async),
    SYMBOL("cuModuleLoadDataEx", module_load),
    SYMBOL("cuModuleUnload", module_unload),
    SYMBOL("cuModuleGetFunction", module_function),
    SYMBOL("cuFuncSetAttribute", function_set),
    SYMBOL("cuStreamCreate", stream_create),
    SYMBOL("cuStreamDestroy_v2", stream_destroy),
    SYMBOL("cuStreamSynchronize", stream_synchronize),
    SYMBOL("cuLaunchKernel", launch),
    SYMBOL("cuEventCreate", event_create),
    SYMBOL("cuEventRecord", event_record),
    SYMBOL("cuEventElapsedTime", event_elapsed),
    SYMBOL("cuEventDestroy_v2", event_destroy),
    {"cuFuncLoad", NULL, offsetof(struct api, function_load), true},
    {"cuFuncGetParamInfo", NULL, offsetof(struct api, parameter_info), true},
    {"cuEventRecordWithFlags", NULL, offsetof(struct api, event_record_with_flags), true},
    {"cuStreamBeginCapture_v2", NULL, offsetof(struct api, capture_begin), true},
    {"cuStreamEndCapture", NULL, offsetof(struct api, capture_end), true},
    {"cuGraphInstantiateWithFlags", NULL, offsetof(struct api, instantiate_with_flags), true},
    {"cuGraphInstantiate_v2", "cuGraphInstantiate", offsetof(struct api, instantiate), true},
    {"cuGraphLaunch", NULL, offsetof(struct api, graph_launch), true},
    {"cuGraphDestroy", NULL, offsetof(struct api, graph_destroy), true},
    {"cuGraphExecDestroy", NULL, offsetof(struct api, executable_destroy), true},
};

/* ---- NVRTC (nvrtc.h) ---- */

struct nvrtc {
    const char *(*error_text)(int result);
    int (*version)(int *major, int *minor);
    int (*create)(void **program, const char *source, const char *name, int count, const char *const *headers,
                  const char *const *names);
    int (*destroy)(void **program);
    int (*compile)(void *program, int count, const char *const *options);
    int (*log_size)(void *program, size_t *size);
    int (*log)(void *program, char *text);
    int (*ptx_size)(void *program, size_t *size);
    int (*ptx)(void *program, char *text);
    int (*cubin_size)(void *program, size_t *size); /* NULL before CUDA 11.1, and cubin too */
    int (*cubin)(void *program, char *code);
};

static const struct symbol nvrtc_symbols[] = {
    {"nvrtcGetErrorString", NULL, offsetof(struct nvrtc, error_text), false},
    {"nvrtcVersion", NULL, offsetof(struct nvrtc, version), false},
    {"nvrtcCreateProgram", NULL, offsetof(struct nvrtc, create), false},
    {"nvrtcDestroyProgram", NULL, offsetof(struct nvrtc, destroy), false},
    {"nvrtcCompileProgram", NULL, offsetof(struct nvrtc, compile), false},
    {"nvrtcGetProgramLogSize", NULL, offsetof(struct nvrtc, log_size), false},
    {"nvrtcGetProgramLog", NULL, offsetof(struct nvrtc, log), false},
    {"nvrtcGetPTXSize", NULL, offsetof(struct nvrtc, ptx_size), false},
    {"nvrtcGetPTX", NULL, offsetof(struct nvrtc, ptx), false},
    {"nvrtcGetCUBINSize", NULL, offsetof(struct nvrtc, cubin_size), true},
    {"nvrtcGetCUBIN", NULL, offsetof(struct nvrtc, cubin), true},
};

/* ---- the driver's state ---- */

struct tensor {     /* a network input or output */
    uint64_t bytes;
    uint64_t staged; /* its offset in the staging memory */
    bool mapped;     /* kernels work on the staging memory itself: nothing is copied on the device */
};

struct cuda {
    const struct xct_plan *plan;
    struct api api;
    int device;
    int capability; /* 87: compute capability 8.7 */
    int version;    /* of CUDA that the driver supports: 12060 is 12.6 */
    char gpu[128];
    char description[480];
    void *context;
    void *module;
    void *stream;
    bool is_capturing;
    void *graph;        /* CUgraphExec; NULL: kernel by kernel */
    char no_graph[200]; /* why, where a call for it failed */
    address arena;
    address weights;
    uint8_t *staging; /* pinned, all inputs and outputs */
    struct tensor *tensors;
    void **functions;   /* of every step */
    address *addresses; /* of every argument of the plan */
    void **parameters;  /* pointers to these, as cuLaunchKernel wants them */
    void **events;      /* before every step and behind the last; NULL: steps are not timed */
    uint64_t *step_ns;
};

/* "<what>: CUDA_ERROR_...: <the driver's own words>". */
static int fail(const struct cuda *cuda, struct xct_error *error, int result, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static int fail(const struct cuda *cuda, struct xct_error *error, int result, const char *format, ...)
{
    char what[512];
    va_list arguments;
    va_start(arguments, format);
    if (vsnprintf(what, sizeof what, format, arguments) < 0)
        what[0] = 0;
    va_end(arguments);
    const char *name = NULL, *text = NULL;
    (void)cuda->api.error_name(result, &name);
    (void)cuda->api.error_text(result, &text);
    int code = result == OUT_OF_MEMORY ? XCT_ERROR_MEMORY : XCT_ERROR_DEVICE;
    return xct_fail(error, code, "%s: %s (%d): %s", what, name != NULL ? name : "CUDA error", result,
                    text != NULL ? text : "the driver says no more");
}

/* ---- libraries ---- */

/* Fills the struct of functions; returns the name of one that is missing, or NULL. */
static const char *bind(void *library, const struct symbol *symbols, size_t count, void *functions)
{
    for (size_t i = 0; i < count; i++) {
        void *function = dlsym(library, symbols[i].name);
        if (function == NULL && symbols[i].old_name != NULL)
            function = dlsym(library, symbols[i].old_name);
        if (function == NULL && !symbols[i].optional)
            return symbols[i].name;
        /* ISO C has no conversion to a function pointer; POSIX gives dlsym this one. */
        memcpy((char *)functions + symbols[i].offset, &function, sizeof function);
    }
    return NULL;
}

/* The library stays loaded: it has threads of its own and is not made to be unloaded. */
static int open_driver(struct cuda *cuda, struct xct_error *error)
{
    const char *name = getenv("XCEPTILE_CUDA");
    if (name == NULL || name[0] == 0)
        name = "libcuda.so.1";
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *why = dlerror();
        return xct_fail(error, XCT_ERROR_DEVICE, "no CUDA driver: %s. The bundle was compiled for an NVIDIA GPU; install "
                        "its driver, or name the library in XCEPTILE_CUDA", why != NULL ? why : name);
    }
    const char *missing = bind(library, driver_symbols, sizeof driver_symbols / sizeof driver_symbols[0], &cuda->api);
    if (missing == NULL)
        return XCT_OK;
    dlclose(library);
    return xct_fail(error, XCT_ERROR_DEVICE, "the CUDA driver %s is too old: it has no %s. CUDA 10.0 (JetPack 4) is the "
                    "oldest that serves", name, missing);
}

static void make_printable(char *text)
{
    for (; *text != 0; text++)
        if (*text < 0x20 || *text > 0x7e)
            *text = '?';
}

static int choose_device(struct cuda *cuda, struct xct_error *error)
{
    const struct api *api = &cuda->api;
    int count = 0;
    int result = api->init(0);
    int known = api->driver_version(&cuda->version); /* also where there is no GPU: the message tells it */
    if (result == SUCCESS)
        result = known;
    if (result == SUCCESS)
        result = api->device_count(&count);
    if (result == SYSTEM_DRIVER_MISMATCH) /* after an update of the driver, until the machine is restarted */
        return fail(cuda, error, result, "the CUDA driver's library and the kernel's driver are of two versions: restart the "
                    "machine");
    if (result == NO_DEVICE || (result == SUCCESS && count == 0))
        return xct_fail(error, XCT_ERROR_DEVICE, "the CUDA driver (%d.%d) finds no GPU. The bundle was compiled for one; "
                        "CUDA_VISIBLE_DEVICES can hide it", cuda->version / 1000, cuda->version % 1000 / 10);
    if (result != SUCCESS)
        return fail(cuda, error, result, "the CUDA driver does not start");
    int major = 0, minor = 0;
    result = api->device_get(&cuda->device, 0);
    if (result == SUCCESS)
        result = api->device_name(cuda->gpu, sizeof cuda->gpu - 1, cuda->device);
    if (result == SUCCESS)
        result = api->device_attribute(&major, CAPABILITY_MAJOR, cuda->device);
    if (result == SUCCESS)
        result = api->device_attribute(&minor, CAPABILITY_MINOR, cuda->device);
    if (result != SUCCESS)
        return fail(cuda, error, result, "the GPU does not say what it is");
    result = api->context_retain(&cuda->context, cuda->device);
    if (result != SUCCESS) {
        cuda->context = NULL;
        return fail(cuda, error, result, "the GPU cannot be used");
    }
    cuda->capability = 10 * major + minor;
    make_printable(cuda->gpu);
    return XCT_OK;
}

/* ---- the kernels: a binary for this very GPU, else PTX, else the source ---- */

struct reasons { /* why each form of the kernels was refused */
    char text[1400];
    size_t length;
};

static void add_reason(struct reasons *reasons, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void add_reason(struct reasons *reasons, const char *format, ...)
{
    size_t room = sizeof reasons->text - reasons->length;
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(reasons->text + reasons->length, room, format, arguments);
    va_end(arguments);
    if (length > 0)
        reasons->length += (size_t)length < room ? (size_t)length : room - 1;
}

/* The image must end with a zero byte if it is text. */
static bool load_image(struct cuda *cuda, const char *name, const void *image, struct reasons *reasons)
{
    char log[600] = "";
    int options[2] = {ERROR_LOG_BUFFER, ERROR_LOG_BUFFER_SIZE_BYTES};
    void *values[2] = {log, (void *)(uintptr_t)(sizeof log - 1)}; /* the driver takes numbers in pointers */
    int result = cuda->api.module_load(&cuda->module, image, 2, options, values);
    if (result == SUCCESS)
        return true;
    cuda->module = NULL;
    const char *error = NULL;
    (void)cuda->api.error_name(result, &error);
    const char *meaning = result == NO_BINARY_FOR_GPU         ? ", made for another GPU"
                          : result == UNSUPPORTED_PTX_VERSION ? ", the driver is too old for it"
                                                              : "";
    add_reason(reasons, "\n%s: %s (%d)%s%s%s", name, error != NULL ? error : "CUDA error", result, meaning,
               log[0] != 0 ? ": " : "", log);
    return false;
}

/* The file with a zero byte behind it, in memory to be freed; NULL: there is no such file, or a reason was added. */
static char *read_text(const char *directory, const char *name, struct reasons *reasons)
{
    struct xct_error error;
    struct xct_file file;
    char path[XCT_MAX_PATH_BYTES];
    if (xct_path_join(path, directory, name, &error) != XCT_OK || xct_file_absent(path))
        return NULL;
    if (xct_file_map(&file, path, &error) != XCT_OK) {
        add_reason(reasons, "\n%.200s", error.message);
        return NULL;
    }
    char *text = malloc(file.size + 1);
    if (text == NULL)
        add_reason(reasons, "\n%s: no memory", name);
    else {
        if (file.size > 0)
            memcpy(text, file.data, file.size);
        text[file.size] = 0;
    }
    xct_file_unmap(&file);
    return text;
}

static void *open_nvrtc(struct nvrtc *nvrtc, struct reasons *reasons)
{
    static const char *const names[] = {"libnvrtc.so",      "libnvrtc.so.13",   "libnvrtc.so.12",   "libnvrtc.so.11.2",
                                        "libnvrtc.so.11.1", "libnvrtc.so.11.0", "libnvrtc.so.10.2", "libnvrtc.so.10.0"};
    const char *chosen = getenv("XCEPTILE_NVRTC");
    bool is_chosen = chosen != NULL && chosen[0] != 0;
    void *library = is_chosen ? dlopen(chosen, RTLD_NOW | RTLD_LOCAL) : NULL;
    for (size_t i = 0; !is_chosen && library == NULL && i < sizeof names / sizeof names[0]; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        add_reason(reasons, "\nkernels.cu: no NVRTC here to compile it (name the library in XCEPTILE_NVRTC)");
        return NULL;
    }
    const char *missing = bind(library, nvrtc_symbols, sizeof nvrtc_symbols / sizeof nvrtc_symbols[0], nvrtc);
    if (missing == NULL)
        return library;
    add_reason(reasons, "\nkernels.cu: NVRTC has no %s", missing);
    dlclose(library);
    return NULL;
}

/* Machine code of this very GPU, or PTX from an NVRTC that makes no other: a driver reads the machine code of an NVRTC
 * newer than itself, of the same CUDA major version, but not its PTX. As compile/backends/nvrtc.py compiles it: a
 * multiplication and an addition are rounded one after the other. */
static char *compile(const struct cuda *cuda, const struct nvrtc *nvrtc, const char *source, struct reasons *reasons)
{
    char architecture[48];
    const char *const options[] = {architecture, "--fmad=false", "--std=c++14"};
    bool binary = nvrtc->cubin_size != NULL && nvrtc->cubin != NULL;
    snprintf(architecture, sizeof architecture, "--gpu-architecture=%s_%d", binary ? "sm" : "compute", cuda->capability);
    int major = 0, minor = 0;
    (void)nvrtc->version(&major, &minor);
    void *program = NULL;
    size_t size = 0;
    char *code = NULL;
    int result = nvrtc->create(&program, source, "kernels.cu", 0, NULL, NULL);
    if (result == SUCCESS)
        result = nvrtc->compile(program, 3, options);
    if (result == SUCCESS)
        result = binary ? nvrtc->cubin_size(program, &size) : nvrtc->ptx_size(program, &size);
    if (result == SUCCESS && (code = malloc(size + 1)) != NULL) {
        code[size] = 0;
        result = binary ? nvrtc->cubin(program, code) : nvrtc->ptx(program, code);
    }
    if (result != SUCCESS || code == NULL) {
        free(code);
        code = NULL;
        bool has_log = program != NULL && nvrtc->log_size(program, &size) == SUCCESS && size > 1;
        char *log = has_log ? calloc(1, size + 1) : NULL;
        if (log != NULL && nvrtc->log(program, log) != SUCCESS)
            log[0] = 0;
        add_reason(reasons, "\nkernels.cu: NVRTC %d.%d: %s%s%.600s", major, minor,
                   result == SUCCESS ? "no memory" : nvrtc->error_text(result), log != NULL ? ": " : "",
                   log != NULL ? log : "");
        free(log);
    }
    if (program != NULL)
        (void)nvrtc->destroy(&program);
    return code;
}

static bool load_source(struct cuda *cuda, const char *source, struct reasons *reasons)
{
    struct nvrtc nvrtc;
    void *library = open_nvrtc(&nvrtc, reasons);
    if (library == NULL)
        return false;
    char *code = compile(cuda, &nvrtc, source, reasons);
    dlclose(library);
    bool loaded = code != NULL && load_image(cuda, "kernels.cu", code, reasons);
    free(code);
    return loaded;
}

static const char *const kernel_files[] = {"kernels.cubin", "kernels.ptx", "kernels.cu"};

static int load_kernels(struct cuda *cuda, const char *directory, const char **from, struct xct_error *error)
{
    struct reasons reasons = {.length = 0};
    bool loaded = false;
    for (size_t i = 0; !loaded && i < 3; i++) {
        char *image = read_text(directory, kernel_files[i], &reasons);
        if (image == NULL)
            continue;
        loaded = i == 2 ? load_source(cuda, image, &reasons) : load_image(cuda, kernel_files[i], image, &reasons);
        free(image);
        *from = kernel_files[i];
    }
    if (loaded)
        return XCT_OK;
    return xct_fail(error, XCT_ERROR_UNSUPPORTED, "the bundle's kernels do not run on this GPU (%s, compute capability "
                    "%d.%d, driver for CUDA %d.%d): compile it for this board's target%s", cuda->gpu,
                    cuda->capability / 10, cuda->capability % 10, cuda->version / 1000, cuda->version % 1000 / 10,
                    reasons.length > 0 ? reasons.text : "; it holds no kernels at all");
}

/* The most dynamic shared memory that any step gives a kernel. */
static uint32_t shared_bytes_of(const struct xct_plan *plan, uint32_t kernel)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < plan->header->step_count; i++)
        if (plan->steps[i].kernel == kernel && plan->launches[i].shared_bytes > most)
            most = plan->launches[i].shared_bytes;
    return most;
}

/* Refuses a step whose kernel does not take as many pointers as the step has arguments. A driver that cannot tell
 * refuses none. */
static int check_parameters(const struct cuda *cuda, uint32_t index, struct xct_error *error)
{
    const struct xct_plan_step *step = &cuda->plan->steps[index];
    if (cuda->api.parameter_info == NULL)
        return XCT_OK;
    size_t offset = 0, size = 0, ignored = 0, count = step->argument_count;
    int last = cuda->api.parameter_info(cuda->functions[index], count - 1, &offset, &size);
    int next = cuda->api.parameter_info(cuda->functions[index], count, &ignored, &ignored);
    bool is_pointer = last != SUCCESS || (offset == (count - 1) * sizeof(address) && size == sizeof(address));
    if (last != INVALID_VALUE && next != SUCCESS && is_pointer)
        return XCT_OK;
    return xct_fail(error, XCT_ERROR_FORMAT, "step %u (%s) has %zu arguments, and its kernel %s takes others: the plan and "
                    "the kernels are not of one compilation", index, cuda->plan->strings + step->name, count,
                    cuda->plan->strings + cuda->plan->kernels[step->kernel]);
}

static int find_functions(struct cuda *cuda, struct xct_error *error)
{
    const struct xct_plan *plan = cuda->plan;
    for (uint32_t i = 0; i < plan->header->step_count; i++) {
        const char *name = plan->strings + plan->kernels[plan->steps[i].kernel];
        int result = cuda->api.module_function(&cuda->functions[i], cuda->module, name);
        if (result != SUCCESS)
            return fail(cuda, error, result, "the kernels have no %s", name);
        int code = check_parameters(cuda, i, error);
        if (code != XCT_OK)
            return code;
        /* A driver may load a kernel as late as its first launch, which would be in the capture. */
        result = cuda->api.function_load != NULL ? cuda->api.function_load(cuda->functions[i]) : SUCCESS;
        if (result != SUCCESS)
            return fail(cuda, error, result, "%s cannot load %s", cuda->gpu, name);
        uint32_t shared_bytes = shared_bytes_of(plan, plan->steps[i].kernel);
        if (shared_bytes <= 48 << 10) /* what every kernel may have without asking */
            continue;
        result = cuda->api.function_set(cuda->functions[i], MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)shared_bytes);
        if (result != SUCCESS)
            return fail(cuda, error, result, "%s gives %s no %u bytes of shared memory", cuda->gpu, name, shared_bytes);
    }
    return XCT_OK;
}

/* ---- memory ---- */

static int no_room(const struct cuda *cuda, int result, const char *what, uint64_t bytes, struct xct_error *error)
{
    size_t available = 0, total = 0;
    if (cuda->api.memory_info(&available, &total) != SUCCESS)
        available = total = 0;
    return fail(cuda, error, result, "%s has no %llu bytes for %s (%zu of %zu are free)", cuda->gpu,
                (unsigned long long)bytes, what, available, total);
}

/* Whether all kernels that touch the tensor's place in the arena stay inside it: then it can lie elsewhere. */
static bool can_move(const struct xct_plan *plan, const struct xct_plan_tensor *tensor)
{
    uint64_t begin = tensor->offset, end = begin + xct_plan_tensor_bytes(tensor);
    for (uint32_t i = 0; i < plan->header->argument_count; i++) {
        const struct xct_plan_argument *argument = &plan->arguments[i];
        uint64_t first = argument->offset, last = first + argument->count * xct_dtype_of(argument->dtype)->bytes;
        if (argument->space == XCT_SPACE_ARENA && first < end && last > begin && (first < begin || last > end))
            return false;
    }
    for (uint32_t i = 0; i < plan->header->tensor_count; i++) { /* two that share memory stay together */
        const struct xct_plan_tensor *other = &plan->tensors[i];
        if (other != tensor && other->offset < end && other->offset + xct_plan_tensor_bytes(other) > begin)
            return false;
    }
    return true;
}

/* Where kernels find the argument. */
static address address_of(const struct cuda *cuda, const struct xct_plan_argument *argument, address staging)
{
    if (argument->space == XCT_SPACE_WEIGHTS)
        return cuda->weights + argument->offset;
    for (uint32_t i = 0; i < cuda->plan->header->tensor_count; i++) {
        const struct xct_plan_tensor *tensor = &cuda->plan->tensors[i];
        if (cuda->tensors[i].mapped && argument->offset >= tensor->offset
            && argument->offset < tensor->offset + cuda->tensors[i].bytes)
            return staging + cuda->tensors[i].staged + (argument->offset - tensor->offset);
    }
    return cuda->arena + argument->offset;
}

static int allocate_host(struct cuda *cuda, struct xct_error *error)
{
    const struct xct_plan_header *header = cuda->plan->header;
    cuda->tensors = calloc(header->tensor_count, sizeof *cuda->tensors);
    cuda->functions = calloc(header->step_count, sizeof *cuda->functions);
    cuda->addresses = calloc((size_t)header->argument_count + PADDING_ADDRESSES, sizeof *cuda->addresses);
    cuda->parameters = calloc((size_t)header->argument_count + MAX_PARAMETER_BYTES, sizeof *cuda->parameters);
    if (cuda->step_ns != NULL)
        cuda->events = calloc((size_t)header->step_count + 1, sizeof *cuda->events);
    if (cuda->tensors == NULL || cuda->functions == NULL || cuda->addresses == NULL || cuda->parameters == NULL
        || (cuda->step_ns != NULL && cuda->events == NULL))
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory for %u steps", header->step_count);
    return XCT_OK;
}

/* Pinned memory for all inputs and outputs, each at a multiple of the alignment that kernels rely on. A GPU that shares
 * the processor's memory works on it in place. */
static int allocate_staging(struct cuda *cuda, address *staging, struct xct_error *error)
{
    const struct xct_plan *plan = cuda->plan;
    uint64_t size = 0;
    int integrated = 0;
    int result = cuda->api.device_attribute(&integrated, INTEGRATED, cuda->device);
    for (uint32_t i = 0; i < plan->header->tensor_count; i++) {
        struct tensor *tensor = &cuda->tensors[i];
        tensor->bytes = xct_plan_tensor_bytes(&plan->tensors[i]);
        tensor->staged = size;
        tensor->mapped = integrated != 0 && can_move(plan, &plan->tensors[i]);
        size += (tensor->bytes + XCT_GPU_ALIGNMENT - 1) / XCT_GPU_ALIGNMENT * XCT_GPU_ALIGNMENT;
    }
    void *memory = NULL;
    if (result == SUCCESS)
        result = cuda->api.host_alloc(&memory, size, integrated != 0 ? HOST_DEVICEMAP : 0);
    if (result != SUCCESS)
        return no_room(cuda, result, "inputs and outputs", size, error);
    cuda->staging = memory;
    if (integrated != 0)
        result = cuda->api.host_address(staging, memory, 0);
    return result == SUCCESS ? XCT_OK : fail(cuda, error, result, "the GPU does not see the processor's memory");
}

static int allocate(struct cuda *cuda, const uint8_t *weights, struct xct_error *error)
{
    const struct xct_plan_header *header = cuda->plan->header;
    int result = cuda->api.memory_alloc(&cuda->arena, header->arena_bytes);
    if (result != SUCCESS) {
        cuda->arena = 0;
        return no_room(cuda, result, "activations", header->arena_bytes, error);
    }
    if (header->weights_bytes > 0) {
        result = cuda->api.memory_alloc(&cuda->weights, header->weights_bytes);
        if (result != SUCCESS) {
            cuda->weights = 0;
            return no_room(cuda, result, "weights", header->weights_bytes, error);
        }
        result = cuda->api.copy_to_device_async(cuda->weights, weights, header->weights_bytes, cuda->stream);
        if (result == SUCCESS)
            result = cuda->api.stream_synchronize(cuda->stream);
        if (result != SUCCESS)
            return fail(cuda, error, result, "the weights cannot be copied to the GPU");
    }
    address staging = 0;
    int code = allocate_staging(cuda, &staging, error);
    if (code != XCT_OK)
        return code;
    for (uint32_t i = 0; i < header->argument_count; i++) {
        cuda->addresses[i] = address_of(cuda, &cuda->plan->arguments[i], staging);
        cuda->parameters[i] = &cuda->addresses[i];
    }
    /* The driver reads as many parameters as the kernel takes, each as large as the kernel says, and before CUDA 12.4
     * only the kernel knows: a plan that does not fit must not send it past the end of either array. Behind the last
     * argument it finds the address of nothing. */
    for (uint32_t i = 0; i < MAX_PARAMETER_BYTES; i++)
        cuda->parameters[header->argument_count + i] = &cuda->addresses[header->argument_count];
    return XCT_OK;
}

/* ---- running ---- */

/* Copies the tensors of one kind between staging and arena, but those that kernels find where they are. */
static int enqueue_copies(const struct cuda *cuda, uint32_t kind, struct xct_error *error)
{
    for (uint32_t i = 0; i < cuda->plan->header->tensor_count; i++) {
        const struct xct_plan_tensor *tensor = &cuda->plan->tensors[i];
        const struct tensor *staged = &cuda->tensors[i];
        if (tensor->kind != kind || staged->mapped)
            continue;
        uint8_t *host = cuda->staging + staged->staged;
        address there = cuda->arena + tensor->offset;
        int result = kind == XCT_KIND_INPUT
                         ? cuda->api.copy_to_device_async(there, host, staged->bytes, cuda->stream)
                         : cuda->api.copy_to_host_async(host, there, staged->bytes, cuda->stream);
        if (result != SUCCESS)
            return fail(cuda, error, result, "%s cannot be copied", cuda->plan->strings + tensor->name);
    }
    return XCT_OK;
}

/* The event before a step, or behind the last. In a graph only an external one can be asked for its time. */
static int record(const struct cuda *cuda, uint32_t index)
{
    if (cuda->events == NULL)
        return SUCCESS;
    return cuda->is_capturing ? cuda->api.event_record_with_flags(cuda->events[index], cuda->stream, RECORD_EXTERNAL)
                              : cuda->api.event_record(cuda->events[index], cuda->stream);
}

static int enqueue_step(const struct cuda *cuda, uint32_t index, struct xct_error *error)
{
    const struct xct_plan_step *step = &cuda->plan->steps[index];
    const struct xct_plan_launch *launch = &cuda->plan->launches[index];
    const uint32_t *grid = launch->groups, *block = launch->group_size;
    int result = record(cuda, index);
    if (result != SUCCESS)
        return fail(cuda, error, result, "the steps cannot be timed");
    result = cuda->api.launch(cuda->functions[index], grid[0], grid[1], grid[2], block[0], block[1], block[2],
                              launch->shared_bytes, cuda->stream, cuda->parameters + step->first_argument, NULL);
    if (result == SUCCESS)
        return XCT_OK;
    return fail(cuda, error, result, "step %u (%s) cannot be launched: %s, %ux%ux%u blocks of %ux%ux%u threads, %u bytes "
                "of shared memory", index, cuda->plan->strings + step->name,
                cuda->plan->strings + cuda->plan->kernels[step->kernel], grid[0], grid[1], grid[2], block[0], block[1],
                block[2], launch->shared_bytes);
}

static int enqueue(const struct cuda *cuda, struct xct_error *error)
{
    uint32_t steps = cuda->plan->header->step_count;
    int code = enqueue_copies(cuda, XCT_KIND_INPUT, error);
    for (uint32_t i = 0; code == XCT_OK && i < steps; i++)
        code = enqueue_step(cuda, i, error);
    int result = code == XCT_OK ? record(cuda, steps) : SUCCESS;
    if (result != SUCCESS)
        code = fail(cuda, error, result, "the steps cannot be timed");
    return code == XCT_OK ? enqueue_copies(cuda, XCT_KIND_OUTPUT, error) : code;
}

static bool has_graphs(const struct cuda *cuda)
{
    const struct api *api = &cuda->api;
    if (cuda->events != NULL && api->event_record_with_flags == NULL)
        return false;
    return api->capture_begin != NULL && api->capture_end != NULL && api->graph_launch != NULL
           && api->graph_destroy != NULL && api->executable_destroy != NULL
           && (api->instantiate_with_flags != NULL || api->instantiate != NULL);
}

/* Makes the plan one graph. */
static int capture(struct cuda *cuda, struct xct_error *error)
{
    const struct api *api = &cuda->api;
    int result = api->capture_begin(cuda->stream, CAPTURE_THREAD_LOCAL);
    if (result != SUCCESS)
        return fail(cuda, error, result, "no capture begins");
    void *graph = NULL;
    cuda->is_capturing = true;
    int code = enqueue(cuda, error);
    cuda->is_capturing = false;
    result = api->capture_end(cuda->stream, &graph); /* also after a failure: it ends the capture */
    if (code == XCT_OK && result != SUCCESS)
        code = fail(cuda, error, result, "the capture does not end");
    if (code == XCT_OK) {
        result = api->instantiate_with_flags != NULL ? api->instantiate_with_flags(&cuda->graph, graph, 0)
                                                     : api->instantiate(&cuda->graph, graph, NULL, NULL, 0);
        if (result != SUCCESS) {
            cuda->graph = NULL;
            code = fail(cuda, error, result, "the graph is not made");
        }
    }
    if (graph != NULL)
        (void)api->graph_destroy(graph);
    return code;
}

/* A graph costs less to launch and computes nothing else: without one kernels are launched one by one, and what is
 * wrong with them the first run says. */
static void try_graph(struct cuda *cuda)
{
    struct xct_error error;
    if (has_graphs(cuda) && capture(cuda, &error) != XCT_OK)
        snprintf(cuda->no_graph, sizeof cuda->no_graph, " (%.190s)", error.message);
    make_printable(cuda->no_graph);
}

static void stage_inputs(const struct cuda *cuda, const uint8_t *input)
{
    for (uint32_t i = 0; i < cuda->plan->header->tensor_count; i++) {
        if (cuda->plan->tensors[i].kind != XCT_KIND_INPUT)
            continue;
        memcpy(cuda->staging + cuda->tensors[i].staged, input, cuda->tensors[i].bytes);
        input += cuda->tensors[i].bytes;
    }
}

static void give_outputs(const struct cuda *cuda, uint8_t *output)
{
    for (uint32_t i = 0; i < cuda->plan->header->tensor_count; i++) {
        if (cuda->plan->tensors[i].kind != XCT_KIND_OUTPUT)
            continue;
        memcpy(output, cuda->staging + cuda->tensors[i].staged, cuda->tensors[i].bytes);
        output += cuda->tensors[i].bytes;
    }
}

static int read_times(const struct cuda *cuda, struct xct_error *error)
{
    for (uint32_t i = 0; i < cuda->plan->header->step_count; i++) {
        float ms = 0;
        int result = cuda->api.event_elapsed(&ms, cuda->events[i], cuda->events[i + 1]);
        if (result != SUCCESS)
            return fail(cuda, error, result, "the steps cannot be timed");
        cuda->step_ns[i] = ms > 0 ? (uint64_t)((double)ms * 1e6) : 0;
    }
    return XCT_OK;
}

static int run(struct cuda *cuda, const void *input, void *output, struct xct_error *error)
{
    stage_inputs(cuda, input);
    int code = XCT_OK, result = SUCCESS;
    if (cuda->graph != NULL) {
        result = cuda->api.graph_launch(cuda->graph, cuda->stream);
        if (result != SUCCESS)
            code = fail(cuda, error, result, "the CUDA graph cannot be launched");
    } else
        code = enqueue(cuda, error);
    /* Also after a failure: nothing of this run may be under way when the next one begins. */
    result = cuda->api.stream_synchronize(cuda->stream);
    if (code == XCT_OK && result != SUCCESS)
        code = fail(cuda, error, result, "the network failed on %s; open a new session, and if that fails too, start "
                    "the process anew", cuda->gpu);
    if (code == XCT_OK && cuda->events != NULL)
        code = read_times(cuda, error);
    if (code == XCT_OK)
        give_outputs(cuda, output);
    return code;
}

/* ---- the driver ---- */

/* Every call may come from another thread, and the thread may have a context of its own. */
static int enter(const struct cuda *cuda, struct xct_error *error)
{
    int result = cuda->api.context_push(cuda->context);
    return result == SUCCESS ? XCT_OK : fail(cuda, error, result, "the GPU's context cannot be entered");
}

static void leave(const struct cuda *cuda)
{
    void *context;
    (void)cuda->api.context_pop(&context);
}

static int prepare(struct cuda *cuda, const struct xct_driver_config *config, struct xct_error *error)
{
    const char *from = "";
    int result = cuda->api.stream_create(&cuda->stream, STREAM_NON_BLOCKING);
    if (result != SUCCESS) {
        cuda->stream = NULL;
        return fail(cuda, error, result, "the GPU gives no stream");
    }
    int code = load_kernels(cuda, config->directory, &from, error);
    if (code == XCT_OK)
        code = allocate_host(cuda, error);
    if (code == XCT_OK)
        code = find_functions(cuda, error);
    if (code == XCT_OK)
        code = allocate(cuda, config->weights, error);
    if (code != XCT_OK)
        return code;
    for (uint32_t i = 0; cuda->events != NULL && i <= cuda->plan->header->step_count; i++) {
        result = cuda->api.event_create(&cuda->events[i], EVENT_DEFAULT);
        if (result != SUCCESS) {
            cuda->events[i] = NULL;
            return fail(cuda, error, result, "the steps cannot be timed");
        }
    }
    try_graph(cuda);
    snprintf(cuda->description, sizeof cuda->description, "%s, compute capability %d.%d, driver for CUDA %d.%d, %s, %s%s",
             cuda->gpu, cuda->capability / 10, cuda->capability % 10, cuda->version / 1000, cuda->version % 1000 / 10,
             from, cuda->graph != NULL ? "one graph" : "kernel by kernel", cuda->no_graph);
    return XCT_OK;
}

static void release(struct cuda *cuda)
{
    const struct api *api = &cuda->api;
    if (cuda->graph != NULL)
        (void)api->executable_destroy(cuda->graph);
    for (uint32_t i = 0; cuda->events != NULL && i <= cuda->plan->header->step_count; i++)
        if (cuda->events[i] != NULL)
            (void)api->event_destroy(cuda->events[i]);
    if (cuda->stream != NULL)
        (void)api->stream_destroy(cuda->stream);
    if (cuda->staging != NULL)
        (void)api->host_free(cuda->staging);
    if (cuda->weights != 0)
        (void)api->memory_free(cuda->weights);
    if (cuda->arena != 0)
        (void)api->memory_free(cuda->arena);
    if (cuda->module != NULL)
        (void)api->module_unload(cuda->module);
}

static void cuda_close(void *state)
{
    struct cuda *cuda = state;
    struct xct_error ignored;
    if (cuda == NULL)
        return;
    if (cuda->context != NULL) {
        bool entered = enter(cuda, &ignored) == XCT_OK; /* a context that failed may refuse; what can be freed, is */
        release(cuda);
        if (entered)
            leave(cuda);
        (void)cuda->api.context_release(cuda->device);
    }
    free(cuda->tensors);
    free(cuda->functions);
    free(cuda->addresses);
    free(cuda->parameters);
    free(cuda->events);
    free(cuda);
}

static int cuda_open(const struct xct_driver_config *config, void **state, struct xct_error *error)
{
    *state = NULL;
    struct cuda *cuda = calloc(1, sizeof *cuda);
    if (cuda == NULL)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory");
    cuda->plan = config->plan;
    cuda->step_ns = config->step_ns;
    int code = open_driver(cuda, error);
    if (code == XCT_OK)
        code = choose_device(cuda, error);
    if (code == XCT_OK)
        code = enter(cuda, error);
    if (code == XCT_OK) {
        code = prepare(cuda, config, error);
        leave(cuda);
    }
    if (code != XCT_OK) {
        cuda_close(cuda);
        return code;
    }
    *state = cuda;
    return XCT_OK;
}

static int cuda_run(void *state, const void *input, void *output, struct xct_error *error)
{
    struct cuda *cuda = state;
    int code = enter(cuda, error);
    if (code != XCT_OK)
        return code;
    code = run(cuda, input, output, error);
    leave(cuda);
    return code;
}

static uint32_t cuda_threads(const void *state)
{
    (void)state;
    return 1;
}

static const char *cuda_device(const void *state)
{
    return ((const struct cuda *)state)->description;
}

const struct xct_driver xct_cuda_driver = {
    .engine = XCT_ENGINE_CUDA,
    .kernel_files = {"kernels.cubin", "kernels.ptx", "kernels.cu", NULL},
    .open = cuda_open,
    .run = cuda_run,
    .threads = cuda_threads,
    .device = cuda_device,
    .close = cuda_close,
};
