// In place of the driver's header: a tensor map is what it was made of.
#pragma once

#include "common/attention_cuda_plan.h"

struct CUtensorMap {
  const uint16_t* data;
  ldmfast::TensorBox box;
};
