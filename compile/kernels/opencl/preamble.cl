// What the generated kernels below call. Build options:
//   -DXCT_DOT=n    how four products of signed bytes are summed; the arithmetic is the same, bit for bit:
//      0  plain OpenCL C 1.2
//      1  cl_khr_integer_dot_product; a device may want -cl-std=CL3.0 for it
//      2  cl_arm_integer_dot_product_accumulate_int8
//      3  cl_qcom_dot_product8, whose qcom_dot8_acc multiplies signed by unsigned bytes; wants -cl-std=CL2.0
//   -DXCT_FP16=1   the device has cl_khr_fp16: products of the float16 kernels are computed in half, else in float
// A device may announce an extension and refuse to compile it: build again with 0 then.
//
// The integer contract asks for a conversion of int to float and a product, each correctly rounded to nearest even,
// and for rint. OpenCL gives that with CL_FP_ROUND_TO_NEAREST, which an embedded profile may lack. No option that
// relaxes arithmetic may be given (-cl-fast-relaxed-math, -cl-mad-enable, -cl-unsafe-math-optimizations).
#pragma OPENCL FP_CONTRACT OFF

#ifndef XCT_DOT
#define XCT_DOT 0
#endif
#ifndef XCT_FP16
#define XCT_FP16 0
#endif

#if XCT_FP16
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#endif
#if XCT_DOT == 1 && defined(cl_khr_integer_dot_product)
#pragma OPENCL EXTENSION cl_khr_integer_dot_product : enable
#elif XCT_DOT == 2
#pragma OPENCL EXTENSION cl_arm_integer_dot_product_accumulate_int8 : enable
#elif XCT_DOT == 3
#pragma OPENCL EXTENSION cl_qcom_dot_product8 : enable
#endif

// acc plus the sum of four products. x: activations, w: weights, four signed bytes each. No sum that begins with
// xct_start leaves int32, in any order: the quantizer proves sum |w| * 256 + |bias| to fit.
static int xct_dot4(int x, int w, int acc) {
#if XCT_DOT == 1
  return acc + dot_4x8packed_ss_int(as_uint(x), as_uint(w));
#elif XCT_DOT == 2
  return arm_dot_acc(as_char4(x), as_char4(w), acc);
#elif XCT_DOT == 3
  // Activations as unsigned bytes, x + 128; xct_start takes the excess off.
  return qcom_dot8_acc(as_uint(w), as_uint(x) ^ 0x80808080u, acc);
#else
  int4 p = convert_int4(as_char4(x)) * convert_int4(as_char4(w));
  return acc + ((p.s0 + p.s1) + (p.s2 + p.s3));
#endif
}

// What sums over xct_dot4 begin with: biases, and the sums of the channels' weights.
static int4 xct_start(int4 bias, int4 weight_sum) {
#if XCT_DOT == 3
  return bias - 128 * weight_sum;
#else
  return bias;
#endif
}

// Four output channels: four weights of each against the same four activations.
static int4 xct_dot4x4(int x, int4 w, int4 acc) {
  return (int4)(xct_dot4(x, w.s0, acc.s0), xct_dot4(x, w.s1, acc.s1), xct_dot4(x, w.s2, acc.s2),
                xct_dot4(x, w.s3, acc.s3));
}

static int4 xct_dot16(int4 x, int4 w0, int4 w1, int4 w2, int4 w3, int4 acc) {
  acc = xct_dot4x4(x.s0, w0, acc);
  acc = xct_dot4x4(x.s1, w1, acc);
  acc = xct_dot4x4(x.s2, w2, acc);
  return xct_dot4x4(x.s3, w3, acc);
}

// Channel by channel. Both factors fit 24 bits.
static int4 xct_mac4(int x, int w, int4 acc) {
  return mad24(convert_int4(as_char4(x)), convert_int4(as_char4(w)), acc);
}

// clamp(rint(f32(f32(acc) * m)) + zero, low, 127). Clamped as float first: what is beyond int does not convert.
static int xct_finish4(int4 acc, float4 m, int zero, int low) {
  float4 scaled = rint(convert_float4_rte(acc) * m);
  scaled = clamp(scaled, (float4)((float)(low - zero)), (float4)((float)(127 - zero)));
  return as_int(convert_char4(convert_int4(scaled) + zero));
}

static int4 xct_finish16(int4 a0, int4 a1, int4 a2, int4 a3, float4 m0, float4 m1, float4 m2, float4 m3, int zero,
                         int low) {
  return (int4)(xct_finish4(a0, m0, zero, low), xct_finish4(a1, m1, zero, low), xct_finish4(a2, m2, zero, low),
                xct_finish4(a3, m3, zero, low));
}

static int xct_max4(int a, int b) { return as_int(max(as_char4(a), as_char4(b))); }

static int4 xct_max16(int4 a, int4 b) { return as_int4(max(as_char16(a), as_char16(b))); }

// max(x, zero) - zero - 128, modulo 256.
static int4 xct_relu(int4 x, int zero4) {
  char16 zero = as_char16((int4)(zero4));
  return as_int4(as_uchar16(max(as_char16(x), zero)) - as_uchar16(zero) + (uchar16)(128));
}

static int xct_add4(int a, int b, int a_multiplier, int b_multiplier, int bias, int shift, int zero, int low) {
  int4 acc = convert_int4(as_char4(a)) * a_multiplier + convert_int4(as_char4(b)) * b_multiplier + bias;
  return as_int(convert_char4(clamp((acc >> shift) + zero, low, 127)));
}

