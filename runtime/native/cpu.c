/* The driver for processors: kernels are functions of a shared library that TVM compiled, called through its ABI
 * (tvm_ffi's c_api.h and DLPack's dlpack.h, of which the few types needed are declared here). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "internal.h"

#define KERNELS_FILE "kernels.so"

/* ---- the ABI of the kernels ---- */

enum { TYPE_INT = 1, TYPE_TENSOR = 7 }; /* kTVMFFIInt, kTVMFFIDLTensorPtr */
enum { DEVICE_CPU = 1 };                /* kDLCPU */

struct tensor { /* DLTensor */
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t dtype_code;
    uint8_t dtype_bits;
    uint16_t dtype_lanes;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
};

struct any { /* TVMFFIAny */
    int32_t type_index;
    uint32_t zero_padding;
    union {
        int64_t integer;
        void *pointer;
        uint64_t bits;
    } value;
};

typedef int (*kernel_fn)(void *self, const struct any *arguments, int32_t count, struct any *result);
typedef size_t (*kernel_error_fn)(char *text, size_t size); /* kernel_stub.c */

_Static_assert(sizeof(void *) == 8, "kernels are made for 64-bit processors");
_Static_assert(sizeof(struct tensor) == 48, "as DLTensor");
_Static_assert(offsetof(struct tensor, shape) == 24, "as DLTensor");
_Static_assert(sizeof(struct any) == 16, "as TVMFFIAny");
_Static_assert(offsetof(struct any, value) == 8, "as TVMFFIAny");

struct operand {
    struct tensor tensor;
    int64_t shape;
    int64_t stride;
};

struct cpu {
    const struct xct_plan *plan;
    void *library;
    kernel_fn *kernels;        /* of every step */
    kernel_error_fn take_error; /* NULL if the library does not have it */
    struct operand *operands;  /* one for each argument of the plan */
    uint32_t *tasks;           /* of every step */
    uint8_t *arena;
    struct xct_pool *pool;
};

/* ---- what the processor can do ---- */

enum { MACHINE_RISCV = 243 }; /* EM_RISCV, which older C libraries do not name */

#if defined(__x86_64__)
#define ARCHITECTURE "x86_64"
#define ELF_MACHINE EM_X86_64

