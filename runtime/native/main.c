/* xceptile-run: runs a bundle on this machine. It uses xceptile.h only, so it is an example of its use as well. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
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
    "int8 NHWC tensor, which xct_quantize_pixels makes of 8-bit pixels (xceptile.h): by the bundle's table of pixels\n"
    "where it has one, else pixel - 128. OUTPUT gets one output tensor after the other. With --repeat, INPUT alone is\n"
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

/* How many bytes the character at text has if a terminal could obey it, else 0; code is its number. They are the
 * controls (but tabs and ends of lines), the separators and what turns the direction of text, as in models/visible.py. */
static int is_control(const unsigned char *text, unsigned *code)
{
    *code = text[0];
    if (*code < 0x20 || *code == 0x7f)
        return *code != '\n' && *code != '\t' ? 1 : 0;
    if (text[0] == 0xc2 && text[1] >= 0x80 && text[1] < 0xa0) { /* UTF-8 from here on */
        *code = text[1];
        return 2;
    }
    if (text[0] != 0xe2 || (text[1] != 0x80 && text[1] != 0x81) || text[2] < 0x80 || text[2] > 0xbf)
        return 0;
    *code = 0x2000 | (text[1] & 0x3fu) << 6 | (text[2] & 0x3fu);
    return (*code >= 0x2028 && *code <= 0x202e) || (*code >= 0x2066 && *code <= 0x2069) ? 3 : 0;
}

/* What a file is called, or a driver says, is shown and never obeyed. */
static void print_visible(const char *text)
{
    for (const unsigned char *next = (const unsigned char *)text; *next != 0;) {
        unsigned code;
        int length = is_control(next, &code);
        if (length == 0)
            fputc(*next, stderr);
        else
            fprintf(stderr, code < 0x100 ? "\\x%02x" : "\\u%04x", code);
        next += length > 0 ? length : 1;
    }
}

