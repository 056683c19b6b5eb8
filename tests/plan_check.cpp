// Prints what csrc/common/*_plan.h answer to the questions on standard input; tests/test_cuda.py knows the answers.
//   divide D X                                -> X / D by multiplication
//   plan BATCH CHANNELS PIXELS GROUPS LAST ELEMENT_SIZE ALIGNED PROCESSORS
//                                             -> one_pass vector splits piece tile_groups tiles blocks, then every
//                                                (offset, count) of the runs of memory a block reads, for small plans
//   lincomb ROW ROW_STRIDE COLUMN_STRIDE COLUMNS VALUES... -> indices read, then the columns kept
//   descriptors ADDRESS PANEL_BYTES           -> wgmma's descriptors of rows and of columns
//   map SIZES(4) STRIDES(4) ROWS              -> whether a tensor map takes them, its sizes, strides and box
//   shared                                    -> bytes of the attention kernels: four of mma, six of wgmma
//   warps BATCH QUERIES HEADS ROWS PROCESSORS -> warps of a block of mma attention
//   split ELEMENTS VECTOR                     -> groups, start of the rest, rest
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "common/attention_cuda_plan.h"
#include "common/group_norm_plan.h"
#include "common/lincomb_plan.h"

using namespace ldmfast;

static void plan(bool runs) {
  int64_t batch, channels, pixels, groups, last, size, aligned, processors;
  std::cin >> batch >> channels >> pixels >> groups >> last >> size >> aligned >> processors;
  const GroupNormPlan p = group_norm_plan(batch, channels, pixels, groups, last, size, aligned, processors);
  std::cout << p.one_pass << ' ' << p.vector << ' ' << p.splits << ' ' << p.piece << ' ' << p.tile_groups << ' '
            << p.tiles << ' ' << p.blocks();
  for (int64_t n = 0; runs && n < batch; ++n)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t s = 0; s < p.splits; ++s) {
        std::cout << " | " << p.partial_index(n, g, s) << ' ' << p.piece_count(s);
        const int64_t begin = p.group_begin(n, g);
        if (p.last)
          for (int64_t r = p.piece_begin(s); r < p.piece_end(s); ++r)
            std::cout << ' ' << begin + r * p.channels << ' ' << p.width;
        else
          std::cout << ' ' << begin + p.piece_begin(s) << ' ' << p.piece_end(s) - p.piece_begin(s);
      }
  for (int64_t t = 0; runs && p.last && t < p.tiles; ++t)
    std::cout << " / " << p.tile_begin(t) << ' ' << p.tile_end(t);
  std::cout << '\n';
}

int main() {
  std::string question;
  while (std::cin >> question) {
    if (question == "divide") {
      uint32_t d, x;
      std::cin >> d >> x;
      std::cout << Divisor(d).divide(x) << '\n';
    } else if (question == "plan" || question == "runs") {
      plan(question == "runs");
    } else if (question == "lincomb") {
      int64_t row, row_stride, column_stride;
      int columns;
      std::cin >> row >> row_stride >> column_stride >> columns;
      std::vector<float> coefficients(columns);
      std::vector<int> which(columns);
      for (int j = 0; j < columns; ++j) {
        double value;
        std::cin >> value;
        coefficients[j] = float(value);
        std::cout << table_index(row, j, row_stride, column_stride) << ' ';
      }
      const int found = drop_zeros(coefficients.data(), which.data(), columns);
      std::cout << '|';
      for (int j = 0; j < found; ++j) std::cout << ' ' << which[j] << ' ' << coefficients[j];
      std::cout << '\n';
    } else if (question == "descriptors") {
      uint32_t address, panel;
      std::cin >> address >> panel;
      std::cout << rows_descriptor(address) << ' ' << columns_descriptor(address, panel) << '\n';
    } else if (question == "map") {
      int64_t sizes[4], strides[4];
      int rows;
      for (int64_t& n : sizes) std::cin >> n;
      for (int64_t& n : strides) std::cin >> n;
      std::cin >> rows;
      const TensorBox b = tensor_box(sizes, strides, 2, rows);
      std::cout << fits_tensor_map(b);
      for (const uint64_t n : b.size) std::cout << ' ' << n;
      for (const uint64_t n : b.stride) std::cout << ' ' << n;
      for (const uint32_t n : b.box) std::cout << ' ' << n;
      std::cout << '\n';
    } else if (question == "shared") {
      std::cout << MmaTile<40>::shared_bytes(4) << ' ' << MmaTile<72>::shared_bytes(4) << ' '
                << MmaTile<80>::shared_bytes(4) << ' ' << MmaTile<160>::shared_bytes(4) << ' '
                << WgmmaTile<40>::shared_bytes << ' ' << WgmmaTile<64>::shared_bytes << ' '
                << WgmmaTile<72>::shared_bytes << ' ' << WgmmaTile<80>::shared_bytes << ' '
                << WgmmaTile<128>::shared_bytes << ' ' << WgmmaTile<160>::shared_bytes << '\n';
    } else if (question == "warps") {
      AttentionSizes a;
      int64_t rows, processors;
      std::cin >> a.batch >> a.queries >> a.heads >> rows >> processors;
      std::cout << mma_warps(a, int(rows), 4, processors) << '\n';
    } else if (question == "split") {
      int64_t elements;
      int vector;
      std::cin >> elements >> vector;
      const ElementSplit s = split_elements(elements, vector);
      std::cout << s.groups << ' ' << s.rest_begin << ' ' << s.rest << '\n';
    }
  }
}
