/* SHA-256 (FIPS 180-4). The round constants are the first 32 bits of the fractional parts of the cube roots of the
 * first 64 primes, the initial state those of the square roots of the first 8. */
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

#include "internal.h"

static const _Alignas(16) uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void blocks_in_c(uint32_t state[8], const uint8_t *data, size_t count)
{
    for (; count > 0; count--, data += 64) {
        uint32_t w[64];
        for (int i = 0; i < 16; i++) {
            uint32_t word;
            memcpy(&word, data + 4 * i, sizeof word);
            w[i] = __builtin_bswap32(word);
        }
        for (int i = 16; i < 64; i++) {
            uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
            uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int i = 0; i < 64; i++) {
            uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
            uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i];
            uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
            uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

/* Opening a bundle hashes all of its weights: the instructions that many processors have for it make that six times
 * shorter. Four rounds at a time; m holds the last sixteen words of the message schedule. */
#if defined(__x86_64__)

static bool has_instructions(void)
{
    uint32_t a, b7 = 0, c1 = 0, d, unused;
    (void)__get_cpuid(1, &a, &unused, &c1, &d);
    (void)__get_cpuid_count(7, 0, &a, &b7, &unused, &d);
    return (b7 >> 29 & 1) != 0 && (c1 & bit_SSE4_1) != 0 && (c1 & bit_SSSE3) != 0; /* SHA is bit 29 */
}

__attribute__((target("sha,sse4.1,ssse3"))) static void blocks_in_hardware(uint32_t state[8], const uint8_t *data,
                                                                            size_t count)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    /* The instructions want the state as (f, e, b, a) and (h, g, d, c), the first named lowest. */
    __m128i abef = _mm_set_epi32((int)state[0], (int)state[1], (int)state[4], (int)state[5]);
    __m128i cdgh = _mm_set_epi32((int)state[2], (int)state[3], (int)state[6], (int)state[7]);
    for (; count > 0; count--, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i m[4];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i < 4)
                m[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(data + 16 * i)), big_endian);
            else {
                __m128i previous = m[(i + 3) % 4], sum = _mm_sha256msg1_epu32(m[i % 4], m[(i + 1) % 4]);
                sum = _mm_add_epi32(sum, _mm_alignr_epi8(previous, m[(i + 2) % 4], 4));
                m[i % 4] = _mm_sha256msg2_epu32(sum, previous);
            }
            __m128i words = _mm_add_epi32(m[i % 4], _mm_load_si128((const __m128i *)(const void *)(K + 4 * i)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, words);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(words, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    uint32_t low[4], high[4];
    _mm_storeu_si128((__m128i *)(void *)low, abef);
    _mm_storeu_si128((__m128i *)(void *)high, cdgh);
    const uint32_t after[8] = {low[3], low[2], high[3], high[2], low[1], low[0], high[1], high[0]};
    memcpy(state, after, sizeof after);
}

#elif defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)

static bool has_instructions(void)
{
    return (getauxval(AT_HWCAP) >> 6 & 1) != 0; /* SHA2, arch/arm64/include/uapi/asm/hwcap.h */
}

__attribute__((target("+crypto"))) static void blocks_in_hardware(uint32_t state[8], const uint8_t *data, size_t count)
{
    uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
    for (; count > 0; count--, data += 64) {
        const uint32x4_t abcd_before = abcd, efgh_before = efgh;
        uint32x4_t m[4];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i < 4)
                m[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
            else
                m[i % 4] = vsha256su1q_u32(vsha256su0q_u32(m[i % 4], m[(i + 1) % 4]), m[(i + 2) % 4], m[(i + 3) % 4]);
            uint32x4_t words = vaddq_u32(m[i % 4], vld1q_u32(K + 4 * i)), abcd_old = abcd;
            abcd = vsha256hq_u32(abcd, efgh, words);
            efgh = vsha256h2q_u32(efgh, abcd_old, words);
        }
        abcd = vaddq_u32(abcd, abcd_before);
        efgh = vaddq_u32(efgh, efgh_before);
    }
    vst1q_u32(state, abcd);
    vst1q_u32(state + 4, efgh);
}

#else /* an older clang, such as the NDK's r25, has the intrinsics only where every processor is to have the instructions */

#define has_instructions() false
#define blocks_in_hardware blocks_in_c

#endif

static void blocks(uint32_t state[8], const uint8_t *data, size_t count)
{
    if (has_instructions())
        blocks_in_hardware(state, data, count);
    else
        blocks_in_c(state, data, count);
}

void xct_sha256_begin(struct xct_sha256 *hash)
{
    *hash = (struct xct_sha256){
        .state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19},
    };
}

void xct_sha256_add(struct xct_sha256 *hash, const void *data, size_t size)
{
    const uint8_t *bytes = data;
    size_t held = hash->size % 64;
    hash->size += size;
    if (size == 0) /* data may be NULL */
        return;
    if (held > 0) {
        size_t taken = size < 64 - held ? size : 64 - held;
        memcpy(hash->rest + held, bytes, taken);
        if (held + taken < 64)
            return;
        blocks(hash->state, hash->rest, 1);
        bytes += taken;
        size -= taken;
    }
    blocks(hash->state, bytes, size / 64);
    if (size % 64 > 0)
        memcpy(hash->rest, bytes + size / 64 * 64, size % 64);
}

void xct_sha256_end(struct xct_sha256 *hash, uint8_t digest[32])
{
    uint8_t tail[128] = {0};
    size_t rest = hash->size % 64;
    memcpy(tail, hash->rest, rest);
    tail[rest] = 0x80;
    size_t tail_blocks = rest < 56 ? 1 : 2;
    uint64_t bits = hash->size * 8;
    for (size_t i = 0; i < 8; i++)
        tail[64 * tail_blocks - 1 - i] = (uint8_t)(bits >> 8 * i);
    blocks(hash->state, tail, tail_blocks);
    for (size_t i = 0; i < 32; i++)
        digest[i] = (uint8_t)(hash->state[i / 4] >> (24 - 8 * (i % 4)));
}

void xct_sha256(const void *data, size_t size, uint8_t digest[32])
{
    struct xct_sha256 hash;
    xct_sha256_begin(&hash);
    xct_sha256_add(&hash, data, size);
    xct_sha256_end(&hash, digest);
}
