/* The driver for GPUs through OpenCL 1.2. The vendor's library is opened at run time, and the few declarations needed
 * of cl.h (Khronos, OpenCL 1.2; constants as in its Appendix "Header") are here, so nothing of OpenCL is needed to
 * build. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define KERNELS_FILE "kernels.cl"
#define FP16 "cl_khr_fp16"
#define MAX_PLATFORMS 16
#define MAX_DEVICES 16 /* of all platforms */
#define MAX_TEXT_BYTES (1u << 20)
#define MAX_VARIANTS 3
/* Launches that are handed to the device together: it begins while the rest is enqueued. TensorFlow Lite's GPU delegate
 * takes 24 on a Mali and 16 on an older Adreno, whose driver may fail if it has to hold more. */
#define FLUSH_PERIOD 16

/* ---- OpenCL ---- */

typedef int32_t cl_int;
typedef uint32_t cl_uint;
typedef uint64_t cl_ulong;
typedef struct cl_platform *cl_platform;
typedef struct cl_device *cl_device;
typedef struct cl_context *cl_context;
typedef struct cl_queue *cl_queue;
typedef struct cl_program *cl_program;
typedef struct cl_kernel *cl_kernel;
typedef struct cl_mem *cl_mem;
typedef struct cl_event *cl_event;
typedef void (*cl_context_notify)(const char *, const void *, size_t, void *);
typedef void (*cl_program_notify)(cl_program, void *);

struct cl_region {
    size_t origin;
    size_t size;
};

enum {
    CL_SUCCESS = 0,
    CL_DEVICE_NOT_FOUND = -1,
    CL_MEM_OBJECT_ALLOCATION_FAILURE = -4,
    CL_OUT_OF_RESOURCES = -5,
    CL_OUT_OF_HOST_MEMORY = -6,
    CL_PLATFORM_NOT_FOUND_KHR = -1001,

    CL_PLATFORM_VERSION = 0x0901,
    CL_PLATFORM_NAME = 0x0902,
    CL_DEVICE_MAX_WORK_ITEM_SIZES = 0x1005,
    CL_DEVICE_MAX_MEM_ALLOC_SIZE = 0x1010,
    CL_DEVICE_MEM_BASE_ADDR_ALIGN = 0x1019,
    CL_DEVICE_SINGLE_FP_CONFIG = 0x101B,
    CL_DEVICE_LOCAL_MEM_SIZE = 0x1023,
    CL_DEVICE_ENDIAN_LITTLE = 0x1026,
    CL_DEVICE_AVAILABLE = 0x1027,
    CL_DEVICE_COMPILER_AVAILABLE = 0x1028,
    CL_DEVICE_NAME = 0x102B,
    CL_DEVICE_VENDOR = 0x102C,
    CL_DRIVER_VERSION = 0x102D,
    CL_DEVICE_VERSION = 0x102F,
    CL_DEVICE_EXTENSIONS = 0x1030,
    CL_DEVICE_HOST_UNIFIED_MEMORY = 0x1035,
    CL_CONTEXT_PLATFORM = 0x1084,
    CL_PROGRAM_BINARY_SIZES = 0x1165,
    CL_PROGRAM_BINARIES = 0x1166,
    CL_PROGRAM_BUILD_LOG = 0x1183,
    CL_KERNEL_NUM_ARGS = 0x1191,
    CL_KERNEL_WORK_GROUP_SIZE = 0x11B0,
    CL_KERNEL_LOCAL_MEM_SIZE = 0x11B2,
    CL_BUFFER_CREATE_TYPE_REGION = 0x1220,
    CL_PROFILING_COMMAND_START = 0x1282,
    CL_PROFILING_COMMAND_END = 0x1283,

    CL_DEVICE_TYPE_CPU = 1 << 1,
    CL_DEVICE_TYPE_GPU = 1 << 2,
    CL_FP_ROUND_TO_NEAREST = 1 << 2,
    CL_QUEUE_PROFILING_ENABLE = 1 << 1,
    CL_MEM_READ_WRITE = 1 << 0,
    CL_MEM_READ_ONLY = 1 << 2,
    CL_MEM_ALLOC_HOST_PTR = 1 << 4,
    CL_MEM_COPY_HOST_PTR = 1 << 5,
    CL_MAP_READ = 1 << 0,
    CL_MAP_WRITE_INVALIDATE_REGION = 1 << 2,
};

/* What is used of the library: result, name, parameters. */
#define FUNCTIONS(F) \
    F(cl_int, clGetPlatformIDs, (cl_uint, cl_platform *, cl_uint *)) \
    F(cl_int, clGetPlatformInfo, (cl_platform, cl_uint, size_t, void *, size_t *)) \
    F(cl_int, clGetDeviceIDs, (cl_platform, cl_ulong, cl_uint, cl_device *, cl_uint *)) \
    F(cl_int, clGetDeviceInfo, (cl_device, cl_uint, size_t, void *, size_t *)) \
    F(cl_context, clCreateContext, (const intptr_t *, cl_uint, const cl_device *, cl_context_notify, void *, cl_int *)) \
    F(cl_int, clReleaseContext, (cl_context)) \
    F(cl_queue, clCreateCommandQueue, (cl_context, cl_device, cl_ulong, cl_int *)) \
    F(cl_int, clReleaseCommandQueue, (cl_queue)) \
    F(cl_mem, clCreateBuffer, (cl_context, cl_ulong, size_t, void *, cl_int *)) \
    F(cl_mem, clCreateSubBuffer, (cl_mem, cl_ulong, cl_uint, const void *, cl_int *)) \
    F(cl_int, clReleaseMemObject, (cl_mem)) \
    F(cl_program, clCreateProgramWithSource, (cl_context, cl_uint, const char **, const size_t *, cl_int *)) \
    F(cl_program, clCreateProgramWithBinary, (cl_context, cl_uint, const cl_device *, const size_t *, \
                                              const unsigned char **, cl_int *, cl_int *)) \
    F(cl_int, clBuildProgram, (cl_program, cl_uint, const cl_device *, const char *, cl_program_notify, void *)) \
    F(cl_int, clGetProgramInfo, (cl_program, cl_uint, size_t, void *, size_t *)) \
    F(cl_int, clGetProgramBuildInfo, (cl_program, cl_device, cl_uint, size_t, void *, size_t *)) \
    F(cl_int, clReleaseProgram, (cl_program)) \
    F(cl_kernel, clCreateKernel, (cl_program, const char *, cl_int *)) \
    F(cl_int, clSetKernelArg, (cl_kernel, cl_uint, size_t, const void *)) \
    F(cl_int, clGetKernelInfo, (cl_kernel, cl_uint, size_t, void *, size_t *)) \
    F(cl_int, clGetKernelWorkGroupInfo, (cl_kernel, cl_device, cl_uint, size_t, void *, size_t *)) \
    F(cl_int, clReleaseKernel, (cl_kernel)) \
    F(cl_int, clEnqueueNDRangeKernel, (cl_queue, cl_kernel, cl_uint, const size_t *, const size_t *, const size_t *, \
                                       cl_uint, const cl_event *, cl_event *)) \
    F(void *, clEnqueueMapBuffer, (cl_queue, cl_mem, cl_uint, cl_ulong, size_t, size_t, cl_uint, const cl_event *, \
                                   cl_event *, cl_int *)) \
    F(cl_int, clEnqueueUnmapMemObject, (cl_queue, cl_mem, void *, cl_uint, const cl_event *, cl_event *)) \
    F(cl_int, clFlush, (cl_queue)) \
    F(cl_int, clFinish, (cl_queue)) \
    F(cl_int, clGetEventProfilingInfo, (cl_event, cl_uint, size_t, void *, size_t *)) \
    F(cl_int, clReleaseEvent, (cl_event))