static int4 xct_add(int4 a, int4 b, int a_multiplier, int b_multiplier, int bias, int shift, int zero, int low) {
  return (int4)(xct_add4(a.s0, b.s0, a_multiplier, b_multiplier, bias, shift, zero, low),
                xct_add4(a.s1, b.s1, a_multiplier, b_multiplier, bias, shift, zero, low),
                xct_add4(a.s2, b.s2, a_multiplier, b_multiplier, bias, shift, zero, low),
                xct_add4(a.s3, b.s3, a_multiplier, b_multiplier, bias, shift, zero, low));
}

static int xct_pack(char a, char b, char c, char d) { return as_int((char4)(a, b, c, d)); }

static char xct_byte(int word, int index) { return (char)(word >> (8 * index)); }

static float xct_lane(float4 values, int index) {
  return index == 0 ? values.s0 : index == 1 ? values.s1 : index == 2 ? values.s2 : values.s3;
}

// float16: a vector is eight halves, a word two.
#if XCT_FP16
static float2 xct_halves(int word) { return convert_float2(as_half2(word)); }

static float8 xct_eight(int4 vector) { return convert_float8(as_half8(vector)); }

static int xct_pack_two(float2 values) { return as_int(convert_half2_rte(values)); }

static int4 xct_pack_eight(float8 values) { return as_int4(convert_half8_rte(values)); }
#else
// vload_half and vstore_half are part of OpenCL C 1.2 itself.
static float2 xct_halves(int word) { return vload_half2(0, (const __private half *)&word); }

static float8 xct_eight(int4 vector) { return vload_half8(0, (const __private half *)&vector); }

static int xct_pack_two(float2 values) {
  int word;
  vstore_half2_rte(values, 0, (__private half *)&word);
  return word;
}

static int4 xct_pack_eight(float8 values) {
  int4 vector;
  vstore_half8_rte(values, 0, (__private half *)&vector);
  return vector;
}
#endif

static float xct_half(int word, int index) {
  float2 values = xct_halves(word);
  return index == 0 ? values.s0 : values.s1;
}

static int xct_pack_halves(float4 values, int index) {
  return xct_pack_two(index == 0 ? values.s01 : values.s23);
}

static int xct_packh(char a, char b, float scale, float offset) {
  return xct_pack_two((float2)(((float)a - offset) * scale, ((float)b - offset) * scale));
}

// Two weights of each of four output channels against the same two activations: a few products are summed in half, many
// in float, so that accuracy does not depend on how many channels there are.
static float4 xct_dot4x4h(int x, int4 w, float4 acc) {
#if XCT_FP16
  half2 a = as_half2(x);
  half8 b = as_half8(w);
  return acc + convert_float4(b.even * a.s0 + b.odd * a.s1);
#else
  float2 a = xct_halves(x);
  float8 b = xct_eight(w);
  return acc + (b.even * a.s0 + b.odd * a.s1);
#endif
}

static float4 xct_dot16h(int4 x, int4 w0, int4 w1, int4 w2, int4 w3, float4 acc) {
#if XCT_FP16
  half8 a = as_half8(x), b0 = as_half8(w0), b1 = as_half8(w1), b2 = as_half8(w2), b3 = as_half8(w3);
  half4 sum = b0.even * a.s0;
  sum = fma(b0.odd, (half4)(a.s1), sum);
  sum = fma(b1.even, (half4)(a.s2), sum);
  sum = fma(b1.odd, (half4)(a.s3), sum);
  sum = fma(b2.even, (half4)(a.s4), sum);
  sum = fma(b2.odd, (half4)(a.s5), sum);
  sum = fma(b3.even, (half4)(a.s6), sum);
  sum = fma(b3.odd, (half4)(a.s7), sum);
  return acc + convert_float4(sum);
#else
  acc = xct_dot4x4h(x.s0, w0, acc);
  acc = xct_dot4x4h(x.s1, w1, acc);
  acc = xct_dot4x4h(x.s2, w2, acc);
  return xct_dot4x4h(x.s3, w3, acc);
#endif
}

static float2 xct_mac2h(int x, int w, float2 acc) { return acc + xct_halves(x) * xct_halves(w); }

static int xct_finish2h(float2 acc, float low) { return xct_pack_two(fmax(acc, (float2)(low))); }

static int xct_mean2h(float2 acc, float scale) { return xct_pack_two(acc * scale); }

static int4 xct_finish8h(float4 a0, float4 a1, float low) {
  return xct_pack_eight(fmax((float8)(a0, a1), (float8)(low)));
}

static float4 xct_relu4h(float4 x, float low) { return fmax(x, (float4)(low)); }

static int xct_max2h(int a, int b) { return xct_pack_two(fmax(xct_halves(a), xct_halves(b))); }

static int4 xct_max8h(int4 a, int4 b) { return xct_pack_eight(fmax(xct_eight(a), xct_eight(b))); }

static int4 xct_reluh(int4 x, float low) { return xct_pack_eight(fmax(xct_eight(x), (float8)(low))); }

static int4 xct_addh(int4 a, int4 b, float low) {
  return xct_pack_eight(fmax(xct_eight(a) + xct_eight(b), (float8)(low)));
}
