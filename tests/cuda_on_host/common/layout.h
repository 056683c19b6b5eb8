// In place of csrc/common/layout.h: the kernels themselves need no torch.
#pragma once
