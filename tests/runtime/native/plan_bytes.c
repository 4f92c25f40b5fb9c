/* Reads a plan file from standard input and puts every other value in the place of each of its bytes. For each byte, two
 * counts (u32): how many values the parser accepts as they are (of two), and how many with the hash made right. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static bool accepts(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size);
    if (copy == NULL)
        abort();
    memcpy(copy, data, size);
    struct xct_plan plan;
    struct xct_error error = {0};
    int code = xct_plan_parse(&plan, copy, size, &error);
    xct_plan_free(&plan);
    return code == XCT_OK;
}

int main(void)
{
    static uint8_t data[1 << 16];
    const size_t hash = offsetof(struct xct_plan_header, plan_sha256), hashed = offsetof(struct xct_plan_header, file_bytes);
    size_t size = fread(data, 1, sizeof data, stdin);
    if (size < sizeof(struct xct_plan_header) || !accepts(data, size))
        return 1;
    for (size_t position = 0; position < size; position++) {
        uint32_t accepted[2] = {0, 0};
        const uint8_t kept = data[position];
        uint8_t digest[32];
        memcpy(digest, data + hash, sizeof digest);
        for (int value = 0; value < 256; value++) {
            data[position] = (uint8_t)value;
            if (value == kept)
                continue;
            if (value == (kept ^ 1) || value == (kept ^ 0x80)) /* any: the hash is that of the whole */
                accepted[0] += accepts(data, size);
            if (position < hash || position >= hashed) {
                xct_sha256(data + hashed, size - hashed, data + hash);
                accepted[1] += accepts(data, size);
                memcpy(data + hash, digest, sizeof digest);
            }
        }
        data[position] = kept;
        fwrite(accepted, sizeof accepted, 1, stdout);
    }
    return 0;
}
