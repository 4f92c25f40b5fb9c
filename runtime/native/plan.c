/* Reads a plan. Its bytes are not trusted: nothing is used before it was checked, and the rest of the runtime relies
 * on these checks alone. runtime/plan.py makes the same ones; a test holds the two together. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define HASHED_FROM offsetof(struct xct_plan_header, file_bytes)
#define MAX_IDENTIFIER 200

static const struct xct_dtype dtypes[] = {
    {"int8", 0, 1},   {"uint8", 1, 1}, {"int16", 0, 2},   {"uint16", 1, 2},  {"int32", 0, 4},
    {"uint32", 1, 4}, {"int64", 0, 8}, {"float16", 2, 2}, {"float32", 2, 4},
};

const struct xct_dtype *xct_dtype_of(uint32_t code)
{
    return code >= 1 && code <= sizeof dtypes / sizeof dtypes[0] ? &dtypes[code - 1] : NULL;
}

uint64_t xct_plan_tensor_bytes(const struct xct_plan_tensor *tensor)
{
    uint64_t bytes = xct_dtype_of(tensor->dtype)->bytes;
    for (uint32_t i = 0; i < tensor->rank; i++)
        bytes *= tensor->dims[i];
    return bytes;
}

static int bad(struct xct_error *error, const char *what, uint64_t index, const char *why)
{
    return xct_fail(error, XCT_ERROR_FORMAT, "plan.bin is not sound: %s %llu: %s", what, (unsigned long long)index, why);
}

static int bad_header(struct xct_error *error, const char *why)
{
    return xct_fail(error, XCT_ERROR_FORMAT, "plan.bin is not sound: %s", why);
}

static bool is_gpu(const struct xct_plan_header *header)
{
    return header->engine != XCT_ENGINE_CPU;
}

/* A slice lies in its space: aligned, and neither it nor its end overflows. */
static bool in_range(const struct xct_plan_header *header, uint64_t offset, uint64_t count, uint64_t item_bytes,
                     uint64_t room)
{
    uint64_t alignment = is_gpu(header) ? XCT_GPU_ALIGNMENT : XCT_ALIGNMENT;
    return offset % alignment == 0 && offset <= room && count <= (room - offset) / item_bytes;
}

static bool is_identifier(const char *text)
{
    size_t length = strlen(text);
    if (length < 1 || length > MAX_IDENTIFIER)
        return false;
    for (; *text; text++) {
        bool letter = (*text >= 'a' && *text <= 'z') || (*text >= 'A' && *text <= 'Z');
        if (!letter && !(*text >= '0' && *text <= '9') && *text != '_')
            return false;
    }
    return true;
}

static int check_header(const struct xct_plan_header *header, const void *data, size_t size, struct xct_error *error)
{
    if (memcmp(header->magic, "XCTPLAN", 8) != 0)
        return bad_header(error, "it does not begin with XCTPLAN");
    if (header->version != XCT_PLAN_VERSION)
        return xct_fail(error, XCT_ERROR_FORMAT, "plan.bin has format version %u, this runtime (%s) reads version %d: "
                        "use the xceptile-run that came with the bundle", header->version, XCT_VERSION, XCT_PLAN_VERSION);
    if (header->header_bytes != sizeof *header || header->file_bytes != size)
        return bad_header(error, "its length is not the one in its header: is it truncated?");
    uint8_t digest[32];
    xct_sha256((const uint8_t *)data + HASHED_FROM, size - HASHED_FROM, digest);
    if (memcmp(digest, header->plan_sha256, sizeof digest) != 0)
        return bad_header(error, "it is damaged, its SHA-256 differs");
    if (header->arena_bytes == 0 || header->arena_bytes > XCT_MAX_BYTES || header->weights_bytes > XCT_MAX_BYTES)
        return bad_header(error, "the arena or the weights have an impossible size");
    if (header->engine < XCT_ENGINE_CPU || header->engine > XCT_ENGINE_CUDA)
        return xct_fail(error, XCT_ERROR_FORMAT, "plan.bin is for engine %u, which this runtime does not know",
                        header->engine);
    if (header->launch_count != (is_gpu(header) ? header->step_count : 0))
        return bad_header(error, "its launches are not as many as its steps");
    if (header->tolerance > XCT_MAX_TOLERANCE)
        return bad_header(error, "its tolerance is impossible");
    return XCT_OK;
}

