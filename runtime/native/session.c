/* A session: one bundle, opened. The public calls of xceptile.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

_Static_assert(sizeof(xct_tensor_info) == 72 && sizeof(xct_step_info) == 56, "as in every program built before");

struct xct_session {
    pthread_mutex_t lock; /* of everything below that changes after xct_open: error and driver_state */
    struct xct_error error;
    struct xct_plan plan;
    struct xct_file weights;
    const struct xct_driver *driver;
    void *driver_state;
    uint64_t *step_ns; /* NULL unless asked for */
    pid_t process;     /* that opened it: threads and GPUs do not follow into a child of fork */
};

static const struct xct_driver *const drivers[] = {
    &xct_cpu_driver,
    &xct_opencl_driver,
    &xct_cuda_driver,
};

static int check_digest(const uint8_t expected[32], const uint8_t digest[32], const char *path, struct xct_error *error)
{
    if (memcmp(digest, expected, 32) != 0)
        return xct_fail(error, XCT_ERROR_HASH, "%s is not the file this bundle was made with, or it is damaged "
                        "(its SHA-256 differs from plan.bin's): copy the bundle again", path);
    return XCT_OK;
}

/* ---- opening ---- */

/* The folder that holds plan.bin: the given one or native/ in it. */
static int find_native(char native[XCT_MAX_PATH_BYTES], const char *directory, struct xct_error *error)
{
    char plan[XCT_MAX_PATH_BYTES];
    int code = xct_path_join(plan, directory, "plan.bin", error);
    if (code != XCT_OK)
        return code;
    if (!xct_file_absent(plan))
        return xct_path_join(native, directory, ".", error);
    code = xct_path_join(native, directory, "native", error);
    if (code == XCT_OK)
        code = xct_path_join(plan, native, "plan.bin", error);
    if (code == XCT_OK && xct_file_absent(plan))
        code = xct_fail(error, XCT_ERROR_FILE, "%s is no bundle: it has neither plan.bin nor native/plan.bin (%s)",
                        directory, strerror(errno));
    return code;
}

static int read_plan(struct xct_session *session, const char *native)
{
    char path[XCT_MAX_PATH_BYTES];
    struct xct_file file;
    int code = xct_path_join(path, native, "plan.bin", &session->error);
    if (code == XCT_OK)
        code = xct_file_map(&file, path, &session->error);
    if (code != XCT_OK)
        return code;
    if (file.size > XCT_MAX_PLAN_BYTES) {
        xct_file_unmap(&file);
        return xct_fail(&session->error, XCT_ERROR_FORMAT, "%s is too long for a plan", path);
    }
    /* A copy: what was checked must not change under the runtime when somebody writes to the file. */
    void *copy = malloc(file.size > 0 ? file.size : 1);
    size_t size = file.size;
    if (copy != NULL && size > 0)
        memcpy(copy, file.data, size);
    xct_file_unmap(&file);
    if (copy == NULL)
        return xct_fail(&session->error, XCT_ERROR_MEMORY, "no memory for a plan of %zu bytes", size);
    return xct_plan_parse(&session->plan, copy, size, &session->error);
}

static int map_weights(struct xct_session *session, const char *native, bool check)
{
    char path[XCT_MAX_PATH_BYTES];
    const struct xct_plan_header *header = session->plan.header;
    int code = xct_path_join(path, native, "weights.bin", &session->error);
    if (code == XCT_OK)
        code = xct_file_map(&session->weights, path, &session->error);
    if (code != XCT_OK)
        return code;
    if (session->weights.size != header->weights_bytes)
        return xct_fail(&session->error, XCT_ERROR_HASH, "%s has %zu bytes, the plan wants %llu: is it truncated?", path,
                        session->weights.size, (unsigned long long)header->weights_bytes);
    if (!check)
        return XCT_OK;
    uint8_t digest[32];
    xct_sha256(session->weights.data, session->weights.size, digest);
    return check_digest(header->weights_sha256, digest, path, &session->error);
}