static uint64_t enabled_states(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* 1: the processor and the system have it; 0: they do not; -1: not a feature known here. "avx2" is all of x86-64-v3
 * and "avx512vnni" all of Cascade Lake's AVX-512, because compilers use either set as a whole. */
static int has_feature(const char *name)
{
    uint32_t a, b1 = 0, c1 = 0, d, b7 = 0, c7 = 0, c81 = 0, unused;
    uint64_t states = 0;
    if (__get_cpuid(1, &a, &b1, &c1, &d) && (c1 & bit_OSXSAVE) != 0)
        states = enabled_states();
    (void)__get_cpuid_count(7, 0, &a, &b7, &c7, &d);
    (void)__get_cpuid(0x80000001, &a, &unused, &c81, &d);
    const uint32_t v3_c1 = bit_AVX | bit_FMA | bit_MOVBE | bit_F16C, v3_b7 = bit_AVX2 | bit_BMI | bit_BMI2;
    const uint32_t vnni_b7 = bit_AVX512F | bit_AVX512CD | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    bool v3 = (c1 & v3_c1) == v3_c1 && (b7 & v3_b7) == v3_b7 && (c81 & bit_LZCNT) != 0 && (states & 0x06) == 0x06;
    if (strcmp(name, "avx2") == 0)
        return v3;
    if (strcmp(name, "avx512vnni") == 0)
        return v3 && (b7 & vnni_b7) == vnni_b7 && (c7 & bit_AVX512VNNI) != 0 && (states & 0xe6) == 0xe6;
    return -1;
}

#elif defined(__aarch64__)
#define ARCHITECTURE "aarch64"
#define ELF_MACHINE EM_AARCH64

/* The bits are Linux's, arch/arm64/include/uapi/asm/hwcap.h; old C libraries do not name them. */
static int has_feature(const char *name)
{
    if (strcmp(name, "neon") == 0)
        return (getauxval(AT_HWCAP) >> 1 & 1) != 0; /* ASIMD */
    if (strcmp(name, "dotprod") == 0)
        return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* ASIMDDP */
    if (strcmp(name, "i8mm") == 0)
        return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; /* I8MM */
    return -1;
}

#elif defined(__riscv) && __riscv_xlen == 64
#define ARCHITECTURE "riscv64"
#define ELF_MACHINE MACHINE_RISCV

/* Portable kernels need nothing that this program does not need itself. */
static int has_feature(const char *name)
{
    (void)name;
    return -1;
}

#else
#error "the runtime knows x86-64, AArch64 and 64-bit RISC-V"
#endif

static const char *machine_name(unsigned machine)
{
    return machine == EM_X86_64 ? "x86_64" : machine == EM_AARCH64 ? "aarch64" : machine == MACHINE_RISCV ? "riscv64"
        : "another processor";
}

static int check_features(const struct xct_plan *plan, struct xct_error *error)
{
    for (uint32_t i = 0; i < plan->header->feature_count; i++) {
        const char *name = plan->strings + plan->features[i];
        int has = has_feature(name);
        if (has < 0)
            return xct_fail(error, XCT_ERROR_UNSUPPORTED, "the bundle needs the processor feature \"%s\", which is none "
                            "of " ARCHITECTURE ": it was built for another architecture or for a newer runtime", name);
        if (has == 0)
            return xct_fail(error, XCT_ERROR_UNSUPPORTED, "this processor lacks \"%s\", which the bundle was built for: "
                            "compile it for this machine's target", name);
    }
    return XCT_OK;
}

/* ---- the kernel library ---- */

static int check_architecture(const char *path, struct xct_error *error)
{
    struct xct_file file;
    int code = xct_file_map(&file, path, error);
    if (code != XCT_OK)
        return code;
    Elf64_Ehdr header;
    if (file.size < sizeof header || memcmp(file.data, ELFMAG, SELFMAG) != 0)
        code = xct_fail(error, XCT_ERROR_FORMAT, "%s is no shared library", path);
    else {
        memcpy(&header, file.data, sizeof header);
        if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB
            || header.e_machine != ELF_MACHINE)
            code = xct_fail(error, XCT_ERROR_UNSUPPORTED, "%s holds code for %s (ELF machine %u), this runtime is for "
                            ARCHITECTURE, path, machine_name(header.e_machine), header.e_machine);
    }
    xct_file_unmap(&file);
    return code;
}

/* ISO C has no conversion from an object pointer to a function pointer; POSIX gives dlsym this one. */
static kernel_fn as_kernel(void *symbol)
{
    kernel_fn function;
    memcpy(&function, &symbol, sizeof function);
    return function;
}

static void *alloc_workspace(int device_type, int device_id, uint64_t bytes, int code_hint, int bits_hint)
{
    (void)device_type, (void)device_id, (void)code_hint, (void)bits_hint;
    void *memory = NULL;
    return bytes <= XCT_MAX_BYTES && posix_memalign(&memory, XCT_ALIGNMENT, bytes > 0 ? bytes : 1) == 0 ? memory : NULL;
}

static int free_workspace(int device_type, int device_id, void *memory)
{
    (void)device_type, (void)device_id;
    free(memory);
    return 0;
}

/* A kernel does its range of tasks on the thread that called it; one that wants threads of its own fails. */
static int no_parallel_launch(int (*function)(int, void *, void *), void *data, int tasks)
{
    (void)function, (void)data, (void)tasks;
    return -1;
}

/* The library has variables for the functions that it expects of its runtime. Sessions that share the library store
 * the same value. */
static void give_function(void *library, const char *variable, void *function)
{
    void **slot = dlsym(library, variable);
    if (slot != NULL)
        __atomic_store_n(slot, function, __ATOMIC_RELAXED);
}

/* The path of the kernels, spelled as no other file's can be: each bit of the file's device and number is a "./" or a "/"
 * in it. glibc takes a library that it loaded from a path for the one that is there now, though another bundle was put
 * in its place since, or the path is relative and the process has moved. */
static int spell_path(char spelled[XCT_MAX_PATH_BYTES], const char *directory, const char *path, struct xct_error *error)
{
    char name[2 * 128 + sizeof KERNELS_FILE], *end = name;
    struct stat status;
    if (stat(path, &status) != 0)
        return xct_fail(error, XCT_ERROR_FILE, "cannot examine %s: %s", path, strerror(errno));
    const uint64_t numbers[2] = {status.st_dev, status.st_ino};
    for (int i = 0; i < 128; i++) {
        if ((numbers[i / 64] >> i % 64 & 1) != 0)
            *end++ = '.';
        *end++ = '/';
    }
    memcpy(end, KERNELS_FILE, sizeof KERNELS_FILE);
    return xct_path_join(spelled, directory, name, error);
}