struct functions {
#define MEMBER(RESULT, NAME, PARAMETERS) RESULT(*NAME) PARAMETERS;
    FUNCTIONS(MEMBER)
#undef MEMBER
};

/* In the order of struct functions, each with its zero byte. */
#define NAME_OF(RESULT, NAME, PARAMETERS) #NAME "\0"
static const char function_names[] = FUNCTIONS(NAME_OF);
#undef NAME_OF

struct opencl {
    struct functions cl;
    const struct xct_plan *plan;
    void *library;
    char library_name[128];
    cl_platform platform;
    cl_device device;
    cl_context context;
    cl_queue queue;
    cl_mem arena, weights; /* weights is NULL for a plan that has none */
    cl_program program;
    cl_mem *slices;      /* one for each argument of the plan */
    cl_kernel *kernels;  /* one for each step, its arguments set */
    cl_event *events;    /* one for each step; NULL unless timed */
    uint64_t *step_ns;   /* NULL unless timed */
    uint8_t *output;     /* gathers the output: the caller's is not touched by a run that fails */
    char name[448];      /* of the device, its platform, its OpenCL and its driver */
    char options[MAX_VARIANTS][64]; /* for its compiler, of each variant of the kernels, the best first */
    int variants;
    bool substitutes;    /* float32 for float16: the plan stores halves, the device does not compute with them */
};

/* ---- errors ---- */

