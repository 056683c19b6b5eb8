// In place of csrc/common/stable.h: the kernels themselves need no torch.
#pragma once
