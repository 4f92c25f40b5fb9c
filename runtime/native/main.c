/* xceptile-run: runs a bundle on this machine. It uses xceptile.h only, so it is an example of its use as well. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "xceptile.h"

static const char usage[] =
    "Usage: xceptile-run [options] BUNDLE [INPUT [OUTPUT]]\n"
    "\n"
    "Runs the compiled network in BUNDLE (a bundle, or its native/ folder) on every image of the file INPUT and writes\n"
    "the results to the file OUTPUT; - is standard input or output. INPUT holds one image after the other, each as its\n"
    "NHWC tensor (int8; xct_quantize_pixels makes it of an 8-bit image); OUTPUT gets one output tensor after the other. With --repeat, INPUT alone is\n"
    "only timed.\n"
    "\n"
    "  --threads N      threads that compute (default: one for each processor)\n"
    "  --cores LIST     processors to run on, such as 4-7 or 0,2,3\n"
    "  --require-device gpu|cpu|any\n"
    "                   gpu: refuse a bundle for the processor; cpu: run a bundle for OpenCL on an OpenCL device that is\n"
    "                   a processor, to rehearse; any: on such a one where there is no GPU. Without it a bundle for a\n"
    "                   GPU runs on a GPU or not at all\n"
    "  --self-test      run the bundle's golden inputs and compare the outputs, byte for byte (a network\n"
    "                   with layers in float: within the steps that the plan allows)\n"
    "  --repeat N       time N inferences and print every sample as JSON\n"
    "  --warmup N       inferences before those that are timed (default 5)\n"
    "  --layers         with --repeat: the samples of every step, too, and the machine's roof\n"
    "  --describe       print the network's inputs, outputs and steps as JSON\n"
    "  --version        print the version\n"
    "  --help           print this\n"
    "\n"
    "Timings are of the first image of INPUT, or of the golden input. Exit status: 0 all went well, 1 the self-test\n"
    "found a difference, 2 an error.\n";

struct options {
    const char *bundle, *input, *output;
    uint32_t threads;
    uint64_t core_mask;
    uint32_t repeat, warmup, device;
    bool self_test, layers, describe;
};

enum { OK = 0, DIFFERENT = 1, FAILED = 2 };

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "xceptile-run: %s: %s\n", what, why);
    return FAILED;
}

static int fail_session(xct_session *session, const char *what)
{
    char message[2048];
    xct_last_error(session, message, sizeof message);
    return fail(what, message);
}

/* ---- the command line ---- */

static bool parse_number(const char *text, unsigned long limit, uint32_t *number)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno != 0 || end == text || *end != 0 || text[0] == '-' || value > limit)
        return false;
    *number = (uint32_t)value;
    return true;
}

/* 0,2,4-7: processors below 64, as taskset has them. */
static bool parse_cores(const char *text, uint64_t *mask)
{
    for (*mask = 0;;) {
        char *end;
        if (*text < '0' || *text > '9')
            return false;
        unsigned long first = strtoul(text, &end, 10), last = first;
        if (*end == '-') {
            text = end + 1;
            if (*text < '0' || *text > '9')
                return false;
            last = strtoul(text, &end, 10);
        }
        if (first > last || last > 63)
            return false;
        for (unsigned long i = first; i <= last; i++)
            *mask |= UINT64_C(1) << i;
        if (*end == 0)
            return true;
        if (*end != ',')
            return false;
        text = end + 1;
    }
}

static bool parse_device(const char *text, uint32_t *device)
{
    static const char *const names[] = {"gpu", "cpu", "any"}; /* XCT_DEVICE_GPU and what follows it */
    for (*device = XCT_DEVICE_GPU; *device <= XCT_DEVICE_ANY; ++*device)
        if (strcmp(text, names[*device - XCT_DEVICE_GPU]) == 0)
            return true;
    return false;
}

