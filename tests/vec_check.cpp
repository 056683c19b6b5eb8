// csrc/common/vec.h against libm in fp64 and against its own scalar conversions. Prints a line for each
// failure; the exit status is their number. tests/test_build.py compiles it for a level and runs it.
#define LDMFAST_LEVEL_NAMESPACE level
#include "common/vec.h"

#include <cstdio>

using namespace level;

static int failures = 0;

static void check(const char* name, double worst, double allowed) {
  std::printf("%s %g of %g\n", name, worst, allowed);
  failures += !(worst <= allowed);
}

// Largest relative error of f(F) against the fp64 function over [from, to].
template <class Ours, class Exact>
static double error(Ours ours, Exact exact, double from, double to) {
  constexpr int L = kLanes<float>, n = 1 << 18;
  double worst = 0;
  for (int i = 0; i < n; i += L) {
    float x[L], y[L];
    for (int j = 0; j < L; ++j) x[j] = float(from + (to - from) * (i + j) / n);
    store(y, ours(load(x)));
    for (int j = 0; j < L; ++j) {
      const double is = exact(double(x[j])), off = std::fabs(y[j] - is) / std::fabs(is);
      if (!(off <= worst)) worst = off;  // a NaN is kept, too
    }
  }
  return worst;
}

// Numbers that come back from 16 bits with other bits, or that vectors and scalars read differently.
template <class T>
static int changed() {
  constexpr int L = kLanes<float>;
  int count = 0;
  for (int bits = 0; bits < 1 << 16; bits += L) {
    T in[L], out[L];
    float x[L];
    for (int j = 0; j < L; ++j) in[j].bits = uint16_t(bits + j);
    store(x, load(in));
    store(out, load(in));
    for (int j = 0; j < L; ++j) {
      const float one = to_float(in[j]);
      if (one != one) count += x[j] == x[j] || to_float(out[j]) == to_float(out[j]);
      else count += std::memcmp(&x[j], &one, 4) != 0 || in[j].bits != out[j].bits;
    }
  }
  return count;
}

// Results of rounding fp32 to T that differ from those of `exact` (T(float)), at ties and beside them.
template <class T, class Exact>
static int misrounded(Exact exact) {
  constexpr int L = kLanes<float>;
  int count = 0;
  for (uint32_t high = 0; high < 1 << 20; high += L)
    for (int32_t low = -1; low <= 1; ++low) {
      float x[L];
      T out[L];
      for (int j = 0; j < L; ++j) {
        const uint32_t bits = ((high + j) << 12) + uint32_t(low);
        std::memcpy(&x[j], &bits, 4);
      }
      store(out, load(x));
      for (int j = 0; j < L; ++j) {
        const T one = exact(x[j]);
        if (x[j] != x[j]) count += to_float(out[j]) == to_float(out[j]);
        else count += out[j].bits != one.bits;
      }
    }
  return count;
}

// Round to nearest, ties to even, by the neighbours themselves: no bit of vec.h's way is used.
static bf16 bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rest = bits & 0xffff, odd = bits >> 16 & 1;
  return {uint16_t((bits >> 16) + (rest > 0x8000 || (rest == 0x8000 && odd)))};
}

int main() {
  const auto gelu = [](double x) { return x * 0.5 * std::erfc(-x * std::sqrt(0.5)); };
  check("exp", error([](F x) { return exp(x); }, [](double x) { return std::exp(x); }, -87.3, 88.7), 2e-7);
  check("silu", error([](F x) { return silu(x); }, [](double x) { return x / (1 + std::exp(-x)); }, -80.01, 80), 1e-6);
  // exp(-x^2 / 2) takes the rounding of x^2 / 2 <= 32, half an ulp of which is 1e-6, into its result
  check("gelu", error([](F x) { return x * normal_cdf(x); }, gelu, -8.001, 8), 4e-6);
  check("fp16 there and back", changed<f16>(), 0);
  check("bf16 there and back", changed<bf16>(), 0);
  check("fp16 rounding", misrounded<f16>(half_of), 0);
  check("bf16 rounding", misrounded<bf16>(bf16_of), 0);

  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  check("exp at the ends", (exp(splat(-infinity))[0] != 0) + (exp(splat(infinity))[0] != infinity) +
                               (exp(splat(nan))[0] == exp(splat(nan))[0]) + (exp(splat(89.0f))[0] != infinity), 0);
  F lanes;
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = float(i);
  constexpr int L = kLanes<float>;
  check("sum and max", std::fabs(sum(lanes) - L * (L - 1) / 2) + std::fabs(max(lanes) - (L - 1)), 0);
  U rows[L];
  int wrong = 0;
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) rows[i][j] = uint32_t(i * L + j);
  transpose(rows);
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) wrong += rows[i][j] != uint32_t(j * L + i);
  check("transpose", wrong, 0);
  return failures;
}