static const char *status_name(cl_int status)
{
    static const struct {
        cl_int status;
        char name[48];
    } names[] = {
        {CL_DEVICE_NOT_FOUND, "CL_DEVICE_NOT_FOUND"}, {-2, "CL_DEVICE_NOT_AVAILABLE"},
        {-3, "CL_COMPILER_NOT_AVAILABLE"}, {CL_MEM_OBJECT_ALLOCATION_FAILURE, "CL_MEM_OBJECT_ALLOCATION_FAILURE"},
        {CL_OUT_OF_RESOURCES, "CL_OUT_OF_RESOURCES"}, {CL_OUT_OF_HOST_MEMORY, "CL_OUT_OF_HOST_MEMORY"},
        {-7, "CL_PROFILING_INFO_NOT_AVAILABLE"}, {-11, "CL_BUILD_PROGRAM_FAILURE"}, {-12, "CL_MAP_FAILURE"},
        {-13, "CL_MISALIGNED_SUB_BUFFER_OFFSET"}, {-14, "CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST"},
        {-30, "CL_INVALID_VALUE"}, {-33, "CL_INVALID_DEVICE"}, {-34, "CL_INVALID_CONTEXT"},
        {-36, "CL_INVALID_COMMAND_QUEUE"}, {-38, "CL_INVALID_MEM_OBJECT"}, {-42, "CL_INVALID_BINARY"},
        {-43, "CL_INVALID_BUILD_OPTIONS"}, {-44, "CL_INVALID_PROGRAM"}, {-45, "CL_INVALID_PROGRAM_EXECUTABLE"},
        {-46, "CL_INVALID_KERNEL_NAME"}, {-48, "CL_INVALID_KERNEL"}, {-51, "CL_INVALID_ARG_SIZE"},
        {-52, "CL_INVALID_KERNEL_ARGS"}, {-54, "CL_INVALID_WORK_GROUP_SIZE"}, {-55, "CL_INVALID_WORK_ITEM_SIZE"},
        {-61, "CL_INVALID_BUFFER_SIZE"}, {-63, "CL_INVALID_GLOBAL_WORK_SIZE"},
        {CL_PLATFORM_NOT_FOUND_KHR, "CL_PLATFORM_NOT_FOUND_KHR"},
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (names[i].status == status)
            return names[i].name;
    return "an error without a name";
}

/* what: "cannot ..." */
static int failed(const struct opencl *gpu, cl_int status, const char *what, struct xct_error *error)
{
    bool memory = status == CL_MEM_OBJECT_ALLOCATION_FAILURE || status == CL_OUT_OF_HOST_MEMORY;
    const char *advice = status == CL_OUT_OF_RESOURCES
                             ? "; the device lacks memory, or it was reset: close this session and open another" : "";
    return xct_fail(error, memory ? XCT_ERROR_MEMORY : XCT_ERROR_DEVICE, "OpenCL on %s: cannot %s: %s (%d)%s",
                    gpu->name[0] != 0 ? gpu->name : gpu->library_name, what, status_name(status), (int)status, advice);
}

static int failed_step(const struct opencl *gpu, cl_int status, const char *what, uint32_t step, struct xct_error *error)
{
    char text[512];
    snprintf(text, sizeof text, "%s step %u (%.200s)", what, step, gpu->plan->strings + gpu->plan->steps[step].name);
    return failed(gpu, status, text, error);
}

/* ---- the library ---- */

typedef void *(*lookup_fn)(const char *name);

/* Google's Pixel phones have a library of another name, which hands its functions out itself once it was enabled. */
static lookup_fn pixel_lookup(void *library)
{
    void *enable = dlsym(library, "enableOpenCL"), *load = dlsym(library, "loadOpenCLPointer");
    void (*enable_function)(void) = NULL;
    lookup_fn lookup = NULL;
    if (enable == NULL || load == NULL)
        return NULL;
    memcpy(&enable_function, &enable, sizeof enable_function);
    memcpy(&lookup, &load, sizeof lookup);
    enable_function();
    return lookup;
}

/* The first function that the library lacks, or NULL. */
static const char *find_functions(struct functions *cl, void *library)
{
    lookup_fn lookup = pixel_lookup(library);
    unsigned char *slot = (unsigned char *)cl;
    for (const char *name = function_names; *name != 0; name += strlen(name) + 1) {
        void *symbol = lookup != NULL ? lookup(name) : dlsym(library, name);
        if (symbol == NULL)
            return name;
        memcpy(slot, &symbol, sizeof symbol);
        slot += sizeof symbol;
    }
    return NULL;
}

/* Whether the library of this name is there and is one of OpenCL 1.2; if it is there and is none, *missing names the
 * function that it lacks. RTLD_NODELETE: vendors' libraries have threads and handlers that outlive dlclose. */
static bool try_library(struct opencl *gpu, const char *name, const char **missing)
{
    gpu->library = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (gpu->library == NULL)
        return false;
    snprintf(gpu->library_name, sizeof gpu->library_name, "%s", name);
    *missing = find_functions(&gpu->cl, gpu->library);
    if (*missing == NULL)
        return true;
    dlclose(gpu->library);
    gpu->library = NULL;
    return false;
}

static int open_library(struct opencl *gpu, struct xct_error *error)
{
    static const char *const usual[] = {
#if defined(__ANDROID__)
        "libOpenCL.so", "libOpenCL-pixel.so", "libOpenCL-car.so", "/vendor/lib64/libOpenCL.so",
        "/system/vendor/lib64/libOpenCL.so", "/system/lib64/libOpenCL.so", "/vendor/lib64/egl/libGLES_mali.so",
        "/system/vendor/lib64/egl/libGLES_mali.so", "libGLES_mali.so", "/vendor/lib64/libPVROCL.so",
        "/system/vendor/lib64/libPVROCL.so", "libPVROCL.so",
#else
        "libOpenCL.so.1", "libOpenCL.so", "/usr/lib/aarch64-linux-gnu/libOpenCL.so.1", "/usr/lib64/libOpenCL.so.1",
        "libmali.so.1", "libmali.so", "/usr/lib/aarch64-linux-gnu/libmali.so.1",
#endif
    };
    const char *chosen = getenv("XCEPTILE_OPENCL"), *missing = NULL;
    bool found = false;
    if (chosen != NULL && chosen[0] != 0)
        found = try_library(gpu, chosen, &missing);
    else
        for (size_t i = 0; i < sizeof usual / sizeof usual[0] && !found; i++)
            found = try_library(gpu, usual[i], &missing);
    if (found)
        return XCT_OK;
    if (missing != NULL)
        return xct_fail(error, XCT_ERROR_DEVICE, "%s has no %s: it is no library of OpenCL 1.2", gpu->library_name,
                        missing);
    const char *why = dlerror();
    if (chosen != NULL && chosen[0] != 0)
        return xct_fail(error, XCT_ERROR_DEVICE, "cannot load the OpenCL library that XCEPTILE_OPENCL names: %s",
                        why != NULL ? why : chosen);
    return xct_fail(error, XCT_ERROR_DEVICE, "no OpenCL library here (libOpenCL.so in the usual places): install the "
                    "GPU's driver, or name its library with XCEPTILE_OPENCL");
}

/* ---- the device ---- */

/* A text that the device has of itself, from malloc; of: "its ...". */
static int device_text(const struct opencl *gpu, cl_uint what, const char *of, char **text, struct xct_error *error)
{
    char action[64];
    size_t size = 0;
    *text = NULL;
    snprintf(action, sizeof action, "learn %s", of);
    cl_int status = gpu->cl.clGetDeviceInfo(gpu->device, what, 0, NULL, &size);
    if (status != CL_SUCCESS || size > MAX_TEXT_BYTES)
        return failed(gpu, status, action, error);
    char *got = calloc(size + 1, 1);
    if (got == NULL)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory for what a device tells of itself");
    status = size > 0 ? gpu->cl.clGetDeviceInfo(gpu->device, what, size, got, NULL) : CL_SUCCESS;
    if (status == CL_SUCCESS)
        *text = got;
    else
        free(got);
    return status == CL_SUCCESS ? XCT_OK : failed(gpu, status, action, error);
}

/* A number, of 4 or 8 bytes as cl.h has it. */
static int device_number(const struct opencl *gpu, cl_uint what, const char *of, uint64_t *number,
                         struct xct_error *error)
{
    union {
        uint32_t word;
        uint64_t number;
    } value = {.number = 0};
    char action[64];
    size_t size = 0;
    snprintf(action, sizeof action, "learn %s", of);
    cl_int status = gpu->cl.clGetDeviceInfo(gpu->device, what, sizeof value, &value, &size);
    *number = size == sizeof value.word ? value.word : value.number;
    return status == CL_SUCCESS ? XCT_OK : failed(gpu, status, action, error);
}

static bool has_word(const char *words, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = strstr(words, word); at != NULL; at = strstr(at + 1, word))
        if ((at == words || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0))
            return true;
    return false;
}

/* Sets the device's name, "NAME (PLATFORM), DRIVER"; a name without a number is followed by the version, because an
 * Adreno tells its number there only. */
static int name_device(struct opencl *gpu, struct xct_error *error)
{
    char place[256] = {0}, *name = NULL, *version = NULL, *driver = NULL;
    cl_int status = gpu->cl.clGetPlatformInfo(gpu->platform, CL_PLATFORM_NAME, sizeof place - 1, place, NULL);
    if (status != CL_SUCCESS)
        return failed(gpu, status, "learn the platform's name", error);
    int code = device_text(gpu, CL_DEVICE_NAME, "a device's name", &name, error);
    if (code == XCT_OK)
        code = device_text(gpu, CL_DEVICE_VERSION, "a device's version", &version, error);
    if (code == XCT_OK)
        code = device_text(gpu, CL_DRIVER_VERSION, "a driver's version", &driver, error);
    if (code == XCT_OK && strpbrk(name, "0123456789") != NULL)
        version[0] = 0;
    if (code == XCT_OK)
        snprintf(gpu->name, sizeof gpu->name, "%.120s (%.60s)%s%.90s, %.90s", name, place, version[0] != 0 ? ", " : "",
                 version, driver);
    free(name);
    free(version);
    free(driver);
    for (char *letter = gpu->name; *letter != 0; letter++)
        if (*letter < 0x20 || *letter > 0x7e)
            *letter = '?';
    return code;
}

static int refuse(const struct opencl *gpu, struct xct_error *error, const char *why)
{
    return xct_fail(error, XCT_ERROR_UNSUPPORTED, "%s cannot run this bundle: %s", gpu->name, why);
}

static int check_features(const struct opencl *gpu, const char *extensions, struct xct_error *error)
{
    for (uint32_t i = 0; i < gpu->plan->header->feature_count; i++) {
        const char *name = gpu->plan->strings + gpu->plan->features[i];
        if (!has_word(extensions, name))
            return xct_fail(error, XCT_ERROR_UNSUPPORTED, "%s lacks the OpenCL extension %s, which the bundle was "
                            "compiled for", gpu->name, name);
    }
    return XCT_OK;
}