/* Returns -1 to go on, or the exit status. */
static int parse(int argc, char **argv, struct options *options)
{
    enum { THREADS = 256, CORES, SELF_TEST, REPEAT, WARMUP, LAYERS, DESCRIBE, REQUIRE_DEVICE, VERSION, HELP };
    static const struct option known[] = {
        {"threads", required_argument, NULL, THREADS}, {"cores", required_argument, NULL, CORES},
        {"self-test", no_argument, NULL, SELF_TEST},   {"repeat", required_argument, NULL, REPEAT},
        {"warmup", required_argument, NULL, WARMUP},   {"layers", no_argument, NULL, LAYERS},
        {"describe", no_argument, NULL, DESCRIBE},     {"version", no_argument, NULL, VERSION},
        {"help", no_argument, NULL, HELP},             {"require-device", required_argument, NULL, REQUIRE_DEVICE},
        {NULL, 0, NULL, 0},
    };
    *options = (struct options){.warmup = 5};
    int option;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        bool good = true;
        switch (option) {
        case THREADS: good = parse_number(optarg, 64, &options->threads) && options->threads > 0; break;
        case CORES: good = parse_cores(optarg, &options->core_mask); break;
        case REPEAT: good = parse_number(optarg, 1000000, &options->repeat) && options->repeat > 0; break;
        case WARMUP: good = parse_number(optarg, 1000000, &options->warmup); break;
        case REQUIRE_DEVICE: good = parse_device(optarg, &options->device); break;
        case SELF_TEST: options->self_test = true; break;
        case LAYERS: options->layers = true; break;
        case DESCRIBE: options->describe = true; break;
        case VERSION: printf("xceptile-run %s\n", xct_version()); return OK;
        case HELP: fputs(usage, stdout); return OK;
        default: return FAILED; /* getopt has said why */
        }
        if (!good)
            return fail(argv[optind - 1], "not a valid value, see --help");
    }
    int count = argc - optind;
    if (count < 1 || count > 3) {
        fputs(usage, stderr);
        return FAILED;
    }
    options->bundle = argv[optind];
    options->input = count > 1 ? argv[optind + 1] : NULL;
    options->output = count > 2 ? argv[optind + 2] : NULL;
    if (options->layers && options->repeat == 0)
        return fail("--layers", "needs --repeat");
    if (count == 2 && options->repeat == 0)
        return fail(options->input, "is to be run, but no OUTPUT is named");
    if (count == 1 && !options->self_test && options->repeat == 0 && !options->describe)
        return fail(options->bundle, "nothing to do: give INPUT and OUTPUT, --self-test, --repeat or --describe");
    return -1;
}

/* ---- JSON ---- */

/* The strings of a plan are printable ASCII. */
static void print_string(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            putchar('\\');
        putchar(*text);
    }
    putchar('"');
}

static void print_samples(const uint64_t *samples_ns, uint32_t count, size_t stride)
{
    putchar('[');
    for (uint32_t i = 0; i < count; i++)
        printf("%s%.6f", i > 0 ? ", " : "", (double)samples_ns[i * stride] / 1e6);
    putchar(']');
}

static void print_tensors(const xct_session *session, bool outputs)
{
    xct_tensor_info tensor;
    bool first = true;
    putchar('[');
    for (uint32_t i = 0; xct_tensor(session, i, &tensor) == XCT_OK; i++) {
        if ((tensor.is_output != 0) != outputs)
            continue;
        printf("%s{\"name\": ", first ? "" : ", ");
        first = false;
        print_string(tensor.name);
        printf(", \"dtype\": \"%s\", \"shape\": [", tensor.dtype);
        for (uint32_t k = 0; k < tensor.rank; k++)
            printf("%s%u", k > 0 ? ", " : "", tensor.dims[k]);
        printf("], \"scale\": %.9g, \"zero_point\": %d, \"size_bytes\": %llu}", (double)tensor.scale, tensor.zero_point,
               (unsigned long long)tensor.size_bytes);
    }
    putchar(']');
}

