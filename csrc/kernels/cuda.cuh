// Shared by the CUDA twins. Compiled with -fmad=false, so that products and sums round as the
// reference's do.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

namespace helios {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return __float2half_rn(x);
}

// torch rounds float64 to 16 bits through float32.
template <typename T>
__device__ __forceinline__ T from_double(double x) {
  return from_float<T>(static_cast<float>(x));
}

template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <typename T>
__device__ __forceinline__ T* row_at(const Rows& rows, std::int64_t batch, std::int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

// Two 16-bit numbers in a word: converted, multiplied and compared by one instruction for both.
template <typename T>
struct Pair;

template <>
struct Pair<BFloat16> {
  using Two = __nv_bfloat162;
  static __device__ __forceinline__ Two of(float low, float high) {
    return __floats2bfloat162_rn(low, high);
  }
  // A bfloat16 is the upper half of its float32.
  static __device__ __forceinline__ float low(std::uint32_t bits) { return as_float(bits << 16); }
  static __device__ __forceinline__ float high(std::uint32_t bits) {
    return as_float(bits & 0xffff0000u);
  }
  static __device__ __forceinline__ float as_float(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <>
struct Pair<Float16> {
  using Two = __half2;
  static __device__ __forceinline__ Two of(float low, float high) {
    return __floats2half2_rn(low, high);
  }
  static __device__ __forceinline__ float low(std::uint32_t bits) { return __low2float(two(bits)); }
  static __device__ __forceinline__ float high(std::uint32_t bits) {
    return __high2float(two(bits));
  }
  static __device__ __forceinline__ Two two(std::uint32_t bits) {
    Two value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <typename T>
__device__ __forceinline__ std::uint32_t packed(float low, float high) {
  const auto two = Pair<T>::of(low, high);
  std::uint32_t bits;
  memcpy(&bits, &two, sizeof bits);
  return bits;
}

template <typename T, typename Operation>
__device__ __forceinline__ std::uint32_t on_pairs(std::uint32_t a, std::uint32_t b,
                                                  Operation operation) {
  typename Pair<T>::Two first, second;
  memcpy(&first, &a, sizeof first), memcpy(&second, &b, sizeof second);
  const typename Pair<T>::Two result = operation(first, second);
  std::uint32_t bits;
  memcpy(&bits, &result, sizeof bits);
  return bits;
}

// Both products, each rounded once: that of two 16-bit numbers fits a float32, so this is what
// multiplying in float32 and rounding gives.
template <typename T>
__device__ __forceinline__ std::uint32_t product_of_pairs(std::uint32_t a, std::uint32_t b) {
  return on_pairs<T>(a, b, [](auto x, auto y) { return __hmul2(x, y); });
}

template <typename T>
__device__ __forceinline__ std::uint32_t sum_of_pairs(std::uint32_t a, std::uint32_t b) {
  return on_pairs<T>(a, b, [](auto x, auto y) { return __hadd2(x, y); });
}

// The larger or the smaller ones, or NaN where one of the two is.
template <typename T>
__device__ __forceinline__ std::uint32_t larger_of_pairs(std::uint32_t a, std::uint32_t b) {
  return on_pairs<T>(a, b, [](auto x, auto y) { return __hmax2_nan(x, y); });
}
template <typename T>
__device__ __forceinline__ std::uint32_t smaller_of_pairs(std::uint32_t a, std::uint32_t b) {
  return on_pairs<T>(a, b, [](auto x, auto y) { return __hmin2_nan(x, y); });
}

// Sixteen bytes as they lie in memory. A struct assigned as a whole would compile to 32-bit
// accesses, hence uint4; and the compiler splits some stores of a uint4 into words, hence the
// instruction by name. It does not tell the compiler that memory changes, which would order later
// loads behind it: kernels load all they need before they store, and read nothing back.
template <typename T>
__device__ __forceinline__ uint4 load_bits(const T* from) {
  return *reinterpret_cast<const uint4*>(from);
}

template <typename T>
__device__ __forceinline__ void store_bits(T* to, uint4 bits) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w));
#else
  *reinterpret_cast<uint4*>(to) = bits;
#endif
}

// The numbers of sixteen bytes in float32.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  float values[kSize];

  __device__ __forceinline__ void set(uint4 bits) {
    const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        memcpy(&values[i], &words[i], sizeof(float));
      } else {
        values[2 * i] = Pair<T>::low(words[i]), values[2 * i + 1] = Pair<T>::high(words[i]);
      }
    }
  }

  __device__ __forceinline__ uint4 bits() const {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        memcpy(&words[i], &values[i], sizeof(float));
      } else {
        words[i] = packed<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ __forceinline__ void load(const T* from) { set(load_bits(from)); }
  __device__ __forceinline__ void store(T* to) const { store_bits(to, bits()); }

  // Every number rounded to T and back.
  __device__ __forceinline__ void round() {
    if constexpr (sizeof(T) < 4) set(bits());
  }
};

