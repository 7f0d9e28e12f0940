// CUDA as C++20: one operating-system thread per CUDA thread of a block, blocks one after the other.
// Threads of a block meet at one barrier, threads of a warp at another. Warp-wide instructions
// follow the fragment maps of the PTX ISA, section "matrix multiply-accumulate instructions".
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <pthread.h>
#include <thread>
#include <vector>

using std::max;
using std::min;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef _Float16 half;

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};
static inline float __bfloat162float(nv_bfloat16 value) { return value; }
static inline nv_bfloat16 __float2bfloat16(float value) { return value; }
static inline nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
static inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
static inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
static inline float __half2float(half value) { return value; }
static inline half __float2half_rn(float value) { return half(value); }

template <class T, int N>
struct alignas(sizeof(T) * N) Vector;
template <class T>
struct alignas(sizeof(T) * 2) Vector<T, 2> { T x, y; };
template <class T>
struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) Vector<T, 4> { T x, y, z, w; };
#define VECTOR_TYPE(T, NAME)                                                     \
  typedef Vector<T, 2> NAME##2;                                                  \
  typedef Vector<T, 4> NAME##4;                                                  \
  static inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }              \
  static inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR_TYPE(float, float)
VECTOR_TYPE(int, int)
VECTOR_TYPE(uint, uint)
VECTOR_TYPE(ushort, ushort)
VECTOR_TYPE(int64_t, longlong)

struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx;

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(threads, blocks)
#define __align__(bytes) alignas(bytes)
#define CUDART_INF_F std::numeric_limits<float>::infinity()

constexpr int WARP = 32;
static pthread_barrier_t block_barrier, warp_barriers[32];

static inline int thread_number() { return threadIdx.y * WARP + threadIdx.x; }
static inline int lane_number() { return threadIdx.x; }
static inline int warp_begin() { return threadIdx.y * WARP; }
static inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
static inline void __syncwarp() { pthread_barrier_wait(&warp_barriers[threadIdx.y]); }
static inline uint __activemask() { return 0xffffffffu; }

// Publishes one value a thread and reads another lane's.
template <class T>
static T from_lane(T value, int lane) {
  static T exchanged[1024];
  exchanged[thread_number()] = value;
  __syncwarp();
  T received = exchanged[warp_begin() + lane];
  __syncwarp();
  return received;
}
template <class T>
static T __shfl_sync(uint, T value, int lane, int = WARP) { return from_lane(value, lane % WARP); }
template <class T>
static T __shfl_xor_sync(uint, T value, int mask, int = WARP) {
  return from_lane(value, lane_number() ^ mask);
}
template <class T>
static T __shfl_down_sync(uint, T value, int delta, int = WARP) {
  int lane = lane_number() + delta;
  return from_lane(value, lane < WARP ? lane : lane_number());
}

// ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8 and gets two elements of each.
static inline void load_matrices(unsigned* held, const void* row, bool transposed) {
  static const uint16_t* rows[1024];
  rows[thread_number()] = (const uint16_t*)row;
  __syncwarp();
  int lane = lane_number();
  uint16_t elements[8];
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int e = 0; e < 2; ++e) {
      int r = lane / 4, c = lane % 4 * 2 + e;
      if (transposed) std::swap(r, c);
      elements[2 * matrix + e] = rows[warp_begin() + matrix * 8 + r][c];
    }
  __syncwarp();
  std::memcpy(held, elements, 16);
}

// mma.m16n8k16: every lane gives its parts of A and B, and gets four elements of C.
template <class T>
static void multiply_fragments(float* c, const unsigned* a, const unsigned* b) {
  static T all_a[1024][8], all_b[1024][4];
  int lane = lane_number(), begin = warp_begin();
  std::memcpy(all_a[thread_number()], a, 16);
  std::memcpy(all_b[thread_number()], b, 8);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      T left = all_a[begin + row % 8 * 4 + k % 8 / 2][k / 8 * 4 + row / 8 * 2 + k % 2];
      T right = all_b[begin + column * 4 + k % 8 / 2][k / 8 * 2 + k % 2];
      c[i] += float(left) * float(right);
    }
  }
  __syncwarp();
}

#define TENSOR_CORES(NAME, T)                                                        \
  static inline void deft_ldmatrix_##NAME(unsigned* held, const void* row) {         \
    load_matrices(held, row, false);                                                 \
  }                                                                                  \
  static inline void deft_ldmatrix_trans_##NAME(unsigned* held, const void* row) {   \
    load_matrices(held, row, true);                                                  \
  }                                                                                  \
  static inline void deft_mma_##NAME(float* c, const unsigned* a, const unsigned* b) { \
    multiply_fragments<T>(c, a, b);                                                  \
  }
TENSOR_CORES(f16, half)
TENSOR_CORES(bf16, nv_bfloat16)

// cp.async lands at the wait and not before, so that a missing wait gives wrong results.
struct Copy {
  void* tile;
  const void* row;
};
static thread_local std::vector<Copy> copies_under_way;
static inline void deft_cp_async(void* tile, const void* row) {
  copies_under_way.push_back({tile, row});
}
static inline void deft_wait_for_copies() {
  for (const Copy& copy : copies_under_way) std::memcpy(copy.tile, copy.row, 16);
  copies_under_way.clear();
}

alignas(1024) static uchar buf_dyn_shmem_ptr[232448];

template <class Body>
static void run_blocks(int blocks, int threads, Body body) {
  pthread_barrier_init(&block_barrier, nullptr, threads);
  for (int warp = 0; warp < threads / WARP; ++warp)
    pthread_barrier_init(&warp_barriers[warp], nullptr, WARP);
  std::vector<std::thread> pool;
  for (int number = 0; number < threads; ++number)
    pool.emplace_back([=] {
      threadIdx = {number % WARP, number / WARP, 0};
      for (int block = 0; block < blocks; ++block) {
        blockIdx = {block, 0, 0};
        body();
        __syncthreads();
      }
    });
  for (auto& thread : pool) thread.join();
}
