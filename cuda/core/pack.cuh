// Elements in registers: types, and conversion to and from the accumulation type.
//
// A pack is what a thread moves in one go: 16 bytes of the data type, kept as 32-bit words so that
// a row held in registers takes no more of them than it takes bytes in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "core/types.h"

namespace syntonic {

using f16 = __half;
using bf16 = __nv_bfloat16;

// The type in which statistics and transcendental functions of T are computed.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements in a pack.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
constexpr DType kDType = std::is_same_v<T, f16>    ? DType::f16
                         : std::is_same_v<T, bf16> ? DType::bf16
                         : sizeof(T) == 4          ? DType::f32
                                                   : DType::f64;

template <class T>
struct Type {
  using type = T;
};

// Calls f with the C++ type of dtype: the one place where a run-time type becomes a static one.
template <class F>
Status with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16:
      return f(Type<f16>{});
    case DType::bf16:
      return f(Type<bf16>{});
    case DType::f32:
      return f(Type<float>{});
    case DType::f64:
      return f(Type<double>{});
  }
  return cudaErrorInvalidValue;
}

// N elements of T.
template <class T, int N>
struct Packed {
  static_assert(N * sizeof(T) % 4 == 0);
  uint32_t word[N * sizeof(T) / 4];
};

// Which of N elements count, a bit for each: all of them.
template <int N>
constexpr uint32_t kAll = (1u << N) - 1;

template <class A, int N>
__device__ void hide_absent(uint32_t present, A (&x)[N], A hidden) {
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = present >> e & 1 ? x[e] : hidden;
}

template <class T, int N, class A>
__device__ void unpack(const Packed<T, N>& packed, A (&x)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if constexpr (std::is_same_v<T, f16>) {
      const uint32_t word = packed.word[e / 2];
      x[e] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> e % 2 * 16)));
    } else if constexpr (std::is_same_v<T, bf16>) {
      const uint32_t word = packed.word[e / 2];
      x[e] = __uint_as_float(e % 2 ? word & 0xffff0000u : word << 16);
    } else if constexpr (std::is_same_v<T, float>) {
      x[e] = __uint_as_float(packed.word[e]);
    } else {
      x[e] = static_cast<A>(
          __hiloint2double(static_cast<int>(packed.word[2 * e + 1]), packed.word[2 * e]));
    }
  }
}

// Makes the compiler unpack these words again, where it would rather hold on to what it unpacked
// before: twice the registers, where T has 16 bits.
template <class T, int N>
__device__ void unpack_again(Packed<T, N>& packed) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 4); ++i) asm("" : "+r"(packed.word[i]));
#endif
}

// The number itself, of which the compiler does not know that it has it already.
__device__ inline int again(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Rounds once, to nearest even.
template <class T, class A>
__device__ T narrow(A x) {
  if constexpr (std::is_same_v<T, f16>) {
    if constexpr (std::is_same_v<A, double>) {
      return __double2half(x);
    } else {
      return __float2half_rn(x);
    }
  } else if constexpr (std::is_same_v<T, bf16>) {
    if constexpr (std::is_same_v<A, double>) {
      return __double2bfloat16(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  } else {
    return static_cast<T>(x);
  }
}

template <class T, int N, class A>
__device__ Packed<T, N> pack(const A (&x)[N]) {
  Packed<T, N> packed = {};
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if constexpr (std::is_same_v<T, float>) {
      packed.word[e] = __float_as_uint(static_cast<float>(x[e]));
    } else if constexpr (std::is_same_v<T, double>) {
      packed.word[2 * e] = static_cast<uint32_t>(__double2loint(x[e]));
      packed.word[2 * e + 1] = static_cast<uint32_t>(__double2hiint(x[e]));
    } else if (e % 2 == 0) {
      // Two at a time: there is one instruction that rounds a pair.
      if constexpr (std::is_same_v<A, float> && std::is_same_v<T, f16>) {
        const __half2 pair = __floats2half2_rn(x[e], x[e + 1]);
        packed.word[e / 2] = reinterpret_cast<const uint32_t&>(pair);
      } else if constexpr (std::is_same_v<A, float>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[e], x[e + 1]);
        packed.word[e / 2] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const T low = narrow<T>(x[e]), high = narrow<T>(x[e + 1]);
        packed.word[e / 2] = reinterpret_cast<const uint16_t&>(low) |
                             uint32_t{reinterpret_cast<const uint16_t&>(high)} << 16;
      }
    }
  }
  return packed;
}

}  // namespace syntonic