/* Places the tables; with 32-bit counts and records under 100 bytes no sum overflows 64 bits. */
static int place_tables(struct xct_plan *plan, size_t size, struct xct_error *error)
{
    const struct xct_plan_header *header = plan->header;
    uint64_t tensors = sizeof *header;
    uint64_t steps = tensors + (uint64_t)header->tensor_count * sizeof *plan->tensors;
    uint64_t arguments = steps + (uint64_t)header->step_count * sizeof *plan->steps;
    uint64_t launches = arguments + (uint64_t)header->argument_count * sizeof *plan->arguments;
    uint64_t kernels = launches + (uint64_t)header->launch_count * sizeof *plan->launches;
    uint64_t features = kernels + (uint64_t)header->kernel_count * sizeof *plan->kernels;
    uint64_t strings = features + (uint64_t)header->feature_count * sizeof *plan->features;
    uint64_t pixels = strings + header->strings_bytes;
    if (pixels + header->pixel_bytes != size)
        return bad_header(error, "its tables do not fill it");
    const uint8_t *data = plan->data;
    plan->tensors = (const void *)(data + tensors);
    plan->steps = (const void *)(data + steps);
    plan->arguments = (const void *)(data + arguments);
    plan->launches = (const void *)(data + launches);
    plan->kernels = (const void *)(data + kernels);
    plan->features = (const void *)(data + features);
    plan->strings = (const char *)(data + strings);
    plan->pixels = header->pixel_bytes > 0 ? (const int8_t *)(data + pixels) : NULL;
    return XCT_OK;
}

static int check_strings(const struct xct_plan *plan, struct xct_error *error)
{
    uint32_t size = plan->header->strings_bytes;
    if (size == 0 || plan->strings[size - 1] != 0)
        return bad_header(error, "its strings do not end");
    for (uint32_t i = 0; i < size; i++)
        if (plan->strings[i] != 0 && (plan->strings[i] < 0x20 || plan->strings[i] > 0x7e))
            return bad(error, "string byte", i, "not printable ASCII");
    return XCT_OK;
}

static int check_tensor(struct xct_plan *plan, uint32_t i, struct xct_error *error)
{
    const struct xct_plan_tensor *tensor = &plan->tensors[i];
    const struct xct_dtype *dtype = xct_dtype_of(tensor->dtype);
    if (tensor->name >= plan->header->strings_bytes || plan->strings[tensor->name] == 0)
        return bad(error, "tensor", i, "no name");
    if (tensor->kind != XCT_KIND_INPUT && tensor->kind != XCT_KIND_OUTPUT)
        return bad(error, "tensor", i, "neither input nor output");
    if (dtype == NULL || tensor->rank < 1 || tensor->rank > XCT_MAX_RANK)
        return bad(error, "tensor", i, "unknown type or rank");
    uint64_t count = 1;
    for (uint32_t k = 0; k < XCT_MAX_RANK; k++) {
        if ((tensor->dims[k] != 0) != (k < tensor->rank))
            return bad(error, "tensor", i, "a dimension is zero, or one past its rank is not");
        if (k < tensor->rank) {
            if (tensor->dims[k] > XCT_MAX_BYTES / count)
                return bad(error, "tensor", i, "too many elements");
            count *= tensor->dims[k];
        }
    }
    if (!in_range(plan->header, tensor->offset, count, dtype->bytes, plan->header->arena_bytes))
        return bad(error, "tensor", i, "misaligned or outside the arena");
    if (!isfinite(tensor->scale) || tensor->scale < 0 || tensor->zero_point < -128 || tensor->zero_point > 255)
        return bad(error, "tensor", i, "impossible quantization");
    *(tensor->kind == XCT_KIND_INPUT ? &plan->input_bytes : &plan->output_bytes) += count * dtype->bytes;
    return XCT_OK;
}

static int check_argument(const struct xct_plan *plan, uint32_t i, struct xct_error *error)
{
    const struct xct_plan_argument *argument = &plan->arguments[i];
    const struct xct_dtype *dtype = xct_dtype_of(argument->dtype);
    if (dtype == NULL || (argument->space != XCT_SPACE_ARENA && argument->space != XCT_SPACE_WEIGHTS))
        return bad(error, "argument", i, "unknown type or space");
    uint64_t room = argument->space == XCT_SPACE_ARENA ? plan->header->arena_bytes : plan->header->weights_bytes;
    if (argument->count == 0 || !in_range(plan->header, argument->offset, argument->count, dtype->bytes, room))
        return bad(error, "argument", i, "empty, misaligned or outside its space");
    return XCT_OK;
}

/* The bounds are CUDA's (the guide's table of compute capabilities); 227 KB is what sm_90 has. */
static int check_launch(const struct xct_plan *plan, uint32_t i, struct xct_error *error)
{
    static const uint32_t max_groups[3] = {INT32_MAX, 65535, 65535};
    const struct xct_plan_launch *launch = &plan->launches[i];
    uint64_t size = 1;
    for (int k = 0; k < 3; k++) {
        if (launch->groups[k] < 1 || launch->groups[k] > max_groups[k])
            return bad(error, "launch", i, "no groups or too many");
        if (launch->group_size[k] < 1 || launch->group_size[k] > XCT_MAX_GROUP_SIZE)
            return bad(error, "launch", i, "groups of an impossible size");
        size *= launch->group_size[k];
    }
    if (size > XCT_MAX_GROUP_SIZE)
        return bad(error, "launch", i, "groups of an impossible size");
    if (launch->shared_bytes > (plan->header->engine == XCT_ENGINE_CUDA ? 227u << 10 : 0))
        return bad(error, "launch", i, "too much shared memory");
    if (launch->reserved != 0)
        return bad(error, "launch", i, "a reserved field is not zero");
    return XCT_OK;
}

