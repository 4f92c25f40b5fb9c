/* Kernels written by hand with the ABI of those that TVM makes, so that the runtime can be tested without TVM. Each one
 * checks what it is handed, and reports what is wrong the way TVM's code does. */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    int32_t type_index;
    uint32_t zero_padding;
    union {
        int64_t integer;
        DLTensor *tensor;
    } value;
} TVMFFIAny;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

EXPORT void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
EXPORT int (*__TVMBackendFreeWorkspace)(int, int, void *);
EXPORT int (*__TVMBackendParallelLaunch)(int (*)(int, void *, void *), void *, int);

static int raise(const char *what)
{
    const char *parts[] = {"expected ", what, NULL, "!"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 4);
    return -1;
}

/* Operands are int8 and 1-D, the last two arguments a range of tasks. */
static const char *wrong(const TVMFFIAny *args, int32_t count, int32_t operands)
{
    if (count != operands + 2)
        return "another number of arguments";
    for (int32_t i = 0; i < operands; i++) {
        const DLTensor *t = args[i].value.tensor;
        if (args[i].type_index != 7 || args[i].zero_padding != 0)
            return "a tensor";
        if (t->ndim != 1 || t->device_type != 1 || t->device_id != 0 || t->byte_offset != 0 || t->strides[0] != 1)
            return "a flat buffer of the CPU";
        if (t->code != 0 || t->bits != 8 || t->lanes != 1)
            return "int8";
        if ((uintptr_t)t->data % 64 != 0)
            return "an aligned buffer";
    }
    for (int32_t i = operands; i < count; i++)
        if (args[i].type_index != 1)
            return "an integer";
    if (args[operands].value.integer < 0 || args[operands].value.integer >= args[operands + 1].value.integer)
        return "a range of tasks";
    return NULL;
}

/* y[i] = x[i] + w[i % count of w], a task for each element of y. */
EXPORT int __tvm_ffi_add_weights(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)
{
    (void)self, (void)result;
    const char *why = wrong(args, count, 3);
    if (why != NULL)
        return raise(why);
    const DLTensor *x = args[0].value.tensor, *w = args[1].value.tensor, *y = args[2].value.tensor;
    for (int64_t i = args[3].value.integer; i < args[4].value.integer; i++)
        ((int8_t *)y->data)[i] = (int8_t)(((int8_t *)x->data)[i] + ((int8_t *)w->data)[i % w->shape[0]]);
    return 0;
}

/* y[i] = the sum of the elements of x whose index is i modulo the count of y, in a workspace of its own. */
EXPORT int __tvm_ffi_fold(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)
{
    (void)self, (void)result;
    const char *why = wrong(args, count, 2);
    if (why != NULL)
        return raise(why);
    const DLTensor *x = args[0].value.tensor, *y = args[1].value.tensor;
    int32_t *sums = __TVMBackendAllocWorkspace(1, 0, (uint64_t)y->shape[0] * 4, 0, 32);
    if (sums == NULL)
        return raise("a workspace");
    for (int64_t i = args[2].value.integer; i < args[3].value.integer; i++) {
        sums[i] = 0;
        for (int64_t k = i; k < x->shape[0]; k += y->shape[0])
            sums[i] += ((int8_t *)x->data)[k];
        ((int8_t *)y->data)[i] = (int8_t)sums[i];
    }
    return __TVMBackendFreeWorkspace(1, 0, sums);
}

/* Copies, and refuses an input that holds a -128. */
EXPORT int __tvm_ffi_refuse(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)
{
    (void)self, (void)result;
    const char *why = wrong(args, count, 2);
    if (why != NULL)
        return raise(why);
    const DLTensor *x = args[0].value.tensor, *y = args[1].value.tensor;
    for (int64_t i = args[2].value.integer; i < args[3].value.integer; i++) {
        if (((int8_t *)x->data)[i] == -128)
            return raise("no -128");
        ((int8_t *)y->data)[i] = ((int8_t *)x->data)[i];
    }
    return 0;
}

/* Wants threads from the runtime, which has none to give. */
EXPORT int __tvm_ffi_parallel(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)
{
    (void)self, (void)args, (void)count, (void)result;
    return __TVMBackendParallelLaunch(NULL, NULL, 0) == 0 ? 0 : raise("threads");
}
