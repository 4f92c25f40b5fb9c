// What the generated kernels call. No header is included and no library is linked, so that every NVRTC from CUDA 10.2
// on (JetPack 4) compiles this file as it is. A word holds four int8 or two float16 values, the first in its low bits.

#define XCT static __device__ __forceinline__

#ifndef XCT_ON_CPU  // tests/native/cuda_on_cpu.h defines these by what the PTX ISA says of them

#define XCT_SM(n) (__CUDA_ARCH__ >= (n) * 10)

XCT void xct_sync() { __syncthreads(); }

XCT int xct_perm(int a, int b, int selector) { return __byte_perm(a, b, selector); }

XCT int xct_shuffle(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// A permutation of bytes in which a digit from 8 on stands for a byte's sign, eight times.
XCT int xct_perm_signs(int word, int selector) {
    int result;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(word), "r"(selector));
    return result;
}

// Bytes 2 half and 2 half + 1 of a word, as two int16: one instruction.
XCT int xct_pair(int word, int half) { return xct_perm_signs(word, half ? 0xb3a2 : 0x9180); }

// c + the product of the two lower or of the two upper int16: on Maxwell and Pascal one instruction at full rate, XMAD,
// which takes either half of a register. (Of int32, or of bytes, ptxas makes three and more.)
XCT int xct_mad_s16(int a, int b, int half, int c) {
    int d;
    if (half)
        asm("{ .reg .s16 p, q, r, s; mov.b32 {p, q}, %1; mov.b32 {r, s}, %2; mad.wide.s16 %0, q, s, %3; }"
            : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else
        asm("{ .reg .s16 p, q, r, s; mov.b32 {p, q}, %1; mov.b32 {r, s}, %2; mad.wide.s16 %0, p, r, %3; }"
            : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// c + the sum of the products of four int8. dp4a begins with sm_61, but the TX2 (sm_62) has none: there ptxas would make
// it of bytes cut out one by one.
XCT int xct_dot4(int a, int b, int c) {
#if XCT_SM(70)
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    for (int i = 0; i < 4; i++) c = xct_mad_s16(xct_pair(a, i / 2), xct_pair(b, i / 2), i % 2, c);
    return c;
#endif
}

// Bit by bit what the table says of a, b, c: the same expression of 0xf0, 0xcc, 0xaa.
template <int table>
XCT int xct_lop3(int a, int b, int c) {
    int d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(table & 0xff));
    return d;
}

// Four int32 as int8, the nearest.
XCT int xct_pack4_nearest(int a, int b, int c, int d) {
#if XCT_SM(80)  // from 7.2 on, but in a PTX newer than the other kernels need there
    int word;
    asm("{ .reg .b32 high; cvt.pack.sat.s8.s32.b32 high, %4, %3, 0; cvt.pack.sat.s8.s32.b32 %0, %2, %1, high; }"
        : "=r"(word) : "r"(a), "r"(b), "r"(c), "r"(d));
    return word;
#else
    a = max(min(a, 127), -128), b = max(min(b, 127), -128), c = max(min(c, 127), -128), d = max(min(d, 127), -128);
    return xct_perm(xct_perm(a, b, 0x0040), xct_perm(c, d, 0x0040), 0x5410);
#endif
}

XCT float xct_half_to_float(int half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((short)half));
    return value;
}

XCT int xct_float_to_half(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

// Where a pointer points in shared memory, as the instructions below take it.
XCT int xct_shared_address(const void* p) {
    int address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(p));
    return address;
}

#if XCT_SM(80)
// 16 bytes from global to shared memory, zeros where not valid; complete after commit and wait.
XCT void xct_copy16(int shared, const void* global, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(valid ? 16 : 0) : "memory");
}

XCT void xct_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most 0, 1, 2 of the youngest groups are under way.
XCT void xct_wait_0() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
XCT void xct_wait_1() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
XCT void xct_wait_2() { asm volatile("cp.async.wait_group 2;" ::: "memory"); }

