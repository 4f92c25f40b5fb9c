/* libFuzzer's target: the bytes of a plan.bin, parsed, then opened and run as a session.
 *
 * Length and hash are made right first, as an attacker can make them, so that the fuzzer gets past them. Nothing that
 * the input names is loaded: the runtime's calls of dlopen and its friends come here (-Ddlopen=fuzz_dlopen, ...), and every
 * kernel is the one below, which touches the first and the last byte of each operand. A plan for CUDA runs on
 * fake_cuda.c, which is linked into this program. Files lie in a folder of this process alone. */
#define _GNU_SOURCE
#include <dlfcn.h> /* declares them */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

#undef dlsym
void *dlsym(void *library, const char *name);

#define MAX_WEIGHTS_BYTES (1u << 20)
#define MAX_ARENA_BYTES (1u << 24) /* on the GPU that is none: all of it is allocated and zero */
#define MAX_TENSORS_BYTES (1u << 20)

struct tensor { /* DLTensor */
    uint8_t *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct any { /* TVMFFIAny */
    int32_t type_index;
    uint32_t zero_padding;
    union {
        int64_t integer;
        struct tensor *tensor;
    } value;
};

static char folder[64], plan_path[128], weights_path[128], kernels_path[128], ptx_path[128];
static char cuda[] = "libcuda";
static volatile uint8_t sink;

static void demand(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "fuzz_plan: %s\n", what);
    abort();
}

/* ---- in the place of the kernel library ---- */

static int kernel(void *self, const struct any *arguments, int32_t count, struct any *result)
{
    (void)self, (void)result;
    demand(count >= 3 && count <= XCT_MAX_ARGUMENTS + 2, "the number of arguments");
    for (int32_t i = 0; i < count - 2; i++) {
        const struct tensor *tensor = arguments[i].value.tensor;
        uint64_t bytes = (uint64_t)tensor->shape[0] * tensor->bits / 8;
        demand(bytes > 0 && (uintptr_t)tensor->data % XCT_ALIGNMENT == 0, "an empty or misaligned operand");
        sink = tensor->data[0];
        sink = tensor->data[bytes - 1];
    }
    int64_t begin = arguments[count - 2].value.integer, end = arguments[count - 1].value.integer;
    demand(begin >= 0 && begin < end && end <= (int64_t)XCT_MAX_TASKS, "the range of tasks");
    return 0;
}

void *fuzz_dlopen(const char *path, int mode)
{
    (void)mode;
    if (strcmp(path, "libcuda.so.1") == 0)
        return cuda;
    size_t length = strlen(path), tail = strlen("kernels.so");
    return length >= tail && strcmp(path + length - tail, "kernels.so") == 0 ? folder : NULL;
}

void *fuzz_dlsym(void *library, const char *name)
{
    if (library == cuda)
        return dlsym(NULL, name); /* of this program */
    demand(library == folder, "a library that was not opened");
    int (*function)(void *, const struct any *, int32_t, struct any *) = kernel;
    void *symbol = NULL;
    if (strncmp(name, "__tvm_ffi_", 10) == 0)
        memcpy(&symbol, &function, sizeof symbol);
    return symbol;
}

int fuzz_dlclose(void *library)
{
    demand(library == folder || library == cuda, "a library that was not opened");
    return 0;
}

char *fuzz_dlerror(void)
{
    static char none[] = "no such library";
    return none;
}

/* ---- the target ---- */

static void remove_folder(void)
{
    unlink(plan_path);
    unlink(weights_path);
    unlink(kernels_path);
    unlink(ptx_path);
    rmdir(folder);
}

int LLVMFuzzerInitialize(int *count, char ***words);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *count, char ***words)
{
    (void)count, (void)words;
    snprintf(folder, sizeof folder, "%s/fuzz_plan.XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    demand(mkdtemp(folder) != NULL, "no folder to work in");
    snprintf(plan_path, sizeof plan_path, "%s/plan.bin", folder);
    snprintf(weights_path, sizeof weights_path, "%s/weights.bin", folder);
    snprintf(kernels_path, sizeof kernels_path, "%s/kernels.so", folder);
    snprintf(ptx_path, sizeof ptx_path, "%s/kernels.ptx", folder);
    demand(symlink("/proc/self/exe", kernels_path) == 0, "no kernels"); /* of the right architecture */
    atexit(remove_folder);
    return 0;
}

/* The input with right length and hash, from malloc. */
static uint8_t *sealed(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size > 0 ? size : 1);
    demand(copy != NULL, "no memory");
    memcpy(copy, data, size);
    if (size >= sizeof(struct xct_plan_header)) {
        size_t from = offsetof(struct xct_plan_header, file_bytes);
        uint64_t bytes = size;
        memcpy(copy + from, &bytes, sizeof bytes);
        xct_sha256(copy + from, size - from, copy + offsetof(struct xct_plan_header, plan_sha256));
    }
    return copy;
}

