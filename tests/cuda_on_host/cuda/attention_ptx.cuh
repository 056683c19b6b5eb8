// csrc/cuda/attention_ptx.cuh on the host: each instruction as the PTX ISA (8.7) describes it, fragment by fragment.
//
// What is asynchronous on a GPU happens here at a moment that is drawn, at the latest when nobody can go on: copies,
// boxes of tensor maps, products of warp groups. Sums in flight read as NaN. So a missing wait shows as a wrong number,
// and a barrier that is never completed as a block in which nobody can go on.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <type_traits>

#define LDMFAST_WGMMA

namespace ldmfast::ptx {

// ---- memory and numbers ----------------------------------------------------------------------------------------------

constexpr size_t kMostShared = 227 << 10;
constexpr uint32_t kSharedStart = 1024 - 256;  // of the array in the shared address space: not on 1024 bytes
struct Memory {
  alignas(1024) unsigned char bytes[kMostShared + 1024];
  size_t used = 0;
};
inline Memory memory;

inline unsigned char* shared_memory() { return memory.bytes + kSharedStart; }
inline void* inside(uint32_t address, size_t size) {
  if (address < kSharedStart || address + size > kSharedStart + memory.used) on_host::fail("outside of shared memory");
  return memory.bytes + address;
}
inline uint32_t address(const void* p) {
  const auto at = static_cast<const unsigned char*>(p) - memory.bytes;
  return uint32_t(at);
}

inline float exp2(float x) { return ::exp2f(x); }

template <class T>
float number(uint16_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return float(x);
  } else {
    return __bfloat162float({bits});
  }
}
template <class T>
uint16_t rounded(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    const _Float16 y = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return bits;
  } else {
    return std::isnan(x) ? 0x7fff : __float2bfloat16_rn(x).bits;
  }
}
template <class T>
uint32_t pack(float low, float high) {
  return rounded<T>(low) | uint32_t(rounded<T>(high)) << 16;
}
template <class T>
float half_of(uint64_t word, int which) {
  return number<T>(uint16_t(word >> 16 * which));
}

// ---- cp.async --------------------------------------------------------------------------------------------------------

struct Copy {
  void* to;
  const void* from;
  bool valid;
  void run() const {
    if (valid) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
  }
};
inline std::map<unsigned, std::vector<Copy>> copies;  // by thread

inline void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || address(to) % 16) on_host::fail("a copy is not on 16 bytes");
  const Copy copy{inside(address(to), 16), from, valid};
  if (on_host::Block::draw() % 2) copy.run();
  else copies[threadIdx.x].push_back(copy);
}
inline void wait_copies() {
  for (const Copy& copy : copies[threadIdx.x]) copy.run();
  copies[threadIdx.x].clear();
}

// ---- ldmatrix, mma.sync ----------------------------------------------------------------------------------------------

// Eight rows of 16 bytes a block; counts those that meet in a bank.
inline size_t bank_conflicts = 0;

template <int n>
void load(uint32_t (&r)[n], const void* row, bool transposed) {
  const uint64_t mine = address(row);
  if (mine % 16) on_host::fail("ldmatrix not on 16 bytes");
  const auto all = on_host::exchange(&mine, 1);
  const unsigned lane = threadIdx.x % 32;
  for (int i = 0; i < n; ++i) {
    unsigned banks = 0;
    for (int k = 0; k < 8; ++k) banks |= 1u << all[8 * i + k][0] / 16 % 8;
    bank_conflicts += lane == 0 && banks != 0xff;
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned from = transposed ? 2 * (lane % 4) + e : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + e;
      std::memcpy(&pair[e], inside(uint32_t(all[8 * i + int(from)][0]) + 2 * column, 2), 2);
    }
    r[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}
template <int n>
void load_blocks(uint32_t (&r)[n], const void* row) {
  load(r, row, false);
}
template <int n>
void load_transposed(uint32_t (&r)[n], const void* row) {
  load(r, row, true);
}

// words: a (depth / 4 registers), then b (half as many).
template <class T, int depth>
void multiply(float (&c)[4], const uint64_t* words) {
  const auto all = on_host::exchange(words, depth * 3 / 8);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = c[e];
    for (unsigned k = 0; k < depth; ++k) {
      const unsigned a = k / 8 * 2 + row / 8, b = depth / 4 + k / 8;
      sum += double(half_of<T>(all[row % 8 * 4 + k % 8 / 2][a], int(k % 2))) *
             double(half_of<T>(all[column * 4 + k % 8 / 2][b], int(k % 2)));
    }
    c[e] = float(sum);
  }
}
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  multiply<T, 16>(c, words);
}
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  const uint64_t words[3] = {a[0], a[1], b};
  multiply<T, 8>(c, words);
}

// ---- mbarrier, named barriers ----------------------------------------------------------------------------------------

