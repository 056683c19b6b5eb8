// wgmma by shape: c (64 x 8n, fp32) = or += a (64 x 16) b (16 x 8n). Included by attention_ptx.cuh alone.
//
// An instruction names each of its 4n accumulators, so the texts are put together by macros: LDMFAST_TEXT_n lists the
// registers, LDMFAST_SUMS_n the variables behind them.
#pragma once

#define LDMFAST_TEXT_0_ "%0, %1, %2, %3"
#define LDMFAST_TEXT_1_ "%4, %5, %6, %7"
#define LDMFAST_TEXT_2_ "%8, %9, %10, %11"
#define LDMFAST_TEXT_3_ "%12, %13, %14, %15"
#define LDMFAST_TEXT_4_ "%16, %17, %18, %19"
#define LDMFAST_TEXT_5_ "%20, %21, %22, %23"
#define LDMFAST_TEXT_6_ "%24, %25, %26, %27"
#define LDMFAST_TEXT_7_ "%28, %29, %30, %31"
#define LDMFAST_TEXT_8_ "%32, %33, %34, %35"
#define LDMFAST_TEXT_9_ "%36, %37, %38, %39"
#define LDMFAST_TEXT_10_ "%40, %41, %42, %43"
#define LDMFAST_TEXT_11_ "%44, %45, %46, %47"
#define LDMFAST_TEXT_12_ "%48, %49, %50, %51"
#define LDMFAST_TEXT_13_ "%52, %53, %54, %55"
#define LDMFAST_TEXT_14_ "%56, %57, %58, %59"
#define LDMFAST_TEXT_15_ "%60, %61, %62, %63"
#define LDMFAST_TEXT_16_ "%64, %65, %66, %67"
#define LDMFAST_TEXT_17_ "%68, %69, %70, %71"
#define LDMFAST_TEXT_18_ "%72, %73, %74, %75"
#define LDMFAST_TEXT_19_ "%76, %77, %78, %79"
#define LDMFAST_SUM_(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])

#define LDMFAST_TEXT_5 LDMFAST_TEXT_0_ ", " LDMFAST_TEXT_1_ ", " LDMFAST_TEXT_2_ ", " LDMFAST_TEXT_3_ ", " \
  LDMFAST_TEXT_4_
#define LDMFAST_SUMS_5 LDMFAST_SUM_(0), LDMFAST_SUM_(1), LDMFAST_SUM_(2), LDMFAST_SUM_(3), LDMFAST_SUM_(4)
#define LDMFAST_TEXT_8 LDMFAST_TEXT_5 ", " LDMFAST_TEXT_5_ ", " LDMFAST_TEXT_6_ ", " LDMFAST_TEXT_7_
#define LDMFAST_SUMS_8 LDMFAST_SUMS_5, LDMFAST_SUM_(5), LDMFAST_SUM_(6), LDMFAST_SUM_(7)
#define LDMFAST_TEXT_9 LDMFAST_TEXT_8 ", " LDMFAST_TEXT_8_
#define LDMFAST_SUMS_9 LDMFAST_SUMS_8, LDMFAST_SUM_(8)
#define LDMFAST_TEXT_10 LDMFAST_TEXT_9 ", " LDMFAST_TEXT_9_
#define LDMFAST_SUMS_10 LDMFAST_SUMS_9, LDMFAST_SUM_(9)
#define LDMFAST_TEXT_16 LDMFAST_TEXT_10 ", " LDMFAST_TEXT_10_ ", " LDMFAST_TEXT_11_ ", " LDMFAST_TEXT_12_ ", " \
  LDMFAST_TEXT_13_ ", " LDMFAST_TEXT_14_ ", " LDMFAST_TEXT_15_
#define LDMFAST_SUMS_16 LDMFAST_SUMS_10, LDMFAST_SUM_(10), LDMFAST_SUM_(11), LDMFAST_SUM_(12), LDMFAST_SUM_(13), \
  LDMFAST_SUM_(14), LDMFAST_SUM_(15)
#define LDMFAST_TEXT_20 LDMFAST_TEXT_16 ", " LDMFAST_TEXT_16_ ", " LDMFAST_TEXT_17_ ", " LDMFAST_TEXT_18_ ", " \
  LDMFAST_TEXT_19_
#define LDMFAST_SUMS_20 LDMFAST_SUMS_16, LDMFAST_SUM_(16), LDMFAST_SUM_(17), LDMFAST_SUM_(18), LDMFAST_SUM_(19)

#define LDMFAST_INSTRUCTION_(N, TYPE, SUMS) \
  "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" SUMS "}, "
// Both operands in shared memory, depth within their rows. I0, I1, I2: numbers of the operands after the sums.
#define LDMFAST_SHARED_(n, N, I0, I1, I2, TYPE)                                                                \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" I2 ", 0;\n\t" LDMFAST_INSTRUCTION_(N, TYPE, LDMFAST_TEXT_##n) \
               "%" I0 ", %" I1 ", p, 1, 1, 0, 0;\n\t}"                                                          \
               : LDMFAST_SUMS_##n                                                                               \
               : "l"(a), "l"(b), "r"(int(add)))
// a in registers, the depth of b along its rows; always adds.
#define LDMFAST_REGISTERS_(n, N, I0, I1, I2, I3, I4, TYPE)                                                     \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.eq.b32 p, 0, 0;\n\t" LDMFAST_INSTRUCTION_(N, TYPE, LDMFAST_TEXT_##n)      \
               "{%" I0 ", %" I1 ", %" I2 ", %" I3 "}, %" I4 ", p, 1, 1, 1;\n\t}"                               \
               : LDMFAST_SUMS_##n                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define LDMFAST_EITHER_(MACRO, ...)                                             \
  do {                                                                          \
    if constexpr (std::is_same_v<T, __half>) MACRO(__VA_ARGS__, "f16");         \
    else MACRO(__VA_ARGS__, "bf16");                                            \
  } while (false)

template <class T, int n>
__device__ __forceinline__ void wgmma(float (&c)[n][4], uint64_t a, uint64_t b, bool add) {
  static_assert(n == 10 || n == 16, "a shape without its text");
  if constexpr (n == 10) LDMFAST_EITHER_(LDMFAST_SHARED_, 10, "80", "40", "41", "42");
  if constexpr (n == 16) LDMFAST_EITHER_(LDMFAST_SHARED_, 16, "128", "64", "65", "66");
}
template <class T, int n>
__device__ __forceinline__ void wgmma(float (&c)[n][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(n == 5 || n == 8 || n == 9 || n == 10 || n == 16 || n == 20, "a shape without its text");
  if constexpr (n == 5)
    LDMFAST_EITHER_(LDMFAST_REGISTERS_, 5, "40", "20", "21", "22", "23", "24");
  if constexpr (n == 8)
    LDMFAST_EITHER_(LDMFAST_REGISTERS_, 8, "64", "32", "33", "34", "35", "36");
  if constexpr (n == 9)
    LDMFAST_EITHER_(LDMFAST_REGISTERS_, 9, "72", "36", "37", "38", "39", "40");
  if constexpr (n == 10)
    LDMFAST_EITHER_(LDMFAST_REGISTERS_, 10, "80", "40", "41", "42", "43", "44");
  if constexpr (n == 16)
    LDMFAST_EITHER_(LDMFAST_REGISTERS_, 16, "128", "64", "65", "66", "67", "68");
  if constexpr (n == 20)
    LDMFAST_EITHER_(LDMFAST_REGISTERS_, 20, "160", "80", "81", "82", "83", "84");
}