static void print_step(const xct_step_info *step)
{
    printf("{\"name\": ");
    print_string(step->name);
    printf(", \"path\": ");
    print_string(step->path);
    printf(", \"kernel\": ");
    print_string(step->kernel);
    printf(", \"tasks\": %u, \"macs\": %llu, \"bytes\": %llu", step->tasks, (unsigned long long)step->macs,
           (unsigned long long)step->bytes);
}

static void describe(xct_session *session)
{
    printf("{\"version\": \"%s\", \"device\": ", xct_version());
    print_string(xct_device(session));
    printf(", \"threads\": %u, \"arena_bytes\": %llu,\n \"inputs\": ", xct_threads(session),
           (unsigned long long)xct_arena_bytes(session));
    print_tensors(session, false);
    printf(",\n \"outputs\": ");
    print_tensors(session, true);
    printf(",\n \"steps\": [");
    xct_step_info step;
    for (uint32_t i = 0; xct_step(session, i, &step) == XCT_OK; i++) {
        printf("%s\n  ", i > 0 ? "," : "");
        print_step(&step);
        putchar('}');
    }
    printf("]}\n");
}

/* ---- running ---- */

struct buffers {
    uint8_t *input, *output, *expected;
    size_t input_bytes, output_bytes;
};

static bool allocate(const xct_session *session, struct buffers *buffers)
{
    buffers->input_bytes = xct_input_bytes(session);
    buffers->output_bytes = xct_output_bytes(session);
    buffers->input = calloc(buffers->input_bytes, 1);
    buffers->output = calloc(buffers->output_bytes, 1);
    buffers->expected = calloc(buffers->output_bytes, 1);
    return buffers->input != NULL && buffers->output != NULL && buffers->expected != NULL;
}

/* Reads one whole image. 1: read; 0: the file ended before it; -1: it ended within, or could not be read. */
static int read_image(FILE *file, uint8_t *data, size_t bytes)
{
    size_t got = fread(data, 1, bytes, file);
    if (got == bytes)
        return 1;
    return got == 0 && !ferror(file) ? 0 : -1;
}

static int run_stream(xct_session *session, struct buffers *buffers, FILE *input, FILE *output,
                      const struct options *options)
{
    unsigned long long images = 0;
    int got;
    while ((got = read_image(input, buffers->input, buffers->input_bytes)) == 1) {
        if (xct_run(session, buffers->input, buffers->input_bytes, buffers->output, buffers->output_bytes) != XCT_OK)
            return fail_session(session, options->bundle);
        if (fwrite(buffers->output, 1, buffers->output_bytes, output) != buffers->output_bytes)
            return fail(options->output, strerror(errno));
        images++;
    }
    if (got < 0) {
        char why[128];
        snprintf(why, sizeof why, "it is no whole number of images of %zu bytes, or cannot be read", buffers->input_bytes);
        return fail(options->input, why);
    }
    return images > 0 ? OK : fail(options->input, "it holds no image");
}

/* A device or a pipe cannot be replaced by a file that is renamed to its place. */
static bool is_special(const char *path)
{
    struct stat status;
    return stat(path, &status) == 0 && !S_ISREG(status.st_mode);
}

static int write_output(xct_session *session, struct buffers *buffers, FILE *input, const char *path,
                        const struct options *options)
{
    FILE *output = fopen(path, "wb");
    if (output == NULL)
        return fail(options->output, strerror(errno));
    int status = run_stream(session, buffers, input, output, options);
    if (fclose(output) != 0 && status == OK)
        status = fail(options->output, strerror(errno));
    return status;
}

/* The file is written beside its place and renamed, so that nobody takes half of it for the whole. */
static int write_aside(xct_session *session, struct buffers *buffers, FILE *input, const struct options *options)
{
    char aside[4096];
    int length = snprintf(aside, sizeof aside, "%s.part%ld", options->output, (long)getpid());
    if (length < 0 || (size_t)length >= sizeof aside)
        return fail(options->output, "the path is too long");
    int status = write_output(session, buffers, input, aside, options);
    if (status == OK && rename(aside, options->output) != 0)
        status = fail(options->output, strerror(errno));
    if (status != OK)
        remove(aside);
    return status;
}