struct Transaction {
  int arrivals, pending;
  int64_t bytes = 0;
  unsigned phase = 0;
  void check() {
    if (pending == 0 && bytes == 0) ++phase, pending = arrivals;
  }
};
inline std::map<const void*, Transaction> barriers;

inline Transaction& transaction(const void* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) on_host::fail("a barrier that was not initialised");
  return found->second;
}
inline void barrier_init(uint64_t* barrier, int arrivals) {
  if (address(barrier) % 8) on_host::fail("a barrier is not on 8 bytes");
  inside(address(barrier), 8);
  barriers[barrier] = {arrivals, arrivals};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) {
  Transaction& t = transaction(barrier);
  if (--t.pending < 0) on_host::fail("more arrivals than the barrier takes");
  t.check();
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  transaction(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const Transaction& t = transaction(barrier);
  on_host::wait_until("a barrier of shared memory", [&] { return t.phase % 2 != parity; });
}

struct Named {
  int arrived = 0;
  unsigned phase = 0;
};
inline std::map<int, Named> named;

template <int threads>
void named_arrive(int id) {
  if (id < 1 || id > 15) on_host::fail("a named barrier's number");
  Named& n = named[id];
  if (++n.arrived == threads) n.arrived = 0, ++n.phase;
}
template <int threads>
void named_sync(int id) {
  const Named& n = named[id];
  const unsigned phase = n.phase;
  named_arrive<threads>(id);
  on_host::wait_until("a named barrier", [&] { return n.phase != phase; });
}

// ---- TMA -------------------------------------------------------------------------------------------------------------

// The 128-byte swizzle: bits 4 to 6 of an address change with bits 7 to 9.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline std::deque<std::function<void()>> boxes;

inline void copy_box(const CUtensorMap& map, uint64_t* barrier, void* to, int c0, int c1, int c2, int c3) {
  const uint32_t start = address(to);
  if (start % 1024) on_host::fail("a swizzled box is not on 1024 bytes");
  boxes.push_back([=, &map] {
    const TensorBox& b = map.box;
    for (uint32_t row = 0; row < b.box[1]; ++row)
      for (uint32_t column = 0; column < b.box[0]; ++column) {
        const uint64_t at[4] = {uint64_t(c0) + column, uint64_t(c1) + row, uint64_t(c2), uint64_t(c3)};
        uint64_t offset = 2 * at[0];
        bool there = at[0] < b.size[0];
        for (int i = 1; i < 4; ++i) there = there && at[i] < b.size[i], offset += at[i] * b.stride[i - 1];
        const uint16_t value = there ? map.data[offset / 2] : 0;
        std::memcpy(inside(swizzle(start + row * 128 + column * 2), 2), &value, 2);
      }
    Transaction& t = transaction(barrier);
    t.bytes -= int64_t(b.box[0]) * b.box[1] * 2;
    t.check();
  });
}
inline bool copy_next_box() {
  if (boxes.empty()) return false;
  boxes.front()();
  boxes.pop_front();
  return true;
}

// ---- wgmma -----------------------------------------------------------------------------------------------------------

struct Matrix {  // a matrix descriptor
  uint32_t start, leading, stride;
  explicit Matrix(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4), leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) on_host::fail("the descriptor's swizzle is not that of 128 bytes");
    if (bits >> 49 & 7) on_host::fail("the descriptor has a base offset");
  }
  // Depth k within a row of 128 bytes, or along the rows.
  template <class T>
  float at(int n, int k, bool along_rows) const {
    const uint32_t plain = along_rows ? start + uint32_t(n % 64 * 2 + k % 8 * 128) + uint32_t(n / 64) * leading +
                                            uint32_t(k / 8) * stride
                                      : start + uint32_t(n % 8 * 128 + k * 2) + uint32_t(n / 8) * stride;
    uint16_t bits;
    std::memcpy(&bits, inside(swizzle(plain), 2), 2);
    return number<T>(bits);
  }
};

struct Product {
  float* sums;  // what the thread sees; the numbers in flight are in `hidden`
  int blocks;
  bool add, half, from_registers;
  uint64_t a, b;
  const uint32_t* registers;
};
struct GroupThread {
  std::vector<Product> products;
  std::map<float*, std::vector<float>> hidden;
  std::map<float*, size_t> last;    // the last product that writes there
  std::deque<size_t> groups;        // products issued up to each commit
  bool fenced = false;
};
struct WarpGroup {
  GroupThread thread[128];
  size_t done = 0;
};
inline std::map<unsigned, WarpGroup> warp_groups;

inline GroupThread& own_products() { return warp_groups[threadIdx.x / 128].thread[threadIdx.x % 128]; }