static int load_kernels(struct cpu *cpu, const char *directory, const char *path, struct xct_error *error)
{
    char spelled[XCT_MAX_PATH_BYTES];
    void *loaded = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (loaded != NULL) {
        dlclose(loaded);
        int code = spell_path(spelled, directory, path, error);
        if (code != XCT_OK)
            return code;
    }
    cpu->library = dlopen(loaded != NULL ? spelled : path, RTLD_NOW | RTLD_LOCAL);
    if (cpu->library == NULL) {
        const char *why = dlerror();
        return xct_fail(error, XCT_ERROR_KERNEL, "cannot load the kernels: %s", why != NULL ? why : path);
    }
    void *(*alloc)(int, int, uint64_t, int, int) = alloc_workspace;
    int (*release)(int, int, void *) = free_workspace;
    int (*launch)(int (*)(int, void *, void *), void *, int) = no_parallel_launch;
    void *functions[3];
    memcpy(&functions[0], &alloc, sizeof alloc);
    memcpy(&functions[1], &release, sizeof release);
    memcpy(&functions[2], &launch, sizeof launch);
    give_function(cpu->library, "__TVMBackendAllocWorkspace", functions[0]);
    give_function(cpu->library, "__TVMBackendFreeWorkspace", functions[1]);
    give_function(cpu->library, "__TVMBackendParallelLaunch", functions[2]);
    void *take_error = dlsym(cpu->library, "xct_take_kernel_error");
    memcpy(&cpu->take_error, &take_error, sizeof cpu->take_error);
    const struct xct_plan *plan = cpu->plan;
    for (uint32_t i = 0; i < plan->header->step_count; i++) {
        const char *name = plan->strings + plan->kernels[plan->steps[i].kernel];
        char symbol[256];
        int length = snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", name);
        if (length < 0 || (size_t)length >= sizeof symbol)
            return xct_fail(error, XCT_ERROR_FORMAT, "the kernel name %s is too long", name);
        cpu->kernels[i] = as_kernel(dlsym(cpu->library, symbol));
        if (cpu->kernels[i] == NULL)
            return xct_fail(error, XCT_ERROR_KERNEL, "%s has no kernel %s", path, symbol);
    }
    return XCT_OK;
}

/* ---- the driver ---- */

static int run_tasks(void *context, uint32_t index, uint32_t begin, uint32_t end, struct xct_error *error)
{
    const struct cpu *cpu = context;
    const struct xct_plan_step *step = &cpu->plan->steps[index];
    struct any arguments[XCT_MAX_ARGUMENTS + 2];
    memset(arguments, 0, sizeof arguments);
    uint32_t count = step->argument_count;
    for (uint32_t i = 0; i < count; i++) {
        arguments[i].type_index = TYPE_TENSOR;
        arguments[i].value.pointer = &cpu->operands[step->first_argument + i].tensor;
    }
    arguments[count].type_index = arguments[count + 1].type_index = TYPE_INT;
    arguments[count].value.integer = begin;
    arguments[count + 1].value.integer = end;
    struct any result = {0};
    if (cpu->kernels[index](NULL, arguments, (int32_t)count + 2, &result) == 0)
        return XCT_OK;
    char reason[256];
    if (cpu->take_error == NULL || cpu->take_error(reason, sizeof reason) == 0)
        snprintf(reason, sizeof reason, "the kernel gives no reason");
    return xct_fail(error, XCT_ERROR_KERNEL, "step %u (%s) failed: %s", index, cpu->plan->strings + step->name, reason);
}

static void set_operand(struct operand *operand, const struct xct_plan_argument *argument, uint8_t *base)
{
    const struct xct_dtype *dtype = xct_dtype_of(argument->dtype);
    operand->shape = (int64_t)argument->count;
    operand->stride = 1;
    operand->tensor = (struct tensor){
        .data = base + argument->offset, .device_type = DEVICE_CPU, .ndim = 1, .dtype_code = dtype->dl_code,
        .dtype_bits = (uint8_t)(8 * dtype->bytes), .dtype_lanes = 1, .shape = &operand->shape,
        .strides = &operand->stride,
    };
}