// Four 8 x 16-byte matrices; lane l points at row l % 8 of matrix l / 8.
XCT void xct_ldmatrix(int* d, int shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared) : "memory");
}

XCT void xct_mma_s8(int* c, const int* a, const int* b) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

XCT void xct_mma_f16(float* c, const int* a, const int* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#if XCT_SM(72)
// A fragment's layout is the hardware's own: what is loaded by these can be used by these alone. Strides in elements.
XCT void xct_wmma_load_a_s8(int* d, const void* shared, int stride) {
    asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.s8 {%0, %1}, [%2], %3;"
                 : "=r"(d[0]), "=r"(d[1]) : "r"(xct_shared_address(shared)), "r"(stride) : "memory");
}

XCT void xct_wmma_load_b_s8(int* d, const void* shared, int stride) {
    asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.s8 {%0, %1}, [%2], %3;"
                 : "=r"(d[0]), "=r"(d[1]) : "r"(xct_shared_address(shared)), "r"(stride) : "memory");
}

XCT void xct_wmma_s8(int* c, const int* a, const int* b) {
    asm volatile("wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}

XCT void xct_wmma_store_s32(void* shared, const int* c, int stride) {
    asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.s32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(
                     xct_shared_address(shared)),
                 "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]), "r"(c[5]), "r"(c[6]), "r"(c[7]), "r"(stride)
                 : "memory");
}

XCT void xct_wmma_load_a_f16(int* d, const void* shared, int stride) {
    asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]), "=r"(d[4]), "=r"(d[5]), "=r"(d[6]), "=r"(d[7])
                 : "r"(xct_shared_address(shared)), "r"(stride) : "memory");
}

XCT void xct_wmma_load_b_f16(int* d, const void* shared, int stride) {
    asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]), "=r"(d[4]), "=r"(d[5]), "=r"(d[6]), "=r"(d[7])
                 : "r"(xct_shared_address(shared)), "r"(stride) : "memory");
}

XCT void xct_wmma_f16(float* c, const int* a, const int* b) {
    asm volatile("wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
                 "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
                 "{%0, %1, %2, %3, %4, %5, %6, %7};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]), "r"(b[0]),
                   "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]), "r"(b[6]), "r"(b[7]));
}

XCT void xct_wmma_store_f32(void* shared, const float* c, int stride) {
    asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(
                     xct_shared_address(shared)),
                 "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "f"(c[4]), "f"(c[5]), "f"(c[6]), "f"(c[7]), "r"(stride)
                 : "memory");
}
#endif
#endif  // XCT_ON_CPU

XCT int xct_load4(const void* p) { return *(const int*)p; }

XCT float xct_load_float(const void* p) { return *(const float*)p; }

XCT void xct_store4(void* p, int value) { *(int*)p = value; }

XCT void xct_store_float(void* p, float value) { *(float*)p = value; }

XCT void xct_load8(int* d, const void* p) {
    const int2 v = *(const int2*)p;
    d[0] = v.x, d[1] = v.y;
}

XCT void xct_load16(int* d, const void* p) {
    const int4 v = *(const int4*)p;
    d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
}

XCT void xct_load16_f32(float* d, const void* p) {
    int v[4];
    xct_load16(v, p);
    for (int i = 0; i < 4; i++) d[i] = __int_as_float(v[i]);
}

XCT void xct_load16_if(int* d, const void* p, int valid) {
    int4 v = {0, 0, 0, 0};
    if (valid) v = *(const int4*)p;
    d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
}

XCT void xct_store8(void* p, const int* s) {
    const int2 v = {s[0], s[1]};
    *(int2*)p = v;
}

XCT void xct_store16(void* p, const int* s) {
    const int4 v = {s[0], s[1], s[2], s[3]};
    *(int4*)p = v;
}

XCT int xct_byte(int word, int i) { return xct_perm_signs(word, 0x8880 + 0x1111 * i); }

