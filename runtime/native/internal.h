/* What the files of the runtime share. Nothing here is seen by its users. */
#ifndef XCT_INTERNAL_H
#define XCT_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "xceptile.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a plan is little endian and is read in place"
#endif

#ifndef XCT_VERSION
#define XCT_VERSION "development"
#endif

/* ---- errors ---- */

struct xct_error {
    int code;
    char message[2048]; /* one line; a compiler's log follows it on lines of its own */
};

/* Records an error and returns its code. The first error of a call is the one that counts: callers return it. */
int xct_fail(struct xct_error *error, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* ---- the plan file; runtime/plan.py describes it ---- */

#define XCT_PLAN_VERSION 3
#define XCT_ALIGNMENT 64u
#define XCT_GPU_ALIGNMENT 512u
#define XCT_MAX_RANK 8
#define XCT_MAX_ARGUMENTS 16
#define XCT_TASK_BITS 24
#define XCT_MAX_TASKS ((1u << XCT_TASK_BITS) - 1)
#define XCT_MAX_GROUP_SIZE 1024
#define XCT_MAX_TOLERANCE 255
#define XCT_STEP_KINDS 15
#define XCT_PIXEL_VALUES 256
#define XCT_MAX_PATH_BYTES 4096
#define XCT_MAX_PLAN_BYTES (1u << 24)
#define XCT_MAX_BYTES (UINT64_C(1) << 40)

enum { XCT_ENGINE_CPU = 1, XCT_ENGINE_OPENCL = 2, XCT_ENGINE_CUDA = 3 };
enum { XCT_KIND_INPUT = 1, XCT_KIND_OUTPUT = 2 };
enum { XCT_SPACE_ARENA = 1, XCT_SPACE_WEIGHTS = 2 };
enum { XCT_DTYPE_INT8 = 1 };

struct xct_plan_header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes;
    uint8_t plan_sha256[32];
    uint64_t file_bytes;
    uint64_t arena_bytes;
    uint64_t weights_bytes;
    uint8_t weights_sha256[32];
    uint8_t kernels_sha256[32];
    uint32_t engine;
    uint32_t tensor_count;
    uint32_t step_count;
    uint32_t argument_count;
    uint32_t kernel_count;
    uint32_t feature_count;
    uint32_t strings_bytes;
    uint32_t launch_count;
    uint32_t tolerance;
    uint32_t pixel_bytes;
};

struct xct_plan_tensor {
    uint32_t name;
    uint32_t kind;
    uint32_t dtype;
    uint32_t rank;
    uint32_t dims[XCT_MAX_RANK];
    float scale;
    int32_t zero_point;
    uint64_t offset;
};

struct xct_plan_step {
    uint32_t kernel;
    uint32_t name;
    uint32_t path;
    uint32_t first_argument;
    uint32_t argument_count;
    uint32_t tasks;
    uint64_t macs;
    uint32_t kind;
    uint32_t output;
};

struct xct_plan_argument {
    uint32_t space;
    uint32_t dtype;
    uint64_t offset;
    uint64_t count;
};

struct xct_plan_launch {
    uint32_t groups[3];
    uint32_t group_size[3];
    uint32_t shared_bytes;
    uint32_t reserved;
};

_Static_assert(sizeof(struct xct_plan_header) == 176, "the header is 176 bytes");
_Static_assert(offsetof(struct xct_plan_header, file_bytes) == 48, "hashed from byte 48 on");
_Static_assert(offsetof(struct xct_plan_header, engine) == 136, "no padding before engine");
_Static_assert(sizeof(struct xct_plan_tensor) == 64, "a tensor is 64 bytes");
_Static_assert(offsetof(struct xct_plan_tensor, offset) == 56, "no padding in a tensor");
_Static_assert(sizeof(struct xct_plan_step) == 40, "a step is 40 bytes");
_Static_assert(sizeof(struct xct_plan_argument) == 24, "an argument is 24 bytes");
_Static_assert(sizeof(struct xct_plan_launch) == 32, "a launch is 32 bytes");
_Static_assert(sizeof(float) == 4, "a scale is 4 bytes");

/* A plan that passed every check: indices, offsets and strings may be used as they are. */
struct xct_plan {
    void *data; /* the file, from malloc */
    const struct xct_plan_header *header;
    const struct xct_plan_tensor *tensors;
    const struct xct_plan_step *steps;
    const struct xct_plan_argument *arguments;
    const struct xct_plan_launch *launches; /* one for each step of a GPU's plan; none for the CPU */
    const uint32_t *kernels;
    const uint32_t *features;
    const char *strings;
    const int8_t *pixels; /* XCT_PIXEL_VALUES for each channel of the input; NULL: pixel p enters as p - 128 */
    uint64_t input_bytes;
    uint64_t output_bytes;
};