/* The hash of the driver's files, one after the other. */
static int check_kernels(struct xct_session *session, const char *native)
{
    const char *const *names = session->driver->kernel_files;
    char path[XCT_MAX_PATH_BYTES];
    struct xct_sha256 hash;
    bool found = false;
    xct_sha256_begin(&hash);
    for (size_t i = 0; names[i] != NULL; i++) {
        struct xct_file file;
        int code = xct_path_join(path, native, names[i], &session->error);
        if (code == XCT_OK && (found || names[i + 1] != NULL) && xct_file_absent(path))
            continue;
        if (code == XCT_OK)
            code = xct_file_map(&file, path, &session->error);
        if (code != XCT_OK)
            return code;
        found = true;
        xct_sha256_add(&hash, file.data, file.size);
        xct_file_unmap(&file);
    }
    uint8_t digest[32];
    xct_sha256_end(&hash, digest);
    /* The hash is of all files together: which of several is damaged, nobody knows. */
    int code = names[1] != NULL ? xct_path_join(path, native, "kernels.*", &session->error) : XCT_OK;
    return code == XCT_OK ? check_digest(session->plan.header->kernels_sha256, digest, path, &session->error) : code;
}

static int start_driver(struct xct_session *session, const char *native, const xct_options *options)
{
    const struct xct_plan_header *header = session->plan.header;
    for (size_t i = 0; i < sizeof drivers / sizeof drivers[0]; i++)
        if (drivers[i]->engine == header->engine)
            session->driver = drivers[i];
    if (session->driver == NULL)
        return xct_fail(&session->error, XCT_ERROR_UNSUPPORTED, "the bundle is for engine %u, which this runtime (%s) "
                        "was built without", header->engine, XCT_VERSION);
    if (options->device == XCT_DEVICE_GPU && header->engine == XCT_ENGINE_CPU)
        return xct_fail(&session->error, XCT_ERROR_UNSUPPORTED, "a GPU is required, but this bundle was compiled for "
                        "the processor: compile it for a GPU target");
    if (options->device == XCT_DEVICE_CPU && header->engine == XCT_ENGINE_CUDA)
        return xct_fail(&session->error, XCT_ERROR_UNSUPPORTED, "this bundle was compiled for CUDA, which has GPUs only");
    int code = (options->flags & XCT_SKIP_HASHES) == 0 ? check_kernels(session, native) : XCT_OK;
    if (code != XCT_OK)
        return code;
    if ((options->flags & XCT_TIME_STEPS) != 0) {
        session->step_ns = calloc(header->step_count, sizeof *session->step_ns);
        if (session->step_ns == NULL)
            return xct_fail(&session->error, XCT_ERROR_MEMORY, "no memory for the times of the steps");
    }
    const struct xct_driver_config config = {
        .plan = &session->plan, .weights = session->weights.data, .directory = native, .threads = options->threads,
        .core_mask = options->core_mask, .device = options->device, .step_ns = session->step_ns,
    };
    return session->driver->open(&config, &session->driver_state, &session->error);
}

static int open_session(struct xct_session *session, const char *directory, const xct_options *options)
{
    char native[XCT_MAX_PATH_BYTES];
    if (directory == NULL || directory[0] == 0)
        return xct_fail(&session->error, XCT_ERROR_ARGUMENT, "no bundle is named");
    if (options->struct_bytes != sizeof *options || options->device > XCT_DEVICE_ANY
        || (options->flags & ~(uint32_t)(XCT_SKIP_HASHES | XCT_TIME_STEPS)) != 0)
        return xct_fail(&session->error, XCT_ERROR_ARGUMENT, "xct_options are not those of this version (%s)", XCT_VERSION);
    int code = find_native(native, directory, &session->error);
    if (code == XCT_OK)
        code = read_plan(session, native);
    if (code == XCT_OK)
        code = map_weights(session, native, (options->flags & XCT_SKIP_HASHES) == 0);
    if (code == XCT_OK)
        code = start_driver(session, native, options);
    return code;
}

int xct_open(const char *directory, const xct_options *options, xct_session **out)
{
    static const xct_options defaults = {.struct_bytes = sizeof(xct_options)};
    if (out == NULL)
        return XCT_ERROR_ARGUMENT;
    *out = NULL;
    struct xct_session *session = calloc(1, sizeof *session);
    if (session == NULL)
        return XCT_ERROR_MEMORY;
    if (pthread_mutex_init(&session->lock, NULL) != 0) {
        free(session);
        return XCT_ERROR_MEMORY;
    }
    session->process = getpid();
    *out = session;
    return open_session(session, directory, options != NULL ? options : &defaults);
}

