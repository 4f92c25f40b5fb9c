/* Feeds half_probe.cl: COUNT vectors from the standard input, its results to the standard output. */
#include <stdint.h>
#include <stdio.h>

enum { COUNT = 64 };

void half_probe(int count, const void *x, const void *w, void *sums, void *plain_sums, void *tripled);

int main(void)
{
    static _Alignas(16) uint8_t x[COUNT * 16], w[COUNT * 64], results[3][COUNT * 16];
    if (fread(x, sizeof x, 1, stdin) != 1 || fread(w, sizeof w, 1, stdin) != 1)
        return 1;
    half_probe(COUNT, x, w, results[0], results[1], results[2]);
    return fwrite(results, sizeof results, 1, stdout) != 1;
}