static void write_file(const char *path, const void *data, size_t size, uint64_t length)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    demand(file >= 0 && write(file, data, size) == (ssize_t)size && ftruncate(file, (off_t)length) == 0, "no file");
    close(file);
}

/* The arena is mapped in whole pages, so that a stray access just behind it goes unseen: the bounds once more, in
 * arithmetic that cannot overflow. */
static void check_bounds(const struct xct_plan *plan)
{
    const struct xct_plan_header *header = plan->header;
    for (uint32_t i = 0; i < header->argument_count; i++) {
        const struct xct_plan_argument *argument = &plan->arguments[i];
        unsigned __int128 end = (unsigned __int128)argument->count * xct_dtype_of(argument->dtype)->bytes + argument->offset;
        demand(end <= (argument->space == XCT_SPACE_ARENA ? header->arena_bytes : header->weights_bytes),
               "an operand outside its space was accepted");
    }
    unsigned __int128 total = 0;
    for (uint32_t i = 0; i < header->tensor_count; i++) {
        unsigned __int128 bytes = xct_plan_tensor_bytes(&plan->tensors[i]);
        demand(bytes + plan->tensors[i].offset <= header->arena_bytes, "a tensor outside the arena was accepted");
        total += bytes;
    }
    demand(total == (unsigned __int128)plan->input_bytes + plan->output_bytes, "the sizes of inputs and outputs");
}

/* What fake_cuda.c takes for a module: each kernel's name and the least number of arguments that it is called with. */
static void write_ptx(const struct xct_plan *plan)
{
    FILE *file = fopen(ptx_path, "w");
    demand(file != NULL && fputs("ptx\n", file) >= 0, "no file");
    for (uint32_t k = 0; k < plan->header->kernel_count; k++) {
        uint32_t least = XCT_MAX_ARGUMENTS;
        for (uint32_t i = 0; i < plan->header->step_count; i++)
            if (plan->steps[i].kernel == k && plan->steps[i].argument_count < least)
                least = plan->steps[i].argument_count;
        fprintf(file, "%s %u\n", plan->strings + plan->kernels[k], least);
    }
    fclose(file);
}

static void use(xct_session *session)
{
    for (uint32_t i = 0; i < xct_tensor_count(session); i++) {
        xct_tensor_info info;
        demand(xct_tensor(session, i, &info) == XCT_OK && strlen(info.name) > 0 && info.size_bytes > 0, "a tensor");
    }
    for (uint32_t i = 0; i < xct_step_count(session); i++) {
        xct_step_info info;
        demand(xct_step(session, i, &info) == XCT_OK && strlen(info.kernel) > 0, "a step");
        sink = (uint8_t)strlen(info.path);
    }
    uint64_t input_bytes = xct_input_bytes(session), output_bytes = xct_output_bytes(session);
    if (input_bytes > MAX_TENSORS_BYTES || output_bytes > MAX_TENSORS_BYTES)
        return;
    void *input = calloc(1, input_bytes), *output = malloc(output_bytes);
    demand(input != NULL && output != NULL, "no memory");
    demand(xct_run(session, input, input_bytes, output, output_bytes) == XCT_OK, "a run that failed");
    free(input);
    free(output);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct xct_plan plan;
    struct xct_error error = {0};
    int code = xct_plan_parse(&plan, sealed(data, size), size, &error);
    demand(code == XCT_OK || error.message[0] != 0, "a refusal without a reason");
    if (code == XCT_OK)
        check_bounds(&plan);
    bool small = code == XCT_OK && plan.header->weights_bytes <= MAX_WEIGHTS_BYTES;
    uint64_t weights_bytes = code == XCT_OK ? plan.header->weights_bytes : 0;
    bool cpu = code == XCT_OK && plan.header->engine == XCT_ENGINE_CPU;
    if (code == XCT_OK && plan.header->engine == XCT_ENGINE_CUDA) {
        small = small && plan.header->arena_bytes <= MAX_ARENA_BYTES;
        write_ptx(&plan);
    }
    uint64_t arena_bytes = code == XCT_OK ? plan.header->arena_bytes : 0;
    xct_plan_free(&plan);
    if (!small)
        return 0;
    uint8_t *copy = sealed(data, size);
    write_file(plan_path, copy, size, size);
    write_file(weights_path, "", 0, weights_bytes);
    free(copy);
    const xct_options options = {.struct_bytes = sizeof options, .threads = 1 + (size & 1), .flags = XCT_SKIP_HASHES};
    xct_session *session = NULL;
    code = xct_open(folder, &options, &session);
    demand(session != NULL, "no session");
    char message[512];
    xct_last_error(session, message, sizeof message);
    demand(code == XCT_OK || message[0] != 0, "a refusal without a reason");
    if (code == XCT_OK)
        use(session);
    else /* what the parser accepts, the CPU can run, if it has the memory and the features */
        demand(!cpu || strstr(message, "feature") != NULL || strstr(message, "lacks") != NULL || arena_bytes > 1u << 30,
               message);
    xct_close(session);
    return 0;
}
