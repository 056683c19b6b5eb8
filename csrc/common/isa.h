// CPU instruction-set levels: which exist in this build, which this CPU has, which one is used. No torch here.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

// setup.py defines LDMFAST_HAVE_<LEVEL> for every level it compiles, to every object of the library.
// LDMFAST_EACH_LEVEL(X, arg) expands X(arg, level) for each, lowest first.
#ifdef LDMFAST_HAVE_AVX2
#define LDMFAST_AVX2_(X, arg) X(arg, avx2)
#else
#define LDMFAST_AVX2_(X, arg)
#endif
#ifdef LDMFAST_HAVE_AVX512
#define LDMFAST_AVX512_(X, arg) X(arg, avx512)
#else
#define LDMFAST_AVX512_(X, arg)
#endif
#ifdef LDMFAST_HAVE_AVX512_BF16
#define LDMFAST_AVX512_BF16_(X, arg) X(arg, avx512_bf16)
#else
#define LDMFAST_AVX512_BF16_(X, arg)
#endif
#ifdef LDMFAST_HAVE_AMX
#define LDMFAST_AMX_(X, arg) X(arg, amx)
#else
#define LDMFAST_AMX_(X, arg)
#endif
#ifdef LDMFAST_HAVE_NEON
#define LDMFAST_NEON_(X, arg) X(arg, neon)
#else
#define LDMFAST_NEON_(X, arg)
#endif
#define LDMFAST_EACH_LEVEL(X, arg) \
  X(arg, generic)                  \
  LDMFAST_AVX2_(X, arg)            \
  LDMFAST_AVX512_(X, arg) LDMFAST_AVX512_BF16_(X, arg) LDMFAST_AMX_(X, arg) LDMFAST_NEON_(X, arg)

namespace ldmfast::isa {

enum class Level { generic, avx2, avx512, avx512_bf16, amx, neon };

#if defined(__x86_64__)
struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

inline Cpuid cpuid(uint32_t leaf, uint32_t sub) {
  Cpuid r;
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Register state the operating system saves on a context switch (XCR0); 0 where it saves none.
inline uint64_t saved_state() {
  if (!(cpuid(1, 0).c >> 27 & 1)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux gives a process the tile registers only when asked (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool may_use_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

inline bool cpu_has(Level level) {
  const Cpuid one = cpuid(1, 0), seven = cpuid(7, 0), seven1 = cpuid(7, 1), extended = cpuid(0x80000001, 0);
  const uint64_t saved = saved_state();
  const auto bit = [](uint32_t word, int i) { return bool(word >> i & 1); };
  const bool avx2 = (saved & 0x6) == 0x6 && bit(one.c, 12) && bit(one.c, 22) && bit(one.c, 29) && bit(seven.b, 3) &&
                    bit(seven.b, 5) && bit(seven.b, 8) && bit(extended.c, 5);  // fma movbe f16c bmi1 avx2 bmi2 lzcnt
  const bool avx512 = avx2 && (saved & 0xe6) == 0xe6 && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 28) &&
                      bit(seven.b, 30) && bit(seven.b, 31);  // f dq cd bw vl
  const bool bf16 = avx512 && bit(seven1.a, 5) && bit(seven.c, 11);  // avx512_bf16 avx512_vnni
  switch (level) {
    case Level::generic: return true;
    case Level::avx2: return avx2;
    case Level::avx512: return avx512;
    case Level::avx512_bf16: return bf16;
    case Level::amx:
      return bf16 && (saved & 0x60000) == 0x60000 && bit(seven.c, 1) &&  // avx512_vbmi, which weights.h uses
             bit(seven.d, 22) && bit(seven.d, 24) && bit(seven.d, 25) &&
             may_use_tiles();
    case Level::neon: return false;
  }
  return false;
}
#else
inline bool cpu_has(Level level) {
#if defined(__aarch64__) && defined(__linux__)
  // What -march=armv8.2-a+fp16 lets the compiler use: a Cortex-A53 or A72 has none of it but crc32.
  constexpr unsigned long needed = HWCAP_CRC32 | HWCAP_ATOMICS | HWCAP_FPHP | HWCAP_ASIMDHP | HWCAP_ASIMDRDM;
  return level == Level::generic || (level == Level::neon && (getauxval(AT_HWCAP) & needed) == needed);
#elif defined(__aarch64__)
  return level == Level::generic || level == Level::neon;  // Apple's, all of them
#else
  return level == Level::generic;
#endif
}
#endif

struct Named {
  const char* name;
  Level level;
};

// Levels compiled into this build, lowest first.
inline const std::vector<Named>& built() {
#define LDMFAST_NAMED_(unused, level) {#level, Level::level},
  static const std::vector<Named> levels{LDMFAST_EACH_LEVEL(LDMFAST_NAMED_, _)};
#undef LDMFAST_NAMED_
  return levels;
}

// Levels of this build that this CPU runs, lowest first.
inline const std::vector<Named>& available() {
  static const std::vector<Named> levels = [] {
    std::vector<Named> found;
    for (const Named& n : built())
      if (cpu_has(n.level)) found.push_back(n);
    return found;
  }();
  return levels;
}

// The highest available level, or the one LDMFAST_CPU_ISA names. Python refuses a name that is not available
// before this library is loaded; should one get here, the lowest level is the one that runs anywhere.
inline Level chosen() {
  static const Level level = [] {
    const char* wanted = std::getenv("LDMFAST_CPU_ISA");
    if (wanted == nullptr || *wanted == 0) return available().back().level;
    for (const Named& n : available())
      if (std::strcmp(n.name, wanted) == 0) return n.level;
    return available().front().level;
  }();
  return level;
}

}  // namespace ldmfast::isa
