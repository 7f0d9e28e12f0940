// CUDA as C++17, as far as generated kernels use it: types, and functions of one thread.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

#include "ptx.h"

template <class T>
static inline T max(T a, T b) { return a < b ? b : a; }
template <class T>
static inline T min(T a, T b) { return b < a ? b : a; }
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
VECTOR_TYPE(half, half)
VECTOR_TYPE(nv_bfloat16, nv_bfloat16)

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(threads, blocks)
#define __align__(bytes) alignas(bytes)
#define CUDART_INF_F HUGE_VALF
