// Instructions that generated kernels write as inline PTX; `ptx.py` puts these calls in their place.
//
// Warp-wide ones follow the fragment maps of the PTX ISA, section "matrix multiply-accumulate
// instructions". An asynchronous copy spoils its destination at once and lands at the wait for it,
// as either may be seen on a GPU.
#pragma once
#include <cstring>
#include <vector>

#include "threads.h"

static inline unsigned __activemask() { return ~0u; }

template <class T>
static T from_lane(T value, int lane) {
  struct Exchange { T value; int lane; T received; } mine{value, lane, {}};
  as_warp(mine, [](Exchange** all) {
    for (int i = 0; i < WARP; ++i) all[i]->received = all[all[i]->lane]->value;
  });
  return mine.received;
}
template <class T>
static T __shfl_sync(unsigned, T value, int lane, int = WARP) {
  return from_lane(value, lane % WARP);
}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask, int = WARP) {
  return from_lane(value, lane_number() ^ mask);
}
template <class T>
static T __shfl_down_sync(unsigned, T value, int delta, int = WARP) {
  int lane = lane_number() + delta;
  return from_lane(value, lane < WARP ? lane : lane_number());
}

static inline int __any_sync(unsigned, int condition) {
  struct Vote { int condition; } mine{condition};
  as_warp(mine, [](Vote** all) {
    int any = 0;
    for (int i = 0; i < WARP; ++i) any |= all[i]->condition;
    for (int i = 0; i < WARP; ++i) all[i]->condition = any;
  });
  return mine.condition;
}

static inline void ptx_mad_wide_s32(size_t& result, int a, int b, size_t c) {
  result = (size_t)((int64_t)a * b) + c;
}
// The first operand goes to the upper half.
template <class T>
static void ptx_cvt_rn_x2(unsigned& result, float upper, float lower) {
  T pair[2] = {T(lower), T(upper)};
  std::memcpy(&result, pair, 4);
}

// Addresses of shared memory have 32 bits, from the first byte of dynamic shared memory on.
static inline unsigned __cvta_generic_to_shared(const void* address) {
  return (const unsigned char*)address - buf_dyn_shmem_ptr;
}
static inline unsigned char* shared(unsigned address, int bytes) {
  if (address % bytes) fail("uses shared memory at an address that is not aligned");
  if (address + bytes > sizeof buf_dyn_shmem_ptr) fail("is beyond shared memory");
  return buf_dyn_shmem_ptr + address;
}

struct Copy {
  void* tile;
  const void* row;
  int bytes, read;
};
// Copies under way, and where each group of them begins; the last group is not committed.
struct Copies {
  std::vector<Copy> copies;
  std::vector<size_t> groups;
};
static Copies copies_of[MOST_THREADS];
// Whether a thread's copies landed since its last fence for the hardware that reads by itself.
static bool unfenced[MOST_THREADS];
static inline void forget_copies();
static inline void ptx_fence_proxy_async_shared_cta() { unfenced[thread_number()] = false; }

static inline void ptx_cp_async(unsigned address, const void* row, int bytes, int read = -1) {
  unsigned char* tile = shared(address, bytes);
  if ((size_t)row % bytes) fail("copies from an address that is not aligned");
  std::memset(tile, POISON, bytes);
  copies_of[thread_number()].copies.push_back({tile, row, bytes, read < 0 ? bytes : read});
}
static inline void ptx_cp_async_commit_group() {
  Copies& own = copies_of[thread_number()];
  own.groups.push_back(own.copies.size());
}
// Waits until at most so many of the latest groups are under way.
static inline void ptx_cp_async_wait_group(int latest) {
  Copies& own = copies_of[thread_number()];
  int landing = (int)own.groups.size() - latest;
  if (landing <= 0) return;
  size_t landed = own.groups[landing - 1];
  for (size_t i = 0; i < landed; ++i) {
    const Copy& copy = own.copies[i];
    std::memcpy(copy.tile, copy.row, copy.read);
    std::memset((char*)copy.tile + copy.read, 0, copy.bytes - copy.read);
    unfenced[thread_number()] = true;
  }
  own.copies.erase(own.copies.begin(), own.copies.begin() + landed);
  own.groups.erase(own.groups.begin(), own.groups.begin() + landing);
  for (size_t& end : own.groups) end -= landed;
}
static inline void ptx_cp_async_wait_all() {
  ptx_cp_async_commit_group();
  ptx_cp_async_wait_group(0);
}
// Too weak by one group, as a mistake.
static inline void ptx_cp_async_wait_group_but_one(int latest) {
  ptx_cp_async_wait_group(latest + 1);
}
static inline void ptx_cp_async_wait_all_but_one() {
  ptx_cp_async_commit_group();
  ptx_cp_async_wait_group(1);
}

// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8 and gets two elements of each.
template <bool TRANSPOSED, class... Held>
static inline void ptx_ldmatrix(unsigned address, Held&... held) {
  constexpr int MATRICES = sizeof...(held);
  struct Load { unsigned address; uint16_t elements[2 * MATRICES]; } mine{address, {}};
  as_warp(mine, [](Load** all) {
    for (int matrix = 0; matrix < MATRICES; ++matrix)
      for (int r = 0; r < 8; ++r) {
        uint16_t row[8];
        std::memcpy(row, shared(all[matrix * 8 + r]->address, 16), 16);
        for (int c = 0; c < 8; ++c) {
          int lane = TRANSPOSED ? c * 4 + r / 2 : r * 4 + c / 2;
          all[lane]->elements[2 * matrix + (TRANSPOSED ? r : c) % 2] = row[c];
        }
      }
  });
  int matrix = 0;
  (std::memcpy(&held, mine.elements + 2 * matrix++, 4), ...);
}

// mma.m16n8k16: every lane gives its parts of A, B and C, and gets four elements of D.
template <class T>
static void ptx_mma_m16n8k16(
    float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
    unsigned b0, unsigned b1, float c0, float c1, float c2, float c3) {
  struct Parts { unsigned a[4], b[2]; float c[4]; } mine{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  as_warp(mine, [](Parts** all) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < WARP; ++lane) {
      T a[8], b[4];
      std::memcpy(a, all[lane]->a, 16);
      std::memcpy(b, all[lane]->b, 8);
      for (int i = 0; i < 8; ++i)
        left[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = a[i];
      for (int i = 0; i < 4; ++i) right[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = b[i];
    }
    for (int lane = 0; lane < WARP; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k)
          all[lane]->c[i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
  });
  d0 = mine.c[0], d1 = mine.c[1], d2 = mine.c[2], d3 = mine.c[3];
}

// wgmma.m64nNk16, of four warps: sums are not there before the wait for them.
struct Sums {
  std::vector<float*> places;
  std::vector<float> values;
  bool begun;
  size_t products;
};
static Sums sums_of[MOST_THREADS];
static inline void forget_copies() {
  copies_of[thread_number()] = {};
  unfenced[thread_number()] = false;
  sums_of[thread_number()] = {};
}
static inline void ptx_wgmma_fence_sync_aligned() { sums_of[thread_number()].begun = true; }
static inline void ptx_wgmma_commit_group_sync_aligned() {}
static inline void ptx_wgmma_wait_group_sync_aligned(int latest) {
  if (latest) fail("waits for some of its products only, which is not emulated");
  Sums& own = sums_of[thread_number()];
  for (size_t i = 0; i < own.places.size(); ++i) *own.places[i] = own.values[i];
  own = {{}, {}, false, own.products};
}
// An element of what a descriptor leads to: rows of 128 bytes, eight of them permuted.
template <class T>
static T described(uint64_t descriptor, int row, int column, bool along_rows) {
  if (descriptor >> 62 != 1) fail("multiplies a tile that is not in permuted panels");
  int panel = (descriptor >> 16 & 0x3fff) << 4, eight = (descriptor >> 32 & 0x3fff) << 4;
  unsigned address = (descriptor & 0x3fff) << 4;
  if (address % 32 || panel % 16 || eight % 1024) fail("multiplies a tile that is not aligned");
  address += row / 8 * eight + row % 8 * 128;
  address += along_rows ? column * 2 : column / 64 * panel + column % 64 * 2;
  T element;
  std::memcpy(&element, shared(address ^ (address >> 3 & 0x70), 2), 2);
  return element;
}
// The four warps of a group need not be at a product at the same time, but at the same products.
constexpr int MOST_PRODUCTS = 1 << 16;
struct Products {
  int block;
  size_t count;
  uint64_t left[MOST_PRODUCTS], right[MOST_PRODUCTS];
};
static Products products_of[MOST_THREADS / GROUP];
UNSEEN static void as_its_group(size_t number, uint64_t left, uint64_t right) {
  int group = thread_number() / GROUP;
  if ((group + 1) * GROUP > thread_count) fail("is of a group of fewer than four warps");
  Products& seen = products_of[group];
  if (seen.block != blockIdx.x + 1) seen.block = blockIdx.x + 1, seen.count = 0;
  if (number == MOST_PRODUCTS) fail("multiplies more often than is emulated");
  if (seen.count == number) {
    seen.left[number] = left, seen.right[number] = right;
    ++seen.count;
  }
  if (seen.left[number] != left || seen.right[number] != right)
    fail("multiplies other tiles than its group");
}
UNSEEN static void check_fences() {
  for (int thread = 0; thread < thread_count; ++thread)
    if (unfenced[thread]) fail("multiplies what was copied without a fence after");
}
template <class T, int COLUMNS, bool IN_REGISTERS, int TRANSPOSED, int LEFT>
static void ptx_wgmma(
    float* const (&sums)[COLUMNS / 2], const uint64_t (&left)[LEFT], uint64_t right, bool onto) {
  struct Parts { uint64_t left[LEFT], right; float c[COLUMNS / 2]; } mine;
  Sums& own = sums_of[thread_number()];
  if (!own.begun) fail("multiplies in a group without a fence before");
  check_fences();
  as_its_group(own.products++, IN_REGISTERS ? 0 : left[0], right);
  std::memcpy(mine.left, left, sizeof left);
  mine.right = right;
  for (int i = 0; i < COLUMNS / 2; ++i) {
    bool known = (size_t)i < own.places.size();
    if (known && own.places[i] != sums[i]) fail("begins with other sums while some are not there");
    mine.c[i] = !onto ? 0 : known ? own.values[i] : *sums[i];
  }
  as_warp(mine, [](Parts** all) {
    float a[16][16], b[16][COLUMNS];
    int first = threadIdx.y % 4 * 16;
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < COLUMNS; ++n)
        b[k][n] = TRANSPOSED ? described<T>(all[0]->right, k, n, false)
                             : described<T>(all[0]->right, n, k, true);
      if constexpr (!IN_REGISTERS)
        for (int i = 0; i < 16; ++i) a[i][k] = described<T>(all[0]->left[0], first + i, k, true);
    }
    if constexpr (IN_REGISTERS)
      for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i) {
          T two[2];
          std::memcpy(two, &all[lane]->left[i], 4);
          for (int j = 0; j < 2; ++j)
            a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + j] = two[j];
        }
    for (int lane = 0; lane < WARP; ++lane)
      for (int i = 0; i < COLUMNS / 2; ++i) {
        int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) all[lane]->c[i] += a[row][k] * b[k][column];
      }
  });
  own.places.assign(sums, sums + COLUMNS / 2);
  own.values.assign(mine.c, mine.c + COLUMNS / 2);
  for (float* place : sums) std::memset(place, POISON, 4);
}