/* 12 is OpenCL 1.2. */
static int check_version(const struct opencl *gpu, int *version, struct xct_error *error)
{
    char *text = NULL;
    int major = 0, minor = 0;
    int code = device_text(gpu, CL_DEVICE_VERSION, "its version", &text, error);
    if (code != XCT_OK)
        return code;
    bool known = sscanf(text, "OpenCL %d.%d", &major, &minor) == 2;
    free(text);
    *version = known && major >= 0 && major < 100 && minor >= 0 && minor < 10 ? 10 * major + minor : 0;
    return *version >= 12 ? XCT_OK : refuse(gpu, error, "its OpenCL is older than 1.2");
}

/* The contract's requantization is one single-precision multiplication, correctly rounded (to nearest, ties to even):
 * every device of the full profile has it; one of the embedded profile may have rounding to zero only. */
static int check_abilities(const struct opencl *gpu, struct xct_error *error)
{
    static const struct {
        cl_uint what;
        uint64_t bits; /* of which one must be set */
        const char *of, *why_not;
    } needs[] = {
        {CL_DEVICE_AVAILABLE, UINT64_MAX, "its availability", "it is not available"},
        {CL_DEVICE_COMPILER_AVAILABLE, UINT64_MAX, "whether it has a compiler", "its driver has no compiler"},
        {CL_DEVICE_ENDIAN_LITTLE, UINT64_MAX, "its byte order", "it is big endian"},
        {CL_DEVICE_SINGLE_FP_CONFIG, CL_FP_ROUND_TO_NEAREST, "its float32",
         "it does not round float32 to nearest, so its results would not be the contract's"},
    };
    for (size_t i = 0; i < sizeof needs / sizeof needs[0]; i++) {
        uint64_t value = 0;
        int code = device_number(gpu, needs[i].what, needs[i].of, &value, error);
        if (code != XCT_OK)
            return code;
        if ((value & needs[i].bits) == 0)
            return refuse(gpu, error, needs[i].why_not);
    }
    return XCT_OK;
}

static int check_buffers(const struct opencl *gpu, struct xct_error *error)
{
    const struct xct_plan_header *header = gpu->plan->header;
    uint64_t alignment_bits = 0, largest = 0;
    int code = device_number(gpu, CL_DEVICE_MEM_BASE_ADDR_ALIGN, "its alignment", &alignment_bits, error);
    if (code == XCT_OK)
        code = device_number(gpu, CL_DEVICE_MAX_MEM_ALLOC_SIZE, "its largest buffer", &largest, error);
    if (code != XCT_OK)
        return code;
    if (alignment_bits > 8 * XCT_GPU_ALIGNMENT)
        return refuse(gpu, error, "its buffers must begin at larger multiples than the plan's 512 bytes");
    if (header->arena_bytes > largest || header->weights_bytes > largest)
        return xct_fail(error, XCT_ERROR_MEMORY, "%s has buffers of at most %llu bytes, the network needs %llu and %llu",
                        gpu->name, (unsigned long long)largest, (unsigned long long)header->arena_bytes,
                        (unsigned long long)header->weights_bytes);
    return XCT_OK;
}

/* The launches' sizes are within what the device has in each dimension. */
static int check_launches(const struct opencl *gpu, struct xct_error *error)
{
    size_t limits[3] = {0, 0, 0}, size = 0;
    /* A device may have more than three dimensions; those behind are not of interest, but must be asked for. */
    size_t all[16] = {0};
    cl_int status = gpu->cl.clGetDeviceInfo(gpu->device, CL_DEVICE_MAX_WORK_ITEM_SIZES, sizeof all, all, &size);
    if (status != CL_SUCCESS || size < sizeof limits)
        return failed(gpu, status, "learn the sizes of its work-groups", error);
    memcpy(limits, all, sizeof limits);
    for (uint32_t i = 0; i < gpu->plan->header->step_count; i++) {
        const struct xct_plan_launch *launch = &gpu->plan->launches[i];
        for (int k = 0; k < 3; k++)
            if (launch->group_size[k] > limits[k])
                return xct_fail(error, XCT_ERROR_UNSUPPORTED, "%s runs groups of %zu x %zu x %zu at most, step %u has %u x "
                                "%u x %u: compile the bundle for this device's target", gpu->name, limits[0], limits[1],
                                limits[2], i, launch->group_size[0], launch->group_size[1], launch->group_size[2]);
    }
    return XCT_OK;
}

static void add_variant(struct opencl *gpu, int dot, bool half, const char *standard)
{
    snprintf(gpu->options[gpu->variants++], sizeof gpu->options[0], "-DXCT_DOT=%d%s%s", dot, half ? " -DXCT_FP16=1" : "",
             standard);
}

/* -DXCT_DOT=n names the instruction for four int8 products and their sum: 1 Khronos's, 2 Arm's, 3 Qualcomm's extension,
 * 0 plain code. All give the same. A compiler may want a later standard than its default for them, or not have what
 * its device announces: then the next variant is tried, down to the plain one. */
static void choose_variants(struct opencl *gpu, int version, const char *extensions)
{
    static const struct {
        const char *extension, *standard;
        int dot, since;
    } known[] = {
        {"cl_khr_integer_dot_product", " -cl-std=CL3.0", 1, 30},
        {"cl_arm_integer_dot_product_accumulate_int8", "", 2, 0},
        {"cl_qcom_dot_product8", " -cl-std=CL2.0", 3, 20},
    };
    bool half = has_word(extensions, FP16);
    gpu->variants = 0;
    for (size_t i = 0; i < sizeof known / sizeof known[0] && gpu->variants == 0; i++) {
        if (!has_word(extensions, known[i].extension))
            continue;
        if (known[i].standard[0] != 0 && version >= known[i].since)
            add_variant(gpu, known[i].dot, half, known[i].standard);
        add_variant(gpu, known[i].dot, half, "");
    }
    add_variant(gpu, 0, half, "");
}

/* Whether its kernels are those of the float16 build: they store weights in half. */
static bool stores_half(const struct xct_plan *plan)
{
    for (uint32_t i = 0; i < plan->header->argument_count; i++)
        if (strcmp(xct_dtype_of(plan->arguments[i].dtype)->name, "float16") == 0)
            return true;
    return false;
}

