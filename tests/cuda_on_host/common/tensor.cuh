// In place of csrc/common/tensor.cuh: the kernels' half of it.
#pragma once

#include <cuda_runtime.h>

#include "common/element.cuh"