static int run_files(xct_session *session, struct buffers *buffers, const struct options *options)
{
    bool from_standard = strcmp(options->input, "-") == 0;
    FILE *input = from_standard ? stdin : fopen(options->input, "rb");
    if (input == NULL)
        return fail(options->input, strerror(errno));
    int status;
    if (strcmp(options->output, "-") == 0)
        status = run_stream(session, buffers, input, stdout, options);
    else if (is_special(options->output))
        status = write_output(session, buffers, input, options->output, options);
    else
        status = write_aside(session, buffers, input, options);
    if (!from_standard)
        fclose(input);
    return status;
}

/* golden/NAME of the bundle; BUNDLE may be its native/ folder. */
static FILE *open_golden(const struct options *options, const char *name)
{
    static const char *const places[] = {"golden", "../golden"};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char path[4096];
        int length = snprintf(path, sizeof path, "%s/%s/%s", options->bundle, places[i], name);
        FILE *file = length > 0 && (size_t)length < sizeof path ? fopen(path, "rb") : NULL;
        if (file != NULL)
            return file;
    }
    return NULL;
}

static int compare(xct_session *session, struct buffers *buffers, FILE *input, FILE *expected,
                   const struct options *options)
{
    int tolerance = (int)xct_tolerance(session);
    unsigned long long images = 0, different = 0, bytes = 0;
    int got, want;
    for (;;) {
        got = read_image(input, buffers->input, buffers->input_bytes);
        want = read_image(expected, buffers->expected, buffers->output_bytes);
        if (got != 1 || want != 1)
            break;
        if (xct_run(session, buffers->input, buffers->input_bytes, buffers->output, buffers->output_bytes) != XCT_OK)
            return fail_session(session, options->bundle);
        unsigned long long wrong = 0;
        for (size_t i = 0; i < buffers->output_bytes; i++)
            wrong += abs((int8_t)buffers->output[i] - (int8_t)buffers->expected[i]) > tolerance;
        images++;
        different += wrong > 0;
        bytes += wrong;
    }
    if (got != 0 || want != 0 || images == 0)
        return fail(options->bundle, "golden/input.bin and golden/output.bin do not hold equally many whole images");
    if (different > 0) {
        fprintf(stderr, "xceptile-run: self-test FAILED: %llu of %llu outputs differ, in %llu bytes\n", different, images,
                bytes);
        return DIFFERENT;
    }
    if (tolerance > 0)
        fprintf(stderr, "self-test passed: %llu outputs, within %d steps: some layers are in float\n", images, tolerance);
    else
        fprintf(stderr, "self-test passed: %llu outputs, bit for bit\n", images);
    return OK;
}

static int self_test(xct_session *session, struct buffers *buffers, const struct options *options)
{
    FILE *input = open_golden(options, "input.bin"), *expected = open_golden(options, "output.bin");
    int status = input == NULL || expected == NULL
                     ? fail(options->bundle, "it has no golden/input.bin and golden/output.bin to test itself with")
                     : compare(session, buffers, input, expected, options);
    if (input != NULL)
        fclose(input);
    if (expected != NULL)
        fclose(expected);
    return status;
}

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* The fastest of many short runs of each step: a roof is what the machine can do. */
enum { ROOF_RUNS = 100 };

static int run_roof(xct_session *session, const char *folder, uint64_t fastest_ns[])
{
    struct buffers buffers = {0};
    uint32_t steps = xct_step_count(session);
    if (!allocate(session, &buffers))
        return fail(folder, "no memory to measure the machine's roof");
    int status = OK;
    for (int i = 0; i < ROOF_RUNS && status == OK; i++) {
        if (xct_run(session, buffers.input, buffers.input_bytes, buffers.output, buffers.output_bytes) != XCT_OK)
            status = fail_session(session, folder);
        xct_step_info step;
        for (uint32_t k = 0; k < steps && xct_step(session, k, &step) == XCT_OK; k++)
            if (i == 0 || step.last_ns < fastest_ns[k])
                fastest_ns[k] = step.last_ns;
    }
    free(buffers.input);
    free(buffers.output);
    free(buffers.expected);
    return status;
}

