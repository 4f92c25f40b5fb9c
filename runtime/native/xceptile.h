/* libxceptile: runs a compiled network (the native/ folder of a bundle) on this machine's processor or GPU.
 *
 *     xct_session *session;
 *     if (xct_open("build/pi5", NULL, &session) != XCT_OK) { ... xct_last_error(session, message, sizeof message); }
 *     else if (xct_run(session, input, input_bytes, output, output_bytes) != XCT_OK) { ... }
 *     xct_close(session);
 *
 * Input and output are the network's tensors as they lie in memory: NHWC, contiguous, little endian, one image a call
 * or, if the bundle was compiled for batches of N, N images.
 * xct_quantize_pixels makes the input of an 8-bit image.
 *
 * Every call may be made from any thread. Calls on one session wait for each other; two sessions do not share
 * anything, so open one per thread that shall run at the same time. After a fork the child opens sessions of its own.
 * The bundle's files are mapped: while it is open they may be replaced (renamed over), not written to or cut.
 *
 * Needs libc, libdl and libpthread; docs/runtime.md says how to link. */
#ifndef XCEPTILE_H
#define XCEPTILE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(XCT_BUILD_SHARED)
#define XCT_API __attribute__((visibility("default")))
#else
#define XCT_API
#endif

typedef struct xct_session xct_session;

enum {
    XCT_OK = 0,
    XCT_ERROR_ARGUMENT = 1,    /* the caller's arguments are wrong: sizes, indices, null pointers */
    XCT_ERROR_MEMORY = 2,      /* no memory */
    XCT_ERROR_FILE = 3,        /* a file is missing or cannot be read */
    XCT_ERROR_FORMAT = 4,      /* a file is not what it should be: damaged, of a newer version */
    XCT_ERROR_HASH = 5,        /* a file is not the one the plan was made with */
    XCT_ERROR_UNSUPPORTED = 6, /* the bundle was built for another processor or engine */
    XCT_ERROR_KERNEL = 7,      /* the kernels could not be loaded, or one of them failed */
    XCT_ERROR_THREAD = 8,      /* the system refused a thread */
    XCT_ERROR_DEVICE = 9       /* there is no such GPU here, or its driver failed: open a new session */
};

/* What must do the computing. */
enum {
    XCT_DEVICE_DEFAULT = 0, /* what the bundle was compiled for: the processor, or a GPU and nothing but a GPU */
    XCT_DEVICE_GPU = 1,     /* as the default, and a bundle for the processor is refused */
    XCT_DEVICE_CPU = 2,     /* a bundle for OpenCL runs on an OpenCL device that is a processor: a rehearsal */
    XCT_DEVICE_ANY = 3      /* as the default, and where there is no GPU as XCT_DEVICE_CPU */
};

enum {
    XCT_SKIP_HASHES = 1, /* do not read all of the weights and kernels at open to check their SHA-256 */
    XCT_TIME_STEPS = 2   /* keep the time of every step of the last run, see xct_step_info */
};

/* How to open a session; all zero but struct_bytes is the default. */
typedef struct {
    uint32_t struct_bytes; /* sizeof(xct_options) */
    uint32_t threads;      /* that compute, the caller included, 64 at most; 0: one for each processor this process
                              may use */
    uint64_t core_mask;    /* bit i: the session's own threads may run on processor i; 0: as the process. The calling
                              thread is left where it is, and takes part in the work */
    uint32_t flags;
    uint32_t device; /* XCT_DEVICE_... */
} xct_options;

/* What the library fills in, xct_tensor_info and xct_step_info, keeps its size and layout for good: a program may be
 * given a newer library than its header. More to know would come from a call of its own. */
typedef struct {
    const char *name;  /* valid until xct_close */
    const char *dtype; /* "int8", "float32", ... */
    int32_t is_output; /* 0: input */
    uint32_t rank;
    uint32_t dims[8];
    float scale; /* real value = scale * (q - zero_point); 0: not quantized */
    int32_t zero_point;
    uint64_t size_bytes;
} xct_tensor_info;

typedef struct {
    const char *name; /* of the node of the graph; valid until xct_close, like the other two */
    const char *path; /* of the module in the trained network */
    const char *kernel;
    uint32_t tasks;
    uint32_t reserved;
    uint64_t macs;
    uint64_t last_ns; /* of the last run, if opened with XCT_TIME_STEPS */
    uint64_t bytes;   /* of the distinct operands: what must be moved at least once */
} xct_step_info;

/* The version of this library, such as "0.1.0". */
XCT_API const char *xct_version(void);

/* Opens the bundle in a directory: the one that holds plan.bin, or the one above with native/plan.bin.
 * options may be NULL. On failure *session is set too, unless memory ran out (then it is NULL): it serves for
 * xct_last_error and must be closed. */
XCT_API int xct_open(const char *directory, const xct_options *options, xct_session **session);

/* Frees everything; NULL is allowed. No other call on the session may be under way. */
XCT_API void xct_close(xct_session *session);

/* The message of the last call that failed on this session, cut to size; "" if none did. Safe from any thread. */
XCT_API void xct_last_error(xct_session *session, char *message, size_t message_bytes);

/* The network's tensors: inputs and outputs in the order in which xct_run has them. */
XCT_API uint32_t xct_tensor_count(const xct_session *session);
XCT_API int xct_tensor(const xct_session *session, uint32_t index, xct_tensor_info *info);
XCT_API uint64_t xct_input_bytes(const xct_session *session);
XCT_API uint64_t xct_output_bytes(const xct_session *session);
XCT_API uint64_t xct_arena_bytes(const xct_session *session);
XCT_API uint32_t xct_threads(const xct_session *session);
/* What computes, in printable ASCII: "cpu", or the GPU's name and the version of its driver, and of a float16 build that
 * "float32 stands in for float16" where it does. Valid until xct_close. */
XCT_API const char *xct_device(const xct_session *session);

/* One inference. input holds all input tensors one after the other (xct_input_bytes), output receives all output
 * tensors (xct_output_bytes); the sizes must be exactly these. output is not touched if the call fails. */
XCT_API int xct_run(xct_session *session, const void *input, size_t input_bytes, void *output, size_t output_bytes);

/* Turns 8-bit pixels (0..255), NHWC, into the network's int8 input: by the bundle's table of pixels where it has one,
 * else p - 128, which is p ^ 0x80 bit for bit. Both sizes must be xct_input_bytes; input may be the pixels' own memory.
 * Fails for a network that does not take one int8 tensor. */
XCT_API int xct_quantize_pixels(xct_session *session, const uint8_t *pixels, size_t pixels_bytes, void *input,
                                size_t input_bytes);

/* By how many steps an int8 output may differ from the one that the bundle recorded: 0, but for a network with layers
 * in float. */
XCT_API uint32_t xct_tolerance(const xct_session *session);

/* The steps of the network, in order, with the times of the last run. */
XCT_API uint32_t xct_step_count(const xct_session *session);
XCT_API int xct_step(xct_session *session, uint32_t index, xct_step_info *info);

#ifdef __cplusplus
}
#endif
#endif