/* Whether the device can run the plan, and what its compiler is to be told. */
static int check_device(struct opencl *gpu, struct xct_error *error)
{
    char *extensions = NULL;
    int version = 0;
    int code = check_version(gpu, &version, error);
    if (code == XCT_OK)
        code = check_abilities(gpu, error);
    if (code == XCT_OK)
        code = check_buffers(gpu, error);
    if (code == XCT_OK)
        code = check_launches(gpu, error);
    if (code == XCT_OK)
        code = device_text(gpu, CL_DEVICE_EXTENSIONS, "its extensions", &extensions, error);
    if (code == XCT_OK)
        code = check_features(gpu, extensions, error);
    if (code == XCT_OK) {
        choose_variants(gpu, version, extensions);
        gpu->substitutes = stores_half(gpu->plan) && !has_word(extensions, FP16);
    }
    free(extensions);
    return code;
}

/* ---- the program ---- */

/* All that a compiled program depends on. */
static int cache_key(const struct opencl *gpu, const struct xct_file *source, const char *options, uint8_t key[32],
                     struct xct_error *error)
{
    static const cl_uint texts[] = {CL_DEVICE_NAME, CL_DEVICE_VENDOR, CL_DEVICE_VERSION, CL_DRIVER_VERSION};
    struct xct_sha256 hash;
    xct_sha256_begin(&hash);
    xct_sha256_add(&hash, XCT_VERSION, sizeof XCT_VERSION);
    xct_sha256_add(&hash, options, strlen(options) + 1);
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        char *text = NULL;
        int code = device_text(gpu, texts[i], "its driver's version", &text, error);
        if (code != XCT_OK)
            return code;
        xct_sha256_add(&hash, text, strlen(text) + 1);
        free(text);
    }
    char platform[256] = {0};
    cl_int status = gpu->cl.clGetPlatformInfo(gpu->platform, CL_PLATFORM_VERSION, sizeof platform - 1, platform, NULL);
    if (status != CL_SUCCESS)
        return failed(gpu, status, "learn the platform's version", error);
    xct_sha256_add(&hash, platform, sizeof platform);
    xct_sha256_add(&hash, source->data, source->size);
    xct_sha256_end(&hash, key);
    return XCT_OK;
}

/* The compiler's log goes behind the message's first line. */
static int build_failed(const struct opencl *gpu, cl_int status, const char *options, struct xct_error *error)
{
    size_t size = 0;
    char *log = NULL;
    if (gpu->cl.clGetProgramBuildInfo(gpu->program, gpu->device, CL_PROGRAM_BUILD_LOG, 0, NULL, &size) == CL_SUCCESS
        && size > 0 && size <= MAX_TEXT_BYTES)
        log = calloc(size + 1, 1);
    if (log != NULL
        && gpu->cl.clGetProgramBuildInfo(gpu->program, gpu->device, CL_PROGRAM_BUILD_LOG, size, log, NULL) != CL_SUCCESS)
        log[0] = 0;
    if (log != NULL)
        for (size_t end = strlen(log); end > 0 && (log[end - 1] == '\n' || log[end - 1] == ' '); end--)
            log[end - 1] = 0;
    int code = xct_fail(error, status == CL_OUT_OF_HOST_MEMORY ? XCT_ERROR_MEMORY : XCT_ERROR_KERNEL,
                        "%s: its compiler refuses " KERNELS_FILE " with %s: %s (%d)%s%s", gpu->name, options,
                        status_name(status), (int)status, log != NULL && log[0] != 0 ? "\n" : "",
                        log != NULL ? log : "");
    free(log);
    return code;
}

static void release_program(struct opencl *gpu)
{
    for (uint32_t i = 0; i < gpu->plan->header->step_count; i++) {
        if (gpu->kernels[i] != NULL)
            (void)gpu->cl.clReleaseKernel(gpu->kernels[i]);
        gpu->kernels[i] = NULL;
    }
    if (gpu->program != NULL)
        (void)gpu->cl.clReleaseProgram(gpu->program);
    gpu->program = NULL;
}

static int build_source(struct opencl *gpu, const struct xct_file *source, const char *options, struct xct_error *error)
{
    cl_int status = CL_SUCCESS;
    const char *text = (const char *)source->data;
    gpu->program = gpu->cl.clCreateProgramWithSource(gpu->context, 1, &text, &source->size, &status);
    if (gpu->program == NULL)
        return failed(gpu, status, "create the program", error);
    status = gpu->cl.clBuildProgram(gpu->program, 1, &gpu->device, options, NULL, NULL);
    return status == CL_SUCCESS ? XCT_OK : build_failed(gpu, status, options, error);
}

static bool build_binary(struct opencl *gpu, const unsigned char *binary, size_t size, const char *options)
{
    cl_int status = CL_SUCCESS, verdict = CL_SUCCESS;
    gpu->program = gpu->cl.clCreateProgramWithBinary(gpu->context, 1, &gpu->device, &size, &binary, &verdict, &status);
    return gpu->program != NULL && verdict == CL_SUCCESS
           && gpu->cl.clBuildProgram(gpu->program, 1, &gpu->device, options, NULL, NULL) == CL_SUCCESS;
}

static void save_binary(const struct opencl *gpu, const uint8_t key[32])
{
    size_t size = 0;
    if (gpu->cl.clGetProgramInfo(gpu->program, CL_PROGRAM_BINARY_SIZES, sizeof size, &size, NULL) != CL_SUCCESS
        || size == 0 || size > SIZE_MAX / 2)
        return;
    unsigned char *binary = malloc(size);
    if (binary != NULL
        && gpu->cl.clGetProgramInfo(gpu->program, CL_PROGRAM_BINARIES, sizeof binary, &binary, NULL) == CL_SUCCESS)
        xct_cache_write(key, binary, size);
    free(binary);
}

static uint64_t group_size_of(const struct xct_plan_launch *launch)
{
    return (uint64_t)launch->group_size[0] * launch->group_size[1] * launch->group_size[2];
}