static int allocate(struct cpu *cpu, const uint8_t *weights, struct xct_error *error)
{
    const struct xct_plan *plan = cpu->plan;
    const struct xct_plan_header *header = plan->header;
    cpu->kernels = calloc(header->step_count, sizeof *cpu->kernels);
    cpu->tasks = calloc(header->step_count, sizeof *cpu->tasks);
    cpu->operands = calloc(header->argument_count, sizeof *cpu->operands);
    if (cpu->kernels == NULL || cpu->tasks == NULL || cpu->operands == NULL)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory for %u steps", header->step_count);
    void *arena = mmap(NULL, header->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory for an arena of %llu bytes",
                        (unsigned long long)header->arena_bytes);
    cpu->arena = arena;
    for (uint32_t i = 0; i < header->step_count; i++)
        cpu->tasks[i] = plan->steps[i].tasks;
    for (uint32_t i = 0; i < header->argument_count; i++) {
        const struct xct_plan_argument *argument = &plan->arguments[i];
        /* DLTensor has no const; the mapping of the weights is read-only. */
        uint8_t *base = argument->space == XCT_SPACE_ARENA ? cpu->arena : (uint8_t *)(uintptr_t)weights;
        set_operand(&cpu->operands[i], argument, base);
    }
    return XCT_OK;
}

static void cpu_close(void *state)
{
    struct cpu *cpu = state;
    if (cpu == NULL)
        return;
    xct_pool_close(cpu->pool);
    if (cpu->arena != NULL)
        munmap(cpu->arena, cpu->plan->header->arena_bytes);
    if (cpu->library != NULL)
        dlclose(cpu->library);
    free(cpu->operands);
    free(cpu->tasks);
    free(cpu->kernels);
    free(cpu);
}

static int cpu_open(const struct xct_driver_config *config, void **state, struct xct_error *error)
{
    char path[XCT_MAX_PATH_BYTES];
    *state = NULL;
    int code = xct_path_join(path, config->directory, KERNELS_FILE, error);
    if (code != XCT_OK)
        return code;
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu == NULL)
        return xct_fail(error, XCT_ERROR_MEMORY, "no memory");
    cpu->plan = config->plan;
    code = check_architecture(path, error);
    if (code == XCT_OK)
        code = check_features(cpu->plan, error);
    if (code == XCT_OK)
        code = allocate(cpu, config->weights, error);
    if (code == XCT_OK)
        code = load_kernels(cpu, config->directory, path, error);
    if (code == XCT_OK)
        code = xct_pool_open(&cpu->pool, config->threads, config->core_mask, cpu->plan->header->step_count, cpu->tasks,
                             run_tasks, cpu, config->step_ns, error);
    if (code != XCT_OK) {
        cpu_close(cpu);
        return code;
    }
    *state = cpu;
    return XCT_OK;
}

/* Copies between the arena and the caller's buffer, tensor after tensor. */
static void copy_tensors(const struct cpu *cpu, uint32_t kind, const uint8_t *input, uint8_t *output)
{
    for (uint32_t i = 0; i < cpu->plan->header->tensor_count; i++) {
        const struct xct_plan_tensor *tensor = &cpu->plan->tensors[i];
        if (tensor->kind != kind)
            continue;
        uint64_t bytes = xct_plan_tensor_bytes(tensor);
        if (kind == XCT_KIND_INPUT) {
            memcpy(cpu->arena + tensor->offset, input, bytes);
            input += bytes;
        } else {
            memcpy(output, cpu->arena + tensor->offset, bytes);
            output += bytes;
        }
    }
}

static int cpu_run(void *state, const void *input, void *output, struct xct_error *error)
{
    struct cpu *cpu = state;
    copy_tensors(cpu, XCT_KIND_INPUT, input, NULL);
    int code = xct_pool_run(cpu->pool, error);
    if (code == XCT_OK)
        copy_tensors(cpu, XCT_KIND_OUTPUT, NULL, output);
    return code;
}

static uint32_t cpu_threads(const void *state)
{
    return xct_pool_threads(((const struct cpu *)state)->pool);
}

static const char *cpu_device(const void *state)
{
    (void)state;
    return "cpu";
}

const struct xct_driver xct_cpu_driver = {
    .engine = XCT_ENGINE_CPU,
    .kernel_files = {KERNELS_FILE},
    .open = cpu_open,
    .run = cpu_run,
    .threads = cpu_threads,
    .device = cpu_device,
    .close = cpu_close,
};