/* Checks the bytes of a plan file and takes ownership of data (from malloc), also if it fails. */
int xct_plan_parse(struct xct_plan *plan, void *data, size_t size, struct xct_error *error);
void xct_plan_free(struct xct_plan *plan);
uint64_t xct_plan_tensor_bytes(const struct xct_plan_tensor *tensor);

struct xct_dtype {
    const char *name;
    uint8_t dl_code; /* DLPack's: 0 signed, 1 unsigned, 2 float */
    uint8_t bytes;
};
/* NULL for a code that is none. */
const struct xct_dtype *xct_dtype_of(uint32_t code);

/* ---- files ---- */

/* A whole file, read-only: mapped, so that its pages are shared and can be dropped by the system. */
struct xct_file {
    const uint8_t *data;
    size_t size;
};

int xct_file_map(struct xct_file *file, const char *path, struct xct_error *error);
void xct_file_unmap(struct xct_file *file);
/* Whether there is no such file; one that only cannot be had counts as there, and mapping it says why. */
bool xct_file_absent(const char *path);
/* directory/name; XCT_MAX_PATH_BYTES are enough for path. */
int xct_path_join(char *path, const char *directory, const char *name, struct xct_error *error);
/* Writes a whole file: beside its place and renamed, so that nobody sees half of it. */
int xct_file_write(const char *path, const void *data, size_t size, struct xct_error *error);

struct xct_sha256 {
    uint32_t state[8];
    uint64_t size;
    uint8_t rest[64]; /* size % 64 bytes that fill no block yet */
};

void xct_sha256_begin(struct xct_sha256 *hash);
void xct_sha256_add(struct xct_sha256 *hash, const void *data, size_t size);
void xct_sha256_end(struct xct_sha256 *hash, uint8_t digest[32]);
/* All at once. */
void xct_sha256(const void *data, size_t size, uint8_t digest[32]);

/* Compiled programs are kept under a hash of all that they depend on, in a folder of the user's that nobody else can
 * write to. NULL if there is none that is whole; else from malloc. */
void *xct_cache_read(const uint8_t key[32], size_t *size);
void xct_cache_write(const uint8_t key[32], const void *program, size_t size);

/* ---- the threads of a session ---- */

struct xct_pool;

/* Does the tasks begin <= t < end of one step; returns 0, or an error code with its message. */
typedef int (*xct_task_fn)(void *context, uint32_t step, uint32_t begin, uint32_t end, struct xct_error *error);

/* A pool that runs `steps` steps in order, step i being tasks[i] (at least 1) independent tasks. tasks must outlive
 * the pool. step_ns may be NULL. */
int xct_pool_open(struct xct_pool **pool, uint32_t threads, uint64_t core_mask, uint32_t steps, const uint32_t *tasks,
                  xct_task_fn function, void *context, uint64_t *step_ns, struct xct_error *error);
/* All steps, with the calling thread taking part. One call at a time. */
int xct_pool_run(struct xct_pool *pool, struct xct_error *error);
uint32_t xct_pool_threads(const struct xct_pool *pool);
void xct_pool_close(struct xct_pool *pool);

/* ---- drivers: how a plan is executed ---- */

struct xct_driver_config {
    const struct xct_plan *plan;
    const uint8_t *weights; /* header->weights_bytes of them, aligned to a page */
    const char *directory;  /* that holds plan.bin and the kernels; the string does not outlive open */
    uint32_t threads;
    uint64_t core_mask;
    uint32_t device;   /* XCT_DEVICE_...; a CPU is only asked of the OpenCL driver, a GPU never of the CPU's */
    uint64_t *step_ns; /* one for each step, or NULL */
};

#define XCT_MAX_KERNEL_FILES 3

struct xct_driver {
    uint32_t engine;
    /* The names in the bundle of the files that kernels_sha256 is of, in its order. If there are several, each may be
     * missing, but not all. */
    const char *kernel_files[XCT_MAX_KERNEL_FILES + 1]; /* ends with NULL */
    int (*open)(const struct xct_driver_config *config, void **state, struct xct_error *error);
    /* Runs once; input and output have the plan's sizes. */
    int (*run)(void *state, const void *input, void *output, struct xct_error *error);
    uint32_t (*threads)(const void *state);
    /* What computes, in printable ASCII. */
    const char *(*device)(const void *state);
    void (*close)(void *state); /* NULL is allowed */
};

extern const struct xct_driver xct_cpu_driver;
extern const struct xct_driver xct_opencl_driver;
extern const struct xct_driver xct_cuda_driver;

#endif