static int check_steps(const struct xct_plan *plan, struct xct_error *error)
{
    const struct xct_plan_header *header = plan->header;
    uint32_t first = 0;
    for (uint32_t i = 0; i < header->step_count; i++) {
        const struct xct_plan_step *step = &plan->steps[i];
        if (step->name >= header->strings_bytes || plan->strings[step->name] == 0 || step->path >= header->strings_bytes)
            return bad(error, "step", i, "no name");
        if (step->kernel >= header->kernel_count)
            return bad(error, "step", i, "no such kernel");
        if (step->argument_count < 1 || step->argument_count > XCT_MAX_ARGUMENTS)
            return bad(error, "step", i, "too few or too many arguments");
        if (step->first_argument != first || step->argument_count > header->argument_count - first)
            return bad(error, "step", i, "its arguments are not where they belong");
        if (step->tasks < 1 || step->tasks > (is_gpu(header) ? 1 : XCT_MAX_TASKS))
            return bad(error, "step", i, "no tasks or too many");
        if (step->kind < 1 || step->kind > XCT_STEP_KINDS)
            return bad(error, "step", i, "of an unknown kind");
        if (step->output >= step->argument_count || plan->arguments[first + step->output].space != XCT_SPACE_ARENA)
            return bad(error, "step", i, "its output is not an argument in the arena");
        first += step->argument_count;
    }
    if (header->step_count == 0 || first != header->argument_count)
        return bad_header(error, "it has no steps, or arguments that belong to none");
    return XCT_OK;
}

static int check_names(const struct xct_plan *plan, const uint32_t *names, uint32_t count, const char *what,
                       struct xct_error *error)
{
    for (uint32_t i = 0; i < count; i++)
        if (names[i] >= plan->header->strings_bytes || !is_identifier(plan->strings + names[i]))
            return bad(error, what, i, "its name is no identifier");
    return XCT_OK;
}

/* A table of pixels belongs to one int8 input, and has a row for each of its channels. */
static int check_pixels(const struct xct_plan *plan, struct xct_error *error)
{
    const struct xct_plan_header *header = plan->header;
    uint32_t inputs = 0;
    bool sound = true;
    for (uint32_t i = 0; i < header->tensor_count; i++) {
        const struct xct_plan_tensor *tensor = &plan->tensors[i];
        if (tensor->kind != XCT_KIND_INPUT)
            continue;
        inputs++;
        sound = sound && tensor->dtype == XCT_DTYPE_INT8 &&
                header->pixel_bytes == (uint64_t)XCT_PIXEL_VALUES * tensor->dims[tensor->rank - 1];
    }
    if (header->pixel_bytes > 0 && (inputs != 1 || !sound))
        return bad_header(error, "its table of pixels does not fit its input");
    return XCT_OK;
}

static int check(struct xct_plan *plan, size_t size, struct xct_error *error)
{
    if (size < sizeof *plan->header || size > XCT_MAX_PLAN_BYTES)
        return bad_header(error, "it is too short or too long for a plan");
    plan->header = plan->data;
    const struct xct_plan_header *header = plan->header;
    int code = check_header(header, plan->data, size, error);
    if (code == XCT_OK)
        code = place_tables(plan, size, error);
    if (code == XCT_OK)
        code = check_strings(plan, error);
    for (uint32_t i = 0; code == XCT_OK && i < header->tensor_count; i++)
        code = check_tensor(plan, i, error);
    for (uint32_t i = 0; code == XCT_OK && i < header->argument_count; i++)
        code = check_argument(plan, i, error);
    for (uint32_t i = 0; code == XCT_OK && i < header->launch_count; i++)
        code = check_launch(plan, i, error);
    if (code == XCT_OK)
        code = check_names(plan, plan->kernels, header->kernel_count, "kernel", error);
    if (code == XCT_OK)
        code = check_names(plan, plan->features, header->feature_count, "feature", error);
    if (code == XCT_OK)
        code = check_steps(plan, error);
    if (code == XCT_OK)
        code = check_pixels(plan, error);
    if (code == XCT_OK && (plan->input_bytes == 0 || plan->output_bytes == 0))
        code = bad_header(error, "it has no input or no output");
    return code;
}

int xct_plan_parse(struct xct_plan *plan, void *data, size_t size, struct xct_error *error)
{
    memset(plan, 0, sizeof *plan);
    plan->data = data;
    int code = check(plan, size, error);
    if (code != XCT_OK)
        xct_plan_free(plan);
    return code;
}

void xct_plan_free(struct xct_plan *plan)
{
    free(plan->data);
    memset(plan, 0, sizeof *plan);
}