static int check_kernel(const struct opencl *gpu, uint32_t index, const char *name, struct xct_error *error)
{
    const struct xct_plan_step *step = &gpu->plan->steps[index];
    cl_kernel kernel = gpu->kernels[index];
    cl_uint parameters = 0;
    size_t group_size = 0;
    uint64_t local_bytes = 0, room = 0;
    cl_int status = gpu->cl.clGetKernelInfo(kernel, CL_KERNEL_NUM_ARGS, sizeof parameters, &parameters, NULL);
    if (status == CL_SUCCESS)
        status = gpu->cl.clGetKernelWorkGroupInfo(kernel, gpu->device, CL_KERNEL_WORK_GROUP_SIZE, sizeof group_size,
                                                  &group_size, NULL);
    if (status == CL_SUCCESS)
        status = gpu->cl.clGetKernelWorkGroupInfo(kernel, gpu->device, CL_KERNEL_LOCAL_MEM_SIZE, sizeof local_bytes,
                                                  &local_bytes, NULL);
    if (status != CL_SUCCESS)
        return failed_step(gpu, status, "examine the kernel of", index, error);
    if (parameters != step->argument_count)
        return xct_fail(error, XCT_ERROR_FORMAT, "the kernel %s has %u parameters, step %u of the plan gives it %u", name,
                        parameters, index, step->argument_count);
    if (group_size_of(&gpu->plan->launches[index]) > group_size)
        return xct_fail(error, XCT_ERROR_UNSUPPORTED, "%s runs the kernel %s in groups of %zu at most, the plan wants "
                        "%llu: compile the bundle for this device's target", gpu->name, name, group_size,
                        (unsigned long long)group_size_of(&gpu->plan->launches[index]));
    int code = device_number(gpu, CL_DEVICE_LOCAL_MEM_SIZE, "its local memory", &room, error);
    if (code != XCT_OK)
        return code;
    if (local_bytes > room)
        return xct_fail(error, XCT_ERROR_UNSUPPORTED, "%s has %llu bytes of local memory, the kernel %s needs %llu: "
                        "compile the bundle for this device's target", gpu->name, (unsigned long long)room, name,
                        (unsigned long long)local_bytes);
    return XCT_OK;
}

static int make_kernels(struct opencl *gpu, struct xct_error *error)
{
    const struct xct_plan *plan = gpu->plan;
    for (uint32_t i = 0; i < plan->header->step_count; i++) {
        const struct xct_plan_step *step = &plan->steps[i];
        const char *name = plan->strings + plan->kernels[step->kernel];
        cl_int status = CL_SUCCESS;
        gpu->kernels[i] = gpu->cl.clCreateKernel(gpu->program, name, &status);
        if (gpu->kernels[i] == NULL) {
            char what[300];
            snprintf(what, sizeof what, "find the kernel %s in " KERNELS_FILE, name);
            return failed(gpu, status, what, error);
        }
        int code = check_kernel(gpu, i, name, error);
        if (code != XCT_OK)
            return code;
        for (uint32_t k = 0; k < step->argument_count; k++) {
            status = gpu->cl.clSetKernelArg(gpu->kernels[i], k, sizeof(cl_mem), &gpu->slices[step->first_argument + k]);
            if (status != CL_SUCCESS)
                return failed_step(gpu, status, "set the arguments of", i, error);
        }
    }
    return XCT_OK;
}

static bool load_cached(struct opencl *gpu, const uint8_t key[32], const char *options)
{
    struct xct_error ignored = {0};
    size_t size = 0;
    void *binary = xct_cache_read(key, &size);
    bool loaded = binary != NULL && build_binary(gpu, binary, size, options) && make_kernels(gpu, &ignored) == XCT_OK;
    free(binary);
    if (!loaded)
        release_program(gpu);
    return loaded;
}

/* From the cache if it has a program that works, else compiled, and then kept: the first variant that can be. */
static int load_program(struct opencl *gpu, const struct xct_file *source, struct xct_error *error)
{
    uint8_t keys[MAX_VARIANTS][32];
    int code = XCT_OK;
    for (int i = 0; i < gpu->variants; i++) {
        code = cache_key(gpu, source, gpu->options[i], keys[i], error);
        if (code != XCT_OK)
            return code;
    }
    for (int i = 0; i < gpu->variants; i++)
        if (load_cached(gpu, keys[i], gpu->options[i]))
            return XCT_OK;
    for (int i = 0; i < gpu->variants; i++) {
        code = build_source(gpu, source, gpu->options[i], error);
        if (code == XCT_OK)
            code = make_kernels(gpu, error);
        if (code == XCT_OK) {
            save_binary(gpu, keys[i]);
            return XCT_OK;
        }
        if (i + 1 < gpu->variants)
            release_program(gpu);
    }
    return code;
}

/* ---- opening ---- */

static int open_queue(struct opencl *gpu, bool timed, struct xct_error *error)
{
    const intptr_t properties[] = {CL_CONTEXT_PLATFORM, (intptr_t)gpu->platform, 0};
    cl_int status = CL_SUCCESS;
    gpu->context = gpu->cl.clCreateContext(properties, 1, &gpu->device, NULL, NULL, &status);
    if (gpu->context == NULL)
        return failed(gpu, status, "create a context", error);
    gpu->queue = gpu->cl.clCreateCommandQueue(gpu->context, gpu->device, timed ? CL_QUEUE_PROFILING_ENABLE : 0, &status);
    return gpu->queue != NULL ? XCT_OK : failed(gpu, status, "create a command queue", error);
}

static int place_buffers(struct opencl *gpu, const uint8_t *weights, struct xct_error *error)
{
    const struct xct_plan_header *header = gpu->plan->header;
    cl_int status = CL_SUCCESS;
    /* Where the device shares the processor's memory, a mapping then copies nothing. OpenCL 2.0 no longer asks a device
     * to say so; one that does not is taken to have memory of its own. */
    struct xct_error ignored = {0};
    uint64_t unified = 0;
    if (device_number(gpu, CL_DEVICE_HOST_UNIFIED_MEMORY, "whether it shares memory", &unified, &ignored) != XCT_OK)
        unified = 0;
    gpu->arena = gpu->cl.clCreateBuffer(gpu->context, CL_MEM_READ_WRITE | (unified != 0 ? CL_MEM_ALLOC_HOST_PTR : 0),
                                        header->arena_bytes, NULL, &status);
    if (gpu->arena == NULL)
        return failed(gpu, status, "allocate the arena", error);
    if (header->weights_bytes > 0) {
        gpu->weights = gpu->cl.clCreateBuffer(gpu->context, CL_MEM_READ_ONLY | CL_MEM_COPY_HOST_PTR, header->weights_bytes,
                                              (void *)(uintptr_t)weights, &status);
        if (gpu->weights == NULL)
            return failed(gpu, status, "allocate the weights", error);
    }
    for (uint32_t i = 0; i < header->argument_count; i++) {
        const struct xct_plan_argument *argument = &gpu->plan->arguments[i];
        const struct cl_region region = {argument->offset, argument->count * xct_dtype_of(argument->dtype)->bytes};
        bool in_arena = argument->space == XCT_SPACE_ARENA;
        gpu->slices[i] = gpu->cl.clCreateSubBuffer(in_arena ? gpu->arena : gpu->weights,
                                                   in_arena ? CL_MEM_READ_WRITE : CL_MEM_READ_ONLY,
                                                   CL_BUFFER_CREATE_TYPE_REGION, &region, &status);
        if (gpu->slices[i] == NULL)
            return failed(gpu, status, "place a step's argument", error);
    }
    return XCT_OK;
}

