// Sixteen floats at a time, with the compiler's vector types: one body of code for whole lanes and
// for the elements left over, and sums that do not wait for one addition after another.

#pragma once

#include "cpu.h"

#ifdef __AVX512F__
#include <immintrin.h>  // for conversions alone: the compiler splits those of its own vectors
#endif

#define HELIOS_INLINE inline __attribute__((always_inline))

namespace helios {
namespace HELIOS_ISA {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t LaneBits __attribute__((vector_size(64)));
typedef uint16_t LaneHalves __attribute__((vector_size(32)));

template <typename V>
struct Kind {
  typedef V type;
};

// x[i] as V: one element or sixteen, in float32.
template <typename V, typename T>
struct Access {
  static HELIOS_INLINE V load(const T* x) { return to_float(*x); }
  static HELIOS_INLINE void store(T* x, V value) { *x = from_float<T>(value); }
};

template <>
struct Access<Lanes, float> {
  static HELIOS_INLINE Lanes load(const float* x) {
    Lanes value;
    memcpy(&value, x, sizeof value);
    return value;
  }
  static HELIOS_INLINE void store(float* x, Lanes value) { memcpy(x, &value, sizeof value); }
};

// The upper halves of sixteen words, and back.
HELIOS_INLINE LaneBits widen(LaneHalves halves) {
#ifdef __AVX512F__
  return (LaneBits)_mm512_cvtepu16_epi32((__m256i)halves) << 16;
#else
  return __builtin_convertvector(halves, LaneBits) << 16;
#endif
}

HELIOS_INLINE LaneHalves narrow(LaneBits bits) {
#ifdef __AVX512F__
  return (LaneHalves)_mm512_cvtepi32_epi16((__m512i)(bits >> 16));
#else
  return __builtin_convertvector(bits >> 16, LaneHalves);
#endif
}

// The bits of a float rounded to bfloat16, in their upper halves; the lower ones hold anything.
HELIOS_INLINE LaneBits round_to_bfloat16(Lanes value) {
  const LaneBits bits = (LaneBits)value;
  const LaneBits nan = bits * 0u + 0x7fc00000u;
  return value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : nan;
}

template <>
struct Access<Lanes, BFloat16> {
  static HELIOS_INLINE Lanes load(const BFloat16* x) {
    LaneHalves halves;
    memcpy(&halves, x, sizeof halves);
    return (Lanes)widen(halves);
  }
  static HELIOS_INLINE void store(BFloat16* x, Lanes value) {
    const LaneHalves halves = narrow(round_to_bfloat16(value));
    memcpy(x, &halves, sizeof halves);
  }
};

template <>
struct Access<Lanes, Float16> {
  static HELIOS_INLINE Lanes load(const Float16* x) {
#ifdef __AVX512F__
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#else
    Lanes value;
    for (int64_t i = 0; i < kLanes; ++i) value[i] = to_float(x[i]);
    return value;
#endif
  }
  static HELIOS_INLINE void store(Float16* x, Lanes value) {
#ifdef __AVX512F__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                        _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int64_t i = 0; i < kLanes; ++i) x[i] = from_float<Float16>(value[i]);
#endif
  }
};

template <typename V, typename T>
HELIOS_INLINE V load(const T* x) {
  return Access<V, T>::load(x);
}
template <typename V, typename T>
HELIOS_INLINE void store(T* x, V value) {
  Access<V, T>::store(x, value);
}

// Rounded to T and back.
template <typename T, typename V>
struct Rounding {
  static HELIOS_INLINE V round(V value) {
    T kept[sizeof(V) / sizeof(float)];
    store(kept, value);
    return load<V>(kept);
  }
};

template <>
struct Rounding<BFloat16, Lanes> {
  static HELIOS_INLINE Lanes round(Lanes value) {
    // A NaN stays one: those of arithmetic on bfloat16 have nothing in their lower halves to carry
    // over.
    const LaneBits bits = (LaneBits)value;
    return (Lanes)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  }
};

template <typename T, typename V>
HELIOS_INLINE V rounded_to(V value) {
  return Rounding<T, V>::round(value);
}

// a * b + c, rounded once where the instruction set can; for what is an approximation anyway.
HELIOS_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
HELIOS_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#ifdef __AVX512F__
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// 1 / x of finite x, in lanes to about 1e-7 relative: dividing takes several times as long.
HELIOS_INLINE float reciprocal(float x) { return 1.0f / x; }
HELIOS_INLINE Lanes reciprocal(Lanes x) {
#ifdef __AVX512F__
  const Lanes guess = (Lanes)_mm512_rcp14_ps((__m512)x);
  return multiply_add(guess, 1.0f - x * guess, guess);
#else
  return 1.0f / x;
#endif
}

HELIOS_INLINE float power_of_two(float whole) {
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float factor;
  memcpy(&factor, &bits, sizeof factor);
  return factor;
}

HELIOS_INLINE Lanes power_of_two(Lanes whole) {
  typedef int32_t LaneInts __attribute__((vector_size(64)));
  return (Lanes)((LaneBits)(__builtin_convertvector(whole, LaneInts) + 127) << 23);
}

// e^x to about 2e-7 relative, so that silu needs no vector math library.
template <typename V>
HELIOS_INLINE V exponential(V x) {
  const V low = V{} - 87.0f, high = V{} + 88.0f;
  const V clamped = x < -87.0f ? low : (x > 88.0f ? high : x);
  const V numbers = clamped == clamped ? clamped : low;  // a NaN has no whole part
  const V whole = (numbers * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const V upper = V{} - 0.693359375f, lower = V{} + 2.12194440e-4f, one = V{} + 1.0f;
  const V rest = multiply_add(whole, lower, multiply_add(whole, upper, numbers));
  V power = multiply_add(rest, V{} + 1.9875691500e-4f, V{} + 1.3981999507e-3f);
  power = multiply_add(power, rest, V{} + 8.3334519073e-3f);
  power = multiply_add(power, rest, V{} + 4.1665795894e-2f);
  power = multiply_add(power, rest, V{} + 1.6666665459e-1f);
  power = multiply_add(power, rest, V{} + 5.0000001201e-1f);
  power = multiply_add(power, rest * rest, rest + one);
  return x == x ? power * power_of_two(whole) : x;
}

// x[c] + (bias + residual), rounded once; null where there is none of them.
template <typename V, typename T>
HELIOS_INLINE V sum_at(const T* x, const T* bias, const T* residual, int64_t c) {
  V added = {};
  if (bias != nullptr) added = added + load<V>(bias + c);
  if (residual != nullptr) added = added + load<V>(residual + c);
  return rounded_to<T>(load<V>(x + c) + added);
}

#ifdef __AVX512F__
// The same with what this instruction set has for it: scaling by a power of two, limits that keep
// NaN.
HELIOS_INLINE Lanes exponential(Lanes x) {
  const __m512 limited =
      _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), (__m512)x));
  const __m512 whole = _mm512_roundscale_ps(
      _mm512_mul_ps(limited, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  const auto fused = [](__m512 a, __m512 b, float c) {
    return _mm512_fmadd_ps(a, b, _mm512_set1_ps(c));
  };
  __m512 rest = _mm512_fmadd_ps(whole, _mm512_set1_ps(-0.693359375f), limited);
  rest = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), rest);
  __m512 power = fused(rest, _mm512_set1_ps(1.9875691500e-4f), 1.3981999507e-3f);
  power = fused(power, rest, 8.3334519073e-3f);
  power = fused(power, rest, 4.1665795894e-2f);
  power = fused(power, rest, 1.6666665459e-1f);
  power = fused(power, rest, 5.0000001201e-1f);
  power = fused(power, rest, 1.0f);
  power = fused(power, rest, 1.0f);
  return (Lanes)_mm512_scalef_ps(power, whole);
}
#endif

// body(kind, i) for all i below n: in lanes, then one by one; kind's type says which.
template <typename Body>
HELIOS_INLINE void for_each(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(Kind<Lanes>(), i);
  for (; i < n; ++i) body(Kind<float>(), i);
}

// The sum of term(kind, i), four lanes under way at once.
template <typename Term>
HELIOS_INLINE float sum_of(int64_t n, Term term) {
  Lanes sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int64_t k = 0; k < 4; ++k) sums[k] += term(Kind<Lanes>(), i + k * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] += term(Kind<Lanes>(), i);
  Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  all += __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  all += __builtin_shufflevector(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all += __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  float result = all[0];
  for (; i < n; ++i) result += term(Kind<float>(), i);
  return result;
}

}  // namespace HELIOS_ISA
}  // namespace helios
