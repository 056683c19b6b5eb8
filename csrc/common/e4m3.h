// e4m3: four bits of exponent, three of fraction, no infinity. Plain arithmetic for the host and for GPUs that have no
// instruction for it.
#pragma once

#include <cstdint>
#include <cstring>

#include "group_norm_plan.h"

namespace ldmfast {

// The byte of the nearest e4m3 number, ties to even, at most 448; of NaN that of NaN.
LDMFAST_HOST_DEVICE inline uint8_t e4m3(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint8_t(0x7f);
  if (magnitude >= 0x43e00000) return uint8_t(sign | 0x7e);  // 448
  if (magnitude < 0x3c800000) {                              // below 2^-6 fractions end at 2^-9: 2^14 leaves these bits
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 16384.0f;
    memcpy(&bits, &shifted, 4);
    return uint8_t(sign | (bits - 0x46800000));
  }
  return uint8_t(sign | (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - 960));
}

}  // namespace ldmfast