void xct_close(xct_session *session)
{
    if (session == NULL || session->process != getpid()) /* nothing of another process can be ended here */
        return;
    if (session->driver != NULL)
        session->driver->close(session->driver_state);
    xct_file_unmap(&session->weights);
    xct_plan_free(&session->plan);
    free(session->step_ns);
    pthread_mutex_destroy(&session->lock);
    free(session);
}

/* ---- the rest ---- */

const char *xct_version(void)
{
    return XCT_VERSION;
}

void xct_last_error(xct_session *session, char *message, size_t message_bytes)
{
    if (message == NULL || message_bytes == 0)
        return;
    if (session == NULL || session->process != getpid()) { /* the lock, too, is of the process that opened it */
        snprintf(message, message_bytes, "%s", session == NULL ? "no session: out of memory"
                 : "the session was opened before a fork: open one in this process");
        return;
    }
    pthread_mutex_lock(&session->lock);
    snprintf(message, message_bytes, "%s", session->error.message);
    pthread_mutex_unlock(&session->lock);
}

/* Nothing of a session that failed to open, or of another process, may be used but its error. */
static bool is_open(const xct_session *session)
{
    return session != NULL && session->driver_state != NULL && session->process == getpid();
}

uint32_t xct_tensor_count(const xct_session *session)
{
    return is_open(session) ? session->plan.header->tensor_count : 0;
}

uint64_t xct_input_bytes(const xct_session *session)
{
    return is_open(session) ? session->plan.input_bytes : 0;
}

uint64_t xct_output_bytes(const xct_session *session)
{
    return is_open(session) ? session->plan.output_bytes : 0;
}

uint64_t xct_arena_bytes(const xct_session *session)
{
    return is_open(session) ? session->plan.header->arena_bytes : 0;
}

uint32_t xct_threads(const xct_session *session)
{
    return is_open(session) ? session->driver->threads(session->driver_state) : 0;
}

const char *xct_device(const xct_session *session)
{
    return is_open(session) ? session->driver->device(session->driver_state) : "";
}

int xct_tensor(const xct_session *session, uint32_t index, xct_tensor_info *info)
{
    if (index >= xct_tensor_count(session) || info == NULL)
        return XCT_ERROR_ARGUMENT;
    const struct xct_plan_tensor *tensor = &session->plan.tensors[index];
    *info = (xct_tensor_info){
        .name = session->plan.strings + tensor->name,
        .dtype = xct_dtype_of(tensor->dtype)->name,
        .is_output = tensor->kind == XCT_KIND_OUTPUT,
        .rank = tensor->rank,
        .scale = tensor->scale,
        .zero_point = tensor->zero_point,
        .size_bytes = xct_plan_tensor_bytes(tensor),
    };
    memcpy(info->dims, tensor->dims, sizeof info->dims);
    return XCT_OK;
}

int xct_run(xct_session *session, const void *input, size_t input_bytes, void *output, size_t output_bytes)
{
    if (!is_open(session))
        return XCT_ERROR_ARGUMENT;
    const struct xct_plan *plan = &session->plan;
    pthread_mutex_lock(&session->lock);
    int code;
    if (input == NULL || output == NULL)
        code = xct_fail(&session->error, XCT_ERROR_ARGUMENT, "xct_run was given no %s", input == NULL ? "input" : "output");
    else if (input_bytes != plan->input_bytes || output_bytes != plan->output_bytes)
        code = xct_fail(&session->error, XCT_ERROR_ARGUMENT, "xct_run was given %zu bytes of input and %zu of output, "
                        "the network has %llu and %llu", input_bytes, output_bytes,
                        (unsigned long long)plan->input_bytes, (unsigned long long)plan->output_bytes);
    else
        code = session->driver->run(session->driver_state, input, output, &session->error);
    pthread_mutex_unlock(&session->lock);
    return code;
}