static int allocate(struct opencl *gpu, bool timed, struct xct_error *error)
{
    const struct xct_plan_header *header = gpu->plan->header;
    gpu->slices = calloc(header->argument_count, sizeof *gpu->slices);
    gpu->kernels = calloc(header->step_count, sizeof *gpu->kernels);
    gpu->events = timed ? calloc(header->step_count, sizeof *gpu->events) : NULL;
    gpu->output = malloc(gpu->plan->output_bytes);
    if (gpu->slices == NULL || gpu->kernels == NULL || (timed && gpu->events == NULL) || gpu->output == NULL)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory for %u steps", header->step_count);
    return XCT_OK;
}

static void release_events(struct opencl *gpu)
{
    for (uint32_t i = 0; gpu->events != NULL && i < gpu->plan->header->step_count; i++) {
        if (gpu->events[i] != NULL)
            (void)gpu->cl.clReleaseEvent(gpu->events[i]);
        gpu->events[i] = NULL;
    }
}

/* All that was made on the device. */
static void leave_device(struct opencl *gpu)
{
    release_program(gpu);
    for (uint32_t i = 0; i < gpu->plan->header->argument_count; i++) {
        if (gpu->slices[i] != NULL)
            (void)gpu->cl.clReleaseMemObject(gpu->slices[i]);
        gpu->slices[i] = NULL;
    }
    if (gpu->arena != NULL)
        (void)gpu->cl.clReleaseMemObject(gpu->arena);
    if (gpu->weights != NULL)
        (void)gpu->cl.clReleaseMemObject(gpu->weights);
    if (gpu->queue != NULL)
        (void)gpu->cl.clReleaseCommandQueue(gpu->queue);
    if (gpu->context != NULL)
        (void)gpu->cl.clReleaseContext(gpu->context);
    gpu->arena = gpu->weights = NULL;
    gpu->queue = NULL;
    gpu->context = NULL;
}

static void opencl_close(void *state)
{
    struct opencl *gpu = state;
    if (gpu == NULL)
        return;
    if (gpu->queue != NULL)
        (void)gpu->cl.clFinish(gpu->queue);
    release_events(gpu);
    if (gpu->library != NULL) {
        leave_device(gpu);
        dlclose(gpu->library);
    }
    free(gpu->slices);
    free(gpu->kernels);
    free(gpu->events);
    free(gpu->output);
    free(gpu);
}

/* ---- which device ---- */

struct place {
    cl_platform platform;
    cl_device device;
};

/* Why the plan does not run: the first error of a device or a platform, and the lines of the others. */
struct reasons {
    uint32_t count, devices;
    struct xct_error first;
    char others[1024];
};

static void add_reason(struct reasons *why, const struct xct_error *error)
{
    size_t used = strlen(why->others);
    if (why->count++ == 0)
        why->first = *error;
    else
        snprintf(why->others + used, sizeof why->others - used, "; %.*s", (int)strcspn(error->message, "\n"),
                 error->message);
}

/* The others' lines go behind the first one's, before a compiler's log. */
static int none_serves(const struct reasons *why, struct xct_error *error)
{
    const char *message = why->first.message;
    int line = (int)strcspn(message, "\n");
    return xct_fail(error, why->first.code, "%.*s%s%s", line, message, why->others, message + line);
}

/* The devices of a type, of all platforms; a platform that cannot tell gives a reason. Returns how many. */
static uint32_t list_devices(const struct opencl *gpu, uint64_t type, struct place places[MAX_DEVICES],
                             struct reasons *why)
{
    cl_platform platforms[MAX_PLATFORMS];
    cl_device devices[MAX_DEVICES];
    cl_uint platform_count = 0, device_count = 0;
    uint32_t found = 0;
    struct xct_error error = {0};
    cl_int status = gpu->cl.clGetPlatformIDs(MAX_PLATFORMS, platforms, &platform_count);
    if (status != CL_SUCCESS && status != CL_PLATFORM_NOT_FOUND_KHR) {
        (void)failed(gpu, status, "list the platforms", &error);
        add_reason(why, &error);
        return 0;
    }
    for (cl_uint p = 0; status == CL_SUCCESS && p < platform_count && p < MAX_PLATFORMS; p++) {
        cl_int known = gpu->cl.clGetDeviceIDs(platforms[p], type, MAX_DEVICES, devices, &device_count);
        if (known != CL_SUCCESS && known != CL_DEVICE_NOT_FOUND) {
            (void)failed(gpu, known, "list a platform's devices", &error);
            add_reason(why, &error);
        }
        for (cl_uint d = 0; known == CL_SUCCESS && d < device_count && d < MAX_DEVICES && found < MAX_DEVICES; d++)
            places[found++] = (struct place){platforms[p], devices[d]};
    }
    return found;
}

static int open_on(struct opencl *gpu, const struct place *place, const struct xct_driver_config *config,
                   const struct xct_file *source, struct xct_error *error)
{
    gpu->platform = place->platform;
    gpu->device = place->device;
    int code = name_device(gpu, error);
    if (code == XCT_OK)
        code = check_device(gpu, error);
    if (code == XCT_OK)
        code = open_queue(gpu, config->step_ns != NULL, error);
    if (code == XCT_OK)
        code = place_buffers(gpu, config->weights, error);
    if (code == XCT_OK)
        code = load_program(gpu, source, error);
    if (code == XCT_OK && gpu->substitutes)
        snprintf(gpu->name + strlen(gpu->name), sizeof gpu->name - strlen(gpu->name),
                 ", float32 stands in for float16");
    return code;
}

/* On the first device of a type that can run the plan. */
static int open_first(struct opencl *gpu, uint64_t type, const struct xct_driver_config *config,
                      const struct xct_file *source, struct reasons *why)
{
    struct place places[MAX_DEVICES];
    why->devices = list_devices(gpu, type, places, why);
    for (uint32_t i = 0; i < why->devices; i++) {
        struct xct_error error = {0};
        if (open_on(gpu, &places[i], config, source, &error) == XCT_OK)
            return XCT_OK;
        leave_device(gpu);
        gpu->name[0] = 0;
        add_reason(why, &error);
    }
    return XCT_ERROR_DEVICE;
}