// a * b + c. In 16 bits the product is not rounded by itself, which saves an instruction and
// decides ties alone; float32 rounds twice, as the reference does.
template <typename T>
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  if constexpr (sizeof(T) < 4) return __fmaf_rn(a, b, c);
  return a * b + c;
}

// 2^x and 1 / x to about 1e-7 relative, an instruction each; subnormal numbers count as zero.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// kSize float32 values from 16-byte aligned memory.
template <int kSize>
__device__ __forceinline__ void load_floats(float* to, const float* from) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const float4 part = *reinterpret_cast<const float4*>(from + i);
    to[i] = part.x, to[i + 1] = part.y, to[i + 2] = part.z, to[i + 3] = part.w;
  }
}

// The sum over the block's threads, on all of them, in a fixed order. scratch holds a float per
// warp and must not be that of the block's sum before: with two in turns one barrier each is
// enough.
template <int kWarps>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

inline bool is_aligned(const void* x) { return reinterpret_cast<std::uintptr_t>(x) % 16 == 0; }

// True where every row starts on sixteen bytes.
inline bool has_aligned_rows(const Rows& rows, std::int64_t element_size) {
  return is_aligned(rows.data) && rows.batch_stride * element_size % 16 == 0 &&
         rows.row_stride * element_size % 16 == 0;
}

#ifndef HELIOS_MAX_GRID
#define HELIOS_MAX_GRID (1 << 20)
#endif
// Kernels stride over what a grid of this size does not cover.
constexpr int kMaxGridBlocks = HELIOS_MAX_GRID;

inline int grid_for(std::int64_t items) {
  return static_cast<int>(items < kMaxGridBlocks ? items : kMaxGridBlocks);
}

// Blocks for items in two dimensions; the second one is small.
inline dim3 grid_for(std::int64_t items, std::int64_t groups) {
  constexpr std::int64_t kMaxGroups = kMaxGridBlocks < 65535 ? kMaxGridBlocks : 65535;
  return dim3(static_cast<unsigned>(grid_for(items)),
              static_cast<unsigned>(groups < kMaxGroups ? groups : kMaxGroups));
}

// Enqueues one kernel; finish() says whether it could be.
template <typename... Params>
void launch(void (*kernel)(Params...), dim3 blocks, int threads, cudaStream_t stream,
            const std::common_type_t<Params>&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  (void)cudaLaunchKernelEx(&config, kernel, args...);
}

inline int finish() { return static_cast<int>(cudaGetLastError()); }

#define HELIOS_FOR_DTYPE(dtype, run, args, stream) \
  switch (dtype) {                                 \
    case DType::kFloat32:                          \
      return run<float>(args, stream);             \
    case DType::kBFloat16:                         \
      return run<BFloat16>(args, stream);          \
    case DType::kFloat16:                          \
      return run<Float16>(args, stream);           \
  }                                                \
  return static_cast<int>(cudaErrorInvalidValue);

}  // namespace helios
