/* Reads plan files from standard input, each behind its length (u32), and writes what the runtime's parser says of
 * each: '1' sound, '0' not. A sound plan is then walked as the runtime walks it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static uint64_t walk(const struct xct_plan *plan)
{
    const struct xct_plan_header *header = plan->header;
    uint64_t sum = 0;
    for (uint32_t i = 0; i < header->tensor_count; i++)
        sum += strlen(plan->strings + plan->tensors[i].name) + xct_plan_tensor_bytes(&plan->tensors[i]);
    for (uint32_t i = 0; i < header->feature_count; i++)
        sum += strlen(plan->strings + plan->features[i]);
    for (uint32_t i = 0; i < header->step_count; i++) {
        const struct xct_plan_step *step = &plan->steps[i];
        sum += strlen(plan->strings + step->name) + strlen(plan->strings + step->path);
        sum += strlen(plan->strings + plan->kernels[step->kernel]);
        for (uint32_t k = 0; k < step->argument_count; k++)
            sum += xct_dtype_of(plan->arguments[step->first_argument + k].dtype)->bytes;
    }
    return sum;
}

int main(void)
{
    uint32_t size;
    uint64_t sum = 0;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        void *data = malloc(size > 0 ? size : 1);
        if (data == NULL || (size > 0 && fread(data, size, 1, stdin) != 1))
            return 1;
        struct xct_plan plan;
        struct xct_error error = {0};
        int code = xct_plan_parse(&plan, data, size, &error);
        if (code == XCT_OK)
            sum += walk(&plan);
        else if (error.code != code || error.message[0] == 0)
            return 2;
        xct_plan_free(&plan);
        putchar(code == XCT_OK ? '1' : '0');
    }
    return sum == 1; /* the walk must not be optimised away */
}