/* The rates of the roof's steps: bytes or, where it has any, multiply-accumulates in a nanosecond. */
static int print_roof_of(xct_session *session, const char *folder)
{
    uint32_t steps = xct_step_count(session);
    uint64_t *fastest_ns = calloc(steps > 0 ? steps : 1, sizeof *fastest_ns);
    int status = fastest_ns == NULL ? fail(folder, "no memory") : run_roof(session, folder, fastest_ns);
    if (status == OK) {
        printf(",\n \"roof\": {");
        xct_step_info step;
        for (uint32_t i = 0; i < steps && xct_step(session, i, &step) == XCT_OK; i++) {
            double ns = fastest_ns[i] > 0 ? (double)fastest_ns[i] : 1.0;
            printf("%s", i > 0 ? ", " : "");
            print_string(step.name);
            printf(step.macs > 0 ? ": {\"gmac_per_s\": %.6g}" : ": {\"gb_per_s\": %.6g}",
                   (double)(step.macs > 0 ? step.macs : step.bytes) / ns);
        }
        putchar('}');
    }
    free(fastest_ns);
    return status;
}

/* The machine's roof, where the bundle has the plan that measures it. */
static int print_roof(const struct options *options, uint32_t threads)
{
    static const char *const places[] = {"native/roof", "roof"};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char folder[4096], plan[4200];
        int length = snprintf(folder, sizeof folder, "%s/%s", options->bundle, places[i]);
        if (length < 0 || (size_t)length >= sizeof folder)
            continue;
        snprintf(plan, sizeof plan, "%s/plan.bin", folder);
        if (access(plan, F_OK) != 0)
            continue;
        const xct_options how = {
            .struct_bytes = sizeof how, .threads = threads, .core_mask = options->core_mask, .flags = XCT_TIME_STEPS,
        };
        xct_session *session = NULL;
        int status = xct_open(folder, &how, &session) == XCT_OK ? print_roof_of(session, folder)
                                                                : fail_session(session, folder);
        xct_close(session);
        return status;
    }
    return OK;
}

/* The most memory this process ever held (proc(5), VmHWM), 0 where the kernel does not say. Not getrusage's maximum:
 * that one counts what the parent held before it started this program. */
static unsigned long long peak_rss_bytes(void)
{
    FILE *file = fopen("/proc/self/status", "r");
    if (file == NULL)
        return 0;
    unsigned long long kibibytes = 0;
    char line[256];
    while (kibibytes == 0 && fgets(line, sizeof line, file) != NULL)
        if (strncmp(line, "VmHWM:", 6) == 0)
            kibibytes = strtoull(line + 6, NULL, 10);
    fclose(file);
    return kibibytes * 1024;
}

static int print_timings(xct_session *session, const struct options *options, const uint64_t *samples,
                          const uint64_t *step_samples)
{
    printf("{\"version\": \"%s\", \"device\": ", xct_version());
    print_string(xct_device(session));
    printf(", \"threads\": %u, \"warmup\": %u, \"arena_bytes\": %llu, \"peak_rss_bytes\": %llu,\n"
           " \"samples_ms\": ",
           xct_threads(session), options->warmup, (unsigned long long)xct_arena_bytes(session),
           peak_rss_bytes());
    print_samples(samples, options->repeat, 1);
    if (step_samples != NULL) {
        uint32_t steps = xct_step_count(session);
        printf(",\n \"steps\": [");
        xct_step_info step;
        for (uint32_t i = 0; i < steps && xct_step(session, i, &step) == XCT_OK; i++) {
            printf("%s\n  ", i > 0 ? "," : "");
            print_step(&step);
            printf(", \"samples_ms\": ");
            print_samples(step_samples + i, options->repeat, steps);
            putchar('}');
        }
        putchar(']');
    }
    int status = step_samples != NULL ? print_roof(options, xct_threads(session)) : OK;
    printf("}\n");
    return status;
}