template <class T>
void multiply(WarpGroup& group) {
  const Product& first = group.thread[0].products[group.done];
  const Matrix b(first.b);
  const int columns = 8 * first.blocks;
  std::vector<float> left(64 * 16), right(size_t(columns) * 16);
  for (int t = 0; t < 128; ++t) {
    const Product& p = group.thread[t].products[group.done];
    if (p.b != first.b || p.a != first.a || p.blocks != first.blocks) on_host::fail("threads disagree on a product");
    for (int i = 0; p.from_registers && i < 4; ++i)
      for (int e = 0; e < 2; ++e)
        left[size_t((t / 32 * 16 + t % 32 / 4 + i % 2 * 8) * 16 + t % 4 * 2 + e + i / 2 * 8)] =
            half_of<T>(p.registers[i], e);
  }
  if (!first.from_registers) {
    const Matrix a(first.a);
    for (int r = 0; r < 64; ++r)
      for (int k = 0; k < 16; ++k) left[size_t(r * 16 + k)] = a.at<T>(r, k, false);
  }
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < 16; ++k) right[size_t(n * 16 + k)] = b.at<T>(n, k, first.from_registers);
  for (int t = 0; t < 128; ++t) {
    const Product& p = group.thread[t].products[group.done];
    std::vector<float>& sums = group.thread[t].hidden.at(p.sums);
    for (int i = 0; i < columns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      double sum = p.add ? sums[size_t(i)] : 0;
      for (int k = 0; k < 16; ++k) sum += double(left[size_t(row * 16 + k)]) * right[size_t(column * 16 + k)];
      sums[size_t(i)] = float(sum);
    }
  }
}
inline bool multiply_next() {
  bool any = false;
  for (auto& [number, group] : warp_groups) {
    bool ready = true;
    for (const GroupThread& t : group.thread) ready = ready && t.products.size() > group.done;
    if (!ready) continue;
    if (group.thread[0].products[group.done].half) multiply<__half>(group);
    else multiply<__nv_bfloat16>(group);
    ++group.done;
    any = true;
  }
  return any;
}

template <class T, int n>
void issue(float (&c)[n][4], Product p) {
  GroupThread& mine = own_products();
  if (!mine.fenced) on_host::fail("wgmma without a fence since registers may have been written");
  p.sums = &c[0][0], p.blocks = n, p.half = std::is_same_v<T, __half>;
  if (mine.hidden.find(p.sums) == mine.hidden.end()) {
    mine.hidden[p.sums].assign(p.sums, p.sums + 4 * n);
    std::fill(p.sums, p.sums + 4 * n, NAN);
  }
  mine.last[p.sums] = mine.products.size();
  mine.products.push_back(p);
}
template <class T, int n>
void wgmma(float (&c)[n][4], uint64_t a, uint64_t b, bool add) {
  Product p{};
  p.a = a, p.b = b, p.add = add;
  issue<T>(c, p);
}
template <class T, int n>
void wgmma(float (&c)[n][4], const uint32_t (&a)[4], uint64_t b) {
  Product p{};
  p.registers = a, p.b = b, p.add = p.from_registers = true;
  issue<T>(c, p);
}
inline void wgmma_fence() { own_products().fenced = true; }
inline void wgmma_commit() { own_products().groups.push_back(own_products().products.size()); }
template <int left>
void wgmma_wait() {
  GroupThread& mine = own_products();
  const WarpGroup& group = warp_groups[threadIdx.x / 128];
  const size_t count = mine.groups.size();
  const size_t need = count > size_t(left) ? mine.groups[count - 1 - left] : 0;
  on_host::wait_until("products", [&] { return group.done >= need; });
  for (auto at = mine.hidden.begin(); at != mine.hidden.end();) {
    if (mine.last[at->first] >= need) {
      ++at;
      continue;
    }
    std::copy(at->second.begin(), at->second.end(), at->first);
    at = mine.hidden.erase(at);
  }
  mine.fenced = false;
}
template <class A, int n>
void hold(A (&)[n][4]) {}
template <int registers>
void fewer_registers() {}
template <int registers>
void more_registers() {}

// ---- a launch --------------------------------------------------------------------------------------------------------

// Between two blocks: all is done, nothing hangs, and what the last one left in shared memory is not a number.
inline void new_block(size_t shared_bytes) {
  for (const auto& [id, n] : named)
    if (n.arrived) on_host::fail("a named barrier waits for more at the block's end");
  if (!boxes.empty()) on_host::fail("a copy is in flight at the block's end");
  for (const auto& [thread, list] : copies)
    if (!list.empty()) on_host::fail("a copy was not waited for");
  for (const auto& [number, group] : warp_groups)
    for (const GroupThread& t : group.thread)
      if (t.products.size() != group.done || !t.hidden.empty()) on_host::fail("products in flight at the block's end");
  named.clear(), barriers.clear(), copies.clear(), warp_groups.clear();
  std::memset(memory.bytes, 0xff, sizeof memory.bytes);
  memory.used = shared_bytes;
}

}  // namespace ldmfast::ptx