static int open_device(struct opencl *gpu, const struct xct_driver_config *config, const struct xct_file *source,
                       struct xct_error *error)
{
    struct reasons why = {0}, ignored = {0};
    struct place others[MAX_DEVICES];
    bool cpu = config->device == XCT_DEVICE_CPU, any = config->device == XCT_DEVICE_ANY;
    if (open_first(gpu, cpu ? CL_DEVICE_TYPE_CPU : CL_DEVICE_TYPE_GPU, config, source, &why) == XCT_OK)
        return XCT_OK;
    /* A processor stands in for a GPU that is not there, not for one that fails. */
    if (any && why.devices == 0 && open_first(gpu, CL_DEVICE_TYPE_CPU, config, source, &why) == XCT_OK)
        return XCT_OK;
    if (why.count > 0)
        return none_serves(&why, error);
    if (cpu || any)
        return xct_fail(error, XCT_ERROR_DEVICE, "%s has no %s here", gpu->library_name,
                        any ? "device" : "OpenCL device that is a processor");
    bool has_cpu = list_devices(gpu, CL_DEVICE_TYPE_CPU, others, &ignored) > 0;
    return xct_fail(error, XCT_ERROR_DEVICE, "%s has no GPU here%s", gpu->library_name,
                    has_cpu ? ", only a processor: --require-device cpu (XCT_DEVICE_CPU) rehearses on it" : "");
}

static int start(struct opencl *gpu, const struct xct_driver_config *config, struct xct_error *error)
{
    char path[XCT_MAX_PATH_BYTES];
    struct xct_file source = {0};
    int code = allocate(gpu, config->step_ns != NULL, error);
    if (code == XCT_OK)
        code = xct_path_join(path, config->directory, KERNELS_FILE, error);
    if (code == XCT_OK)
        code = xct_file_map(&source, path, error);
    if (code == XCT_OK && source.size == 0)
        code = xct_fail(error, XCT_ERROR_FORMAT, "%s is empty", path);
    if (code == XCT_OK)
        code = open_library(gpu, error);
    if (code == XCT_OK)
        code = open_device(gpu, config, &source, error);
    xct_file_unmap(&source);
    return code;
}

static int opencl_open(const struct xct_driver_config *config, void **state, struct xct_error *error)
{
    *state = NULL;
    struct opencl *gpu = calloc(1, sizeof *gpu);
    if (gpu == NULL)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory");
    gpu->plan = config->plan;
    gpu->step_ns = config->step_ns;
    int code = start(gpu, config, error);
    if (code != XCT_OK) {
        opencl_close(gpu);
        return code;
    }
    *state = gpu;
    return XCT_OK;
}

/* ---- running ---- */

/* Copies all tensors of a kind between the arena and data, through mappings: of memory that the device shares they
 * are the memory itself. */
static int copy_tensors(struct opencl *gpu, uint32_t kind, uint8_t *data, struct xct_error *error)
{
    bool is_input = kind == XCT_KIND_INPUT;
    for (uint32_t i = 0; i < gpu->plan->header->tensor_count; i++) {
        const struct xct_plan_tensor *tensor = &gpu->plan->tensors[i];
        if (tensor->kind != kind)
            continue;
        uint64_t bytes = xct_plan_tensor_bytes(tensor);
        cl_int status = CL_SUCCESS;
        void *mapped = gpu->cl.clEnqueueMapBuffer(gpu->queue, gpu->arena, 1,
                                                  is_input ? CL_MAP_WRITE_INVALIDATE_REGION : CL_MAP_READ, tensor->offset,
                                                  bytes, 0, NULL, NULL, &status);
        if (mapped == NULL)
            return failed(gpu, status, is_input ? "map the input" : "map the output, or run the steps before it", error);
        memcpy(is_input ? mapped : data, is_input ? data : mapped, bytes);
        status = gpu->cl.clEnqueueUnmapMemObject(gpu->queue, gpu->arena, mapped, 0, NULL, NULL);
        if (status != CL_SUCCESS)
            return failed(gpu, status, is_input ? "unmap the input" : "unmap the output", error);
        data += bytes;
    }
    return XCT_OK;
}

static int enqueue_steps(struct opencl *gpu, struct xct_error *error)
{
    for (uint32_t i = 0; i < gpu->plan->header->step_count; i++) {
        const struct xct_plan_launch *launch = &gpu->plan->launches[i];
        size_t global[3], local[3];
        for (int k = 0; k < 3; k++) {
            local[k] = launch->group_size[k];
            global[k] = (size_t)launch->groups[k] * launch->group_size[k];
        }
        cl_int status = gpu->cl.clEnqueueNDRangeKernel(gpu->queue, gpu->kernels[i], 3, NULL, global, local, 0, NULL,
                                                       gpu->events != NULL ? &gpu->events[i] : NULL);
        if (status == CL_SUCCESS && i % FLUSH_PERIOD == FLUSH_PERIOD - 1)
            status = gpu->cl.clFlush(gpu->queue);
        if (status != CL_SUCCESS)
            return failed_step(gpu, status, "start", i, error);
    }
    return XCT_OK;
}

static int read_times(struct opencl *gpu, struct xct_error *error)
{
    for (uint32_t i = 0; gpu->events != NULL && i < gpu->plan->header->step_count; i++) {
        cl_ulong begin = 0, end = 0;
        cl_int status = gpu->cl.clGetEventProfilingInfo(gpu->events[i], CL_PROFILING_COMMAND_START, sizeof begin, &begin,
                                                        NULL);
        if (status == CL_SUCCESS)
            status = gpu->cl.clGetEventProfilingInfo(gpu->events[i], CL_PROFILING_COMMAND_END, sizeof end, &end, NULL);
        if (status != CL_SUCCESS)
            return failed_step(gpu, status, "learn the time of", i, error);
        gpu->step_ns[i] = end > begin ? end - begin : 0;
    }
    return XCT_OK;
}

static int opencl_run(void *state, const void *input, void *output, struct xct_error *error)
{
    struct opencl *gpu = state;
    int code = copy_tensors(gpu, XCT_KIND_INPUT, (uint8_t *)(uintptr_t)input, error);
    if (code == XCT_OK)
        code = enqueue_steps(gpu, error);
    if (code == XCT_OK)
        code = copy_tensors(gpu, XCT_KIND_OUTPUT, gpu->output, error);
    /* Also after a failure: what is under way must not meet the next run. */
    cl_int status = gpu->cl.clFinish(gpu->queue);
    if (code == XCT_OK && status != CL_SUCCESS)
        code = failed(gpu, status, "finish the run", error);
    if (code == XCT_OK)
        code = read_times(gpu, error);
    release_events(gpu);
    if (code == XCT_OK)
        memcpy(output, gpu->output, gpu->plan->output_bytes);
    return code;
}

static uint32_t opencl_threads(const void *state)
{
    (void)state;
    return 1; /* of this processor, to hand out the work */
}

static const char *opencl_device(const void *state)
{
    return ((const struct opencl *)state)->name;
}

const struct xct_driver xct_opencl_driver = {
    .engine = XCT_ENGINE_OPENCL,
    .kernel_files = {KERNELS_FILE},
    .open = opencl_open,
    .run = opencl_run,
    .threads = opencl_threads,
    .device = opencl_device,
    .close = opencl_close,
};