uint32_t xct_tolerance(const xct_session *session)
{
    return is_open(session) ? session->plan.header->tolerance : 0;
}

/* The plan's one int8 input, or NULL. */
static const struct xct_plan_tensor *int8_input(const struct xct_plan *plan)
{
    const struct xct_plan_tensor *found = NULL;
    for (uint32_t i = 0; i < plan->header->tensor_count; i++) {
        if (plan->tensors[i].kind != XCT_KIND_INPUT)
            continue;
        if (found != NULL || plan->tensors[i].dtype != XCT_DTYPE_INT8)
            return NULL;
        found = &plan->tensors[i];
    }
    return found;
}

int xct_quantize_pixels(xct_session *session, const uint8_t *pixels, size_t pixels_bytes, void *input,
                        size_t input_bytes)
{
    if (!is_open(session))
        return XCT_ERROR_ARGUMENT;
    const struct xct_plan *plan = &session->plan;
    const struct xct_plan_tensor *tensor = int8_input(plan);
    int code = XCT_OK;
    pthread_mutex_lock(&session->lock);
    if (pixels == NULL || input == NULL || pixels_bytes != plan->input_bytes || input_bytes != plan->input_bytes)
        code = xct_fail(&session->error, XCT_ERROR_ARGUMENT, "xct_quantize_pixels was given %zu bytes of pixels and %zu "
                        "of input, the network takes %llu", pixels == NULL ? 0 : pixels_bytes,
                        input == NULL ? 0 : input_bytes, (unsigned long long)plan->input_bytes);
    else if (tensor == NULL)
        code = xct_fail(&session->error, XCT_ERROR_ARGUMENT, "the network does not take one int8 tensor");
    pthread_mutex_unlock(&session->lock);
    if (code != XCT_OK)
        return code;
    uint8_t *bytes = input;
    if (plan->pixels == NULL) {
        for (size_t i = 0; i < input_bytes; i++)
            bytes[i] = pixels[i] ^ 0x80;
        return XCT_OK;
    }
    uint32_t channels = tensor->dims[tensor->rank - 1];
    for (size_t i = 0; i < input_bytes; i += channels)
        for (uint32_t c = 0; c < channels; c++)
            bytes[i + c] = (uint8_t)plan->pixels[(size_t)XCT_PIXEL_VALUES * c + pixels[i + c]];
    return XCT_OK;
}

uint32_t xct_step_count(const xct_session *session)
{
    return is_open(session) ? session->plan.header->step_count : 0;
}

/* Operands that begin at the same place are one: a kernel may be handed a buffer twice. */
static uint64_t operand_bytes(const struct xct_plan *plan, const struct xct_plan_step *step)
{
    const struct xct_plan_argument *arguments = plan->arguments + step->first_argument;
    uint64_t total = 0;
    for (uint32_t i = 0; i < step->argument_count; i++) {
        uint64_t largest = 0;
        bool seen = false;
        for (uint32_t k = 0; k < step->argument_count; k++) {
            if (arguments[k].space != arguments[i].space || arguments[k].offset != arguments[i].offset)
                continue;
            uint64_t bytes = arguments[k].count * xct_dtype_of(arguments[k].dtype)->bytes;
            largest = bytes > largest ? bytes : largest;
            seen = seen || k < i;
        }
        total += seen ? 0 : largest;
    }
    return total;
}

int xct_step(xct_session *session, uint32_t index, xct_step_info *info)
{
    if (index >= xct_step_count(session) || info == NULL)
        return XCT_ERROR_ARGUMENT;
    const struct xct_plan *plan = &session->plan;
    const struct xct_plan_step *step = &plan->steps[index];
    pthread_mutex_lock(&session->lock); /* a run on another thread writes the times */
    *info = (xct_step_info){
        .name = plan->strings + step->name,
        .path = plan->strings + step->path,
        .kernel = plan->strings + plan->kernels[step->kernel],
        .tasks = step->tasks,
        .macs = step->macs,
        .last_ns = session->step_ns != NULL ? session->step_ns[index] : 0,
        .bytes = operand_bytes(plan, step),
    };
    pthread_mutex_unlock(&session->lock);
    return XCT_OK;
}
