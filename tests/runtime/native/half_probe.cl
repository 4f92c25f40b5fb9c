// After the OpenCL preamble: what an OpenCL device would bring, and its float16 functions on arrays.
#define OVERLOADABLE __attribute__((overloadable))

OVERLOADABLE float2 convert_float2(half2 x) { return __builtin_convertvector(x, float2); }
OVERLOADABLE float4 convert_float4(half4 x) { return __builtin_convertvector(x, float4); }
OVERLOADABLE float8 convert_float8(half8 x) { return __builtin_convertvector(x, float8); }
OVERLOADABLE half2 convert_half2_rte(float2 x) { return __builtin_convertvector(x, half2); }
OVERLOADABLE half8 convert_half8_rte(float8 x) { return __builtin_convertvector(x, half8); }

OVERLOADABLE half4 fma(half4 a, half4 b, half4 c) {
  return (half4)(__builtin_fmaf16(a.s0, b.s0, c.s0), __builtin_fmaf16(a.s1, b.s1, c.s1),
                 __builtin_fmaf16(a.s2, b.s2, c.s2), __builtin_fmaf16(a.s3, b.s3, c.s3));
}

// x: eight halves each; w: eight of each of four channels, two by two; sums: four channels each.
void half_probe(int count, const int4 *x, const int4 *w, float4 *sums, float4 *plain_sums, int4 *tripled) {
  for (int i = 0; i < count; i++) {
    sums[i] = xct_dot16h(x[i], w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3], (float4)(0.5f));
    plain_sums[i] = xct_dot4x4h(x[i].s0, w[4 * i], (float4)(0.5f));
    tripled[i] = xct_pack_eight(xct_eight(x[i]) * 3.0f);
  }
}