static int fail(const char *what, const char *why)
{
    fputs("xceptile-run: ", stderr);
    print_visible(what);
    fputs(": ", stderr);
    print_visible(why);
    fputc('\n', stderr);
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
    opterr = 0; /* what it would print, it prints as it is */
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
        default: return fail(argv[optind - 1], "not an option, or its value is missing, see --help");
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

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Which of this program's standard streams the file is, under whatever name: NULL for another. */
static FILE *standard_stream(const struct stat *file)
{
    struct stat own;
    if (fstat(STDOUT_FILENO, &own) == 0 && same_file(file, &own))
        return stdout;
    return fstat(STDERR_FILENO, &own) == 0 && same_file(file, &own) ? stderr : NULL;
}

/* Where a link leads: from malloc; NULL if there is no memory, or no link. */
static char *linked(const char *path)
{
    char target[4096];
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (length < 0)
        return NULL;
    target[length] = 0;
    const char *slash = strrchr(path, '/');
    size_t folder = target[0] == '/' || slash == NULL ? 0 : (size_t)(slash - path) + 1;
    char *end = malloc(folder + (size_t)length + 1);
    if (end != NULL) {
        memcpy(end, path, folder);
        memcpy(end + folder, target, (size_t)length + 1);
    }
    return end;
}

/* The plain file that path leads to, or would be if it were there, from malloc. NULL: it cannot be another one, being a
 * device, a pipe, or a file without a name; then errno is 0; or it cannot be found. */
static char *end_of(const char *path)
{
    struct stat found, end;
    bool exists = stat(path, &found) == 0;
    if (!exists && errno != ENOENT)
        return NULL;
    errno = 0;
    if (exists && !S_ISREG(found.st_mode))
        return NULL;
    char *last = strdup(path);
    for (int links = 0; last != NULL && links < 40; links++) { /* as Linux follows; stat has found no loop */
        char *next = linked(last);
        if (next == NULL)
            break;
        free(last);
        last = next;
    }
    if (last != NULL && exists && (stat(last, &end) != 0 || !same_file(&found, &end))) {
        free(last);
        last = NULL;
        errno = 0;
    }
    return last;
}

static int write_output(xct_session *session, struct buffers *buffers, FILE *input, const char *path, const char *mode,
                        const struct options *options)
{
    FILE *output = fopen(path, mode);
    if (output == NULL)
        return fail(options->output, strerror(errno));
    int status = run_stream(session, buffers, input, output, options);
    if (fclose(output) != 0 && status == OK)
        status = fail(options->output, strerror(errno));
    return status;
}

/* The file is written beside its place and renamed, so that nobody takes half of it for the whole. */
static int write_aside(xct_session *session, struct buffers *buffers, FILE *input, const char *end,
                       const struct options *options)
{
    char aside[4096];
    int length = snprintf(aside, sizeof aside, "%s.part%ld", end, (long)getpid());
    if (length < 0 || (size_t)length >= sizeof aside)
        return fail(options->output, "the path is too long");
    (void)remove(aside); /* of a process that was killed */
    int status = write_output(session, buffers, input, aside, "wbx", options);
    if (status == OK && rename(aside, end) != 0)
        status = fail(options->output, strerror(errno));
    if (status != OK)
        remove(aside);
    return status;
}

/* Links are followed; nothing else takes the place of a device, a pipe or a standard stream. */
static int write_results(xct_session *session, struct buffers *buffers, FILE *input, const struct options *options)
{
    struct stat found;
    FILE *stream = strcmp(options->output, "-") == 0 ? stdout : NULL;
    if (stream == NULL && stat(options->output, &found) == 0)
        stream = standard_stream(&found);
    if (stream != NULL)
        return run_stream(session, buffers, input, stream, options);
    char *end = end_of(options->output);
    if (end == NULL && errno != 0)
        return fail(options->output, strerror(errno));
    int status = end == NULL ? write_output(session, buffers, input, options->output, "wb", options)
                             : write_aside(session, buffers, input, end, options);
    free(end);
    return status;
}

static int run_files(xct_session *session, struct buffers *buffers, const struct options *options)
{
    bool from_standard = strcmp(options->input, "-") == 0;
    FILE *input = from_standard ? stdin : fopen(options->input, "rb");
    if (input == NULL)
        return fail(options->input, strerror(errno));
    int status = write_results(session, buffers, input, options);
    if (!from_standard)
        fclose(input);
    return status;
}

/* Whether there is no such file; one that only cannot be had counts as there, and opening it says why. */
static bool is_absent(const char *path)
{
    return access(path, F_OK) != 0 && (errno == ENOENT || errno == ENOTDIR);
}

static int open_plain(const char *path, FILE **file)
{
    struct stat status;
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO is refused, not waited for */
    if (descriptor < 0 || fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
        int failed = fail(path, descriptor < 0 ? strerror(errno) : "is no regular file");
        if (descriptor >= 0)
            close(descriptor);
        return failed;
    }
    *file = fdopen(descriptor, "rb");
    if (*file != NULL)
        return OK;
    close(descriptor);
    return fail(path, "no memory to read it");
}

/* golden/NAME of the bundle; BUNDLE may be its native/ folder. *file is NULL if there is none. */
static int open_golden(const struct options *options, const char *name, FILE **file)
{
    static const char *const places[] = {"golden", "../golden"};
    *file = NULL;
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char path[4096];
        int length = snprintf(path, sizeof path, "%s/%s/%s", options->bundle, places[i], name);
        if (length < 0 || (size_t)length >= sizeof path)
            return fail(options->bundle, "the path is too long");
        if (!is_absent(path))
            return open_plain(path, file);
    }
    return OK;
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
    if (ferror(input) || ferror(expected))
        return fail(options->bundle, "golden/input.bin or golden/output.bin cannot be read to its end");
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
    FILE *input = NULL, *expected = NULL;
    int status = open_golden(options, "input.bin", &input);
    if (status == OK)
        status = open_golden(options, "output.bin", &expected);
    if (status == OK)
        status = input == NULL || expected == NULL
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
        if (is_absent(plan))
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
    FILE *input = from_file ? fopen(options->input, "rb") : NULL;
    if (input == NULL && from_file)
        return fail(options->input, strerror(errno));
    if (!from_file && open_golden(options, "input.bin", &input) != OK)
        return FAILED;
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

/* Whatever was printed has arrived, or the status says that it has not. */
static int finish(int status)
{
    errno = 0;
    bool lost = fflush(stdout) != 0 || ferror(stdout) != 0;
    lost = lost || (fclose(stdout) != 0 && errno != EBADF); /* closed from the start, and not used */
    return lost && status == OK ? fail("standard output", errno != 0 ? strerror(errno) : "cannot be written") : status;
}

static int run_bundle(const struct options *options)
{
    if (options->core_mask != 0 && restrict_to(options->core_mask) != OK)
        return FAILED;
    const xct_options how = {
        .struct_bytes = sizeof how, .threads = options->threads, .core_mask = options->core_mask,
        .flags = options->layers ? XCT_TIME_STEPS : 0, .device = options->device,
    };
    xct_session *session = NULL;
    int status = xct_open(options->bundle, &how, &session) == XCT_OK ? run(session, options)
                                                                     : fail_session(session, options->bundle);
    xct_close(session);
    return status;
}

int main(int argc, char **argv)
{
    struct options options;
    (void)signal(SIGXFSZ, SIG_IGN); /* then a file that may grow no more is an error as others are */
    int status = parse(argc, argv, &options);
    return finish(status >= 0 ? status : run_bundle(&options));
}