XCT int xct_mad(int a, int b, int c) { return (unsigned)a * (unsigned)b + (unsigned)c; }

XCT int xct_pack4(int a, int b, int c, int d) {
    return xct_perm(xct_perm(a, b, 0x0040), xct_perm(c, d, 0x0040), 0x5410);
}

// The larger of each pair of int8, in six instructions: the lower seven bits are compared by a subtraction in which no
// byte borrows from the next, and decide where the signs are equal. (From the operators ptxas makes up to eight.)
XCT int xct_max4(int a, int b) {
    const int lower = (a | 0x80808080) - (b & 0x7f7f7f7f);
    const int a_wins = xct_perm_signs(xct_lop3<(~0xf0 & 0xcc) | (~(0xf0 ^ 0xcc) & 0xaa)>(a, b, lower), 0xba98);
    return xct_lop3<(0xf0 & 0xaa) | (0xcc & ~0xaa)>(a, b, a_wins);
}

XCT float xct_half(int word, int i) { return xct_half_to_float(i ? (unsigned)word >> 16 : word); }

XCT int xct_pack2(float a, float b) { return xct_float_to_half(a) & 0xffff | xct_float_to_half(b) << 16; }

XCT float xct_mad_f16(int a, int b, int half, float c) { return __fmaf_rn(xct_half(a, half), xct_half(b, half), c); }

XCT float xct_dot2_f16(int a, int b, float c) { return xct_mad_f16(a, b, 1, xct_mad_f16(a, b, 0, c)); }

XCT int xct_dot2_s16(int a, int b, int c) { return xct_mad_s16(a, b, 1, xct_mad_s16(a, b, 0, c)); }

XCT int xct_relu2(int word) { return word & ~xct_perm_signs(word, 0xbb99); }

XCT int xct_max2(int a, int b) {
    return xct_pack2(fmaxf(xct_half(a, 0), xct_half(b, 0)), fmaxf(xct_half(a, 1), xct_half(b, 1)));
}

// clamp(rint(f32(f32(acc) * m)), low, high) + 0x4b400000. Both bounds are integers, so clamping first is the same; adding
// 1.5 * 2^23 then rounds to the nearest even integer, which lies in the low bits of the sum. One rounding each: no
// contraction to a fused multiply-add may happen here (--fmad=false, and __fmul_rn is never contracted).
XCT int xct_scale_bits(int acc, float m, int low, int high) {
    float y = __fmul_rn(__int2float_rn(acc), m);
    y = fminf(fmaxf(y, __int2float_rn(low)), __int2float_rn(high));
    return __float_as_int(__fadd_rn(y, 12582912.0f));
}

XCT int xct_scale(int acc, float m, int low, int high, int zero) {
    return xct_scale_bits(acc, m, low, high) - 0x4b400000 + zero;
}

// Four of them as a word. Each is within int8, so that 128 more is a digit to the base of 256: the digits are summed, what
// is too much in them is taken back once, and the 128 by the sign bits.
XCT int xct_scale4(int a, int b, int c, int d, float m, float n, float o, float p, int low, int high, int zero) {
    int word = xct_mad(zero + 128, 0x01010101, xct_scale_bits(a, m, low, high) - 0x8b400000);
    word = xct_mad(xct_scale_bits(b, n, low, high), 1 << 8, word);
    word = xct_mad(xct_scale_bits(c, o, low, high), 1 << 16, word);
    return xct_mad(xct_scale_bits(d, p, low, high), 1 << 24, word) ^ 0x80808080;
}

XCT float xct_sum_warp_f32(float value) {
    for (int mask = 16; mask; mask >>= 1) value += __int_as_float(xct_shuffle(__float_as_int(value), mask));
    return value;
}

XCT int xct_sum_warp_s32(int value) {
    for (int mask = 16; mask; mask >>= 1) value += xct_shuffle(value, mask);
    return value;
}