static int time_runs(xct_session *session, struct buffers *buffers, const struct options *options, uint64_t *samples,
                     uint64_t *step_samples)
{
    uint32_t steps = xct_step_count(session);
    for (uint32_t i = 0; i < options->warmup + options->repeat; i++) {
        uint64_t start = now_ns();
        if (xct_run(session, buffers->input, buffers->input_bytes, buffers->output, buffers->output_bytes) != XCT_OK)
            return fail_session(session, options->bundle);
        uint64_t end = now_ns();
        if (i < options->warmup)
            continue;
        size_t sample = i - options->warmup;
        samples[sample] = end - start;
        xct_step_info step;
        for (uint32_t k = 0; step_samples != NULL && k < steps && xct_step(session, k, &step) == XCT_OK; k++)
            step_samples[sample * steps + k] = step.last_ns;
    }
    return OK;
}

static int measure(xct_session *session, struct buffers *buffers, const struct options *options)
{
    bool from_file = options->input != NULL && strcmp(options->input, "-") != 0;
    FILE *input = from_file ? fopen(options->input, "rb") : open_golden(options, "input.bin");
    if (input == NULL && from_file)
        return fail(options->input, strerror(errno));
    if (input == NULL)
        return fail(options->bundle, "nothing to time: it has no golden/input.bin, and no INPUT file is given");
    int got = read_image(input, buffers->input, buffers->input_bytes);
    fclose(input);
    if (got != 1)
        return fail(from_file ? options->input : "golden/input.bin", "it does not hold a whole image");
    uint64_t *samples = calloc(options->repeat, sizeof *samples);
    uint64_t *step_samples = NULL;
    if (options->layers)
        step_samples = calloc((size_t)options->repeat * xct_step_count(session), sizeof *step_samples);
    int status = samples == NULL || (options->layers && step_samples == NULL)
                     ? fail("--repeat", "no memory for so many samples")
                     : time_runs(session, buffers, options, samples, step_samples);
    if (status == OK)
        status = print_timings(session, options, samples, step_samples);
    free(samples);
    free(step_samples);
    return status;
}

static int run(xct_session *session, const struct options *options)
{
    struct buffers buffers = {0};
    int status = allocate(session, &buffers) ? OK : fail(options->bundle, "no memory for an image");
    if (status == OK && options->describe)
        describe(session);
    if (status == OK && options->self_test)
        status = self_test(session, &buffers, options);
    if (status == OK && options->output != NULL)
        status = run_files(session, &buffers, options);
    if (status == OK && options->repeat > 0)
        status = measure(session, &buffers, options);
    if (fflush(stdout) != 0 && status == OK)
        status = fail("standard output", strerror(errno));
    free(buffers.input);
    free(buffers.output);
    free(buffers.expected);
    return status;
}

/* The library restricts its own threads only; this one computes as well. */
static int restrict_to(uint64_t core_mask)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    for (unsigned i = 0; i < 64; i++)
        if (core_mask >> i & 1)
            CPU_SET(i, &set);
    return sched_setaffinity(0, sizeof set, &set) == 0 ? OK : fail("--cores", strerror(errno));
}

int main(int argc, char **argv)
{
    struct options options;
    int status = parse(argc, argv, &options);
    if (status >= 0)
        return status;
    if (options.core_mask != 0 && restrict_to(options.core_mask) != OK)
        return FAILED;
    const xct_options how = {
        .struct_bytes = sizeof how, .threads = options.threads, .core_mask = options.core_mask,
        .flags = options.layers ? XCT_TIME_STEPS : 0, .device = options.device,
    };
    xct_session *session = NULL;
    status = xct_open(options.bundle, &how, &session) == XCT_OK ? run(session, &options)
                                                                : fail_session(session, options.bundle);
    xct_close(session);
    return status;
}
