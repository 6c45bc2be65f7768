// Logits: how they are read, and the running maximum and sum of a softmax over them.
#pragma once

#include <limits>

#include "engine/row_plan.cuh"
#include "ops/syntonic_softmax.h"

namespace syntonic {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// The larger number, or NaN if either is: what CUDA's own maximum drops.
template <class A>
__device__ A larger(A a, A b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<A, float>) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
  }
#endif
  return b > a || b != b ? b : a;
}

// 2^x by the device, subnormal results as zero.
__device__ inline float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// exp(x) for x <= 0, as precisely as results of type T show, times kLift<T>: for 16-bit types by
// the device's power of two, whose error is some 2^-20 of results that are not negligible. It is
// lifted so far that whatever T can hold of the exponential is no subnormal number here.
template <class T>
constexpr Acc<T> kLift = sizeof(T) > 2 ? 1 : 256;
constexpr float kLogTwo = 1.4426950408889634f;

template <class T>
__device__ Acc<T> lifted_exponential(Acc<T> x) {
  if constexpr (sizeof(T) > 2) {
    return exp(x);
  } else {
    return power_of_two(fmaf(x, kLogTwo, 8.f));
  }
}
template <class T>
__device__ Acc<T> exponential(Acc<T> x) {
  return lifted_exponential<T>(x) * (1 / kLift<T>);
}

// The same beside a sum of at least 1, where subnormal terms are negligible.
template <class T>
__device__ Acc<T> term(Acc<T> x) {
  if constexpr (sizeof(T) > 2) {
    return exp(x);
  } else {
    return power_of_two(x * kLogTwo);
  }
}

template <class A, int N>
__device__ void take_max(A& max, const A (&z)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) max = larger(max, z[e]);
}

// Element by element, without unpacking 16-bit types.
template <class T, int N>
__device__ void raise(Packed<T, N>& max, const Packed<T, N>& x) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, f16>) {
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(max.word[i]) : "r"(x.word[i]));
      } else {
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(max.word[i]) : "r"(x.word[i]));
      }
    }
    return;
  }
#endif
  Acc<T> highest[N], z[N];
  unpack(max, highest);
  unpack(x, z);
#pragma unroll
  for (int e = 0; e < N; ++e) highest[e] = larger(highest[e], z[e]);
  max = pack<T>(highest);
}
template <class T, int N>
__device__ Acc<T> largest(const Packed<T, N>& x) {
  Acc<T> z[N], max = -kInfinity<Acc<T>>;
  unpack(x, z);
  take_max(max, z);
  return max;
}

template <class T, int N>
__device__ void add_terms(Acc<T>& sum, Acc<T> base, const Acc<T> (&z)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) sum += term<T>(z[e] - base);
}

// The largest of some numbers, and the sum of their exponentials relative to it. Without any number
// the sum is 0; where all are -inf it is not, so that the two can be told apart.
template <class A>
struct MaxSum {
  A max = -kInfinity<A>;
  A sum = 0;

  // What exponentials are taken relative to: exp(-inf - -inf) would be NaN.
  __device__ static A base(A max) { return max == -kInfinity<A> ? A(0) : max; }
  // Brings a sum relative to `max` to one relative to `total`.
  __device__ static A factor(A max, A total) {
    return max == total ? A(1) : exp(max - base(total));
  }

  // With one exponential: the sum of the larger maximum stays as it is.
  __device__ static MaxSum merge(const MaxSum& a, const MaxSum& b) {
    const A max = larger(a.max, b.max);
    const bool first = a.max == max;
    const A by = factor(first ? b.max : a.max, max);
    return {max, first ? a.sum + b.sum * by : b.sum + a.sum * by};
  }

  // Makes room for numbers of which `highest` is the largest: returns what their terms are relative
  // to.
  __device__ A raise_to(A highest) {
    const A before = max;
    max = larger(max, highest);
    sum *= factor(before, max);
    return base(max);
  }

  // Takes in more numbers.
  template <class T, int K, int N>
  __device__ void extend(const A (&z)[K][N]) {
    A highest = -kInfinity<A>;
#pragma unroll
    for (int k = 0; k < K; ++k) take_max(highest, z[k]);
    const A base = raise_to(highest);
#pragma unroll
    for (int k = 0; k < K; ++k) add_terms<T>(sum, base, z[k]);
  }

  // For a sum relative to `max`: what turns exp(z - base(max)) into probabilities.
  __device__ A share(A max) const {
    if (sum == A(0)) return A(0);
    if (this->max == -kInfinity<A>) return kNaN<A>;
    return factor(max, this->max) / sum;
  }
};

// As for other monoids, but with one exponential: first the maximum, then the sum relative to it.
template <class A, class L>
__device__ MaxSum<A> across_lanes(const MaxSum<A>& value, L lanes, int first = 1) {
  MaxSum<A> total = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    if (step >= lanes) break;
    if (step < first) continue;
    total.max = larger(total.max, __shfl_xor_sync(0xffffffffu, total.max, step));
  }
  total.sum *= MaxSum<A>::factor(value.max, total.max);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    if (step >= lanes) break;
    if (step < first) continue;
    total.sum += __shfl_xor_sync(0xffffffffu, total.sum, step);
  }
  return total;
}

// Where something counts and all of it is -inf, the sum is not 0.
template <class A>
__device__ void tell_apart(MaxSum<A>& found, bool any) {
  if (any && found.max == -kInfinity<A>) found.sum = A(1);
}

template <class T>
struct Logits {
  using A = Acc<T>;

  explicit Logits(const SoftmaxLogits& logits)
      : x(static_cast<const T*>(logits.x)),
        bias(static_cast<const A*>(logits.bias)),
        weights(static_cast<const T*>(logits.weights)),
        scale(static_cast<const A*>(logits.scale)),
        mask(static_cast<const uint8_t*>(logits.mask)) {}

  const T* x;
  const A* bias;
  const T* weights;
  const A* scale;
  const uint8_t* mask;

  __device__ A scale_of(int64_t group) const { return weights ? scale[group] : A(0); }
};

// Whether z is x and everything counts.
inline bool plain(const SoftmaxLogits& logits) {
  return !logits.bias && !logits.weights && !logits.mask;
}

template <class A>
__device__ A log_weight(A weight, A scale) {
  return scale * log(larger(A(1e-10), weight));
}

// Which of N elements count, a bit for each.
template <int N>
__device__ uint32_t read_mask(const uint8_t* mask) {
  uint32_t bits = 0;
  if (reinterpret_cast<uintptr_t>(mask) % N == 0) {
    uint32_t word[(N + 3) / 4];
    if constexpr (N == 2) {
      word[0] = __ldg(reinterpret_cast<const uint16_t*>(mask));
    } else {
      load_words<Cache::keep>(mask, word);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) bits |= (word[e / 4] >> e % 4 * 8 & 1u) << e;
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) bits |= (__ldg(mask + e) & 1u) << e;
  }
  return bits;
}

// A pack of -inf.
template <class T, int N>
__device__ Packed<T, N> lowest_pack() {
  Acc<T> x[N];
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = -kInfinity<Acc<T>>;
  return pack<T>(x);
}

// Adds the weights of a pack, and hides what of it does not count. Returns which elements do.
template <class T, int N>
__device__ uint32_t weigh(const Logits<T>& from, Acc<T> scale, int64_t element, Acc<T> (&z)[N]) {
  if (from.weights) {
    Acc<T> weight[N];
    unpack(read_pack<T, N>(from.weights + element), weight);
#pragma unroll
    for (int e = 0; e < N; ++e) z[e] += log_weight(weight[e], scale);
  }
  if (!from.mask) return kAll<N>;
  const uint32_t present = read_mask<N>(from.mask + element);
  hide_absent(present, z, -kInfinity<Acc<T>>);
  return present;
}

// Where a row begins: in the arrays, and in the parameters.
struct RowStart {
  int64_t elements;
  int64_t parameters;
  int width;
};

// z of the pack x, which begins with element `at` of a row: -inf where an element does not count.
// Returns which elements do.
template <bool kPlain, class T, int N>
__device__ uint32_t logits_of(const Logits<T>& from, Acc<T> scale, const RowStart& row, int at,
                              const Packed<T, N>& x, Acc<T> (&z)[N]) {
  unpack(x, z);
  if constexpr (kPlain) return kAll<N>;
  if (from.bias) {
    const Acc<T>* const bias_row = from.bias + row.parameters;
    Acc<T> bias[N];
    if (reinterpret_cast<uintptr_t>(bias_row + at) % 16 == 0) {
      load_parameter(bias_row, Span{at, 1, at + N}, true, bias);
    } else {
      load_parameter(bias_row, Part{at, kAll<N>}, row.width, bias);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) z[e] += bias[e];
  }
  return weigh(from, scale, row.elements + at, z);
}

// The logit of one element x, -inf if it does not count.
template <class T>
__device__ Acc<T> logit_of(const Logits<T>& from, Acc<T> scale, int64_t element, int64_t parameter,
                           T x, bool& present) {
  using A = Acc<T>;
  present = !from.mask || from.mask[element];
  if (!present) return -kInfinity<A>;
  A z = static_cast<A>(x);
  if (from.bias) z += from.bias[parameter];
  if (from.weights) z += log_weight(static_cast<A>(from.weights[element]), scale);
  return z;
}
template <class T>
__device__ Acc<T> logit_at(const Logits<T>& from, Acc<T> scale, const RowStart& row, int at,
                           bool& present) {
  const int64_t element = row.elements + at;
  return logit_of(from, scale, element, row.parameters + at, from.x[element], present);
}

// Whether the label of a row is a class that counts.
template <class T>
__device__ bool label_counts(const Logits<T>& from, int64_t row, int width, int label) {
  if (static_cast<unsigned>(label) >= static_cast<unsigned>(width)) return false;
  return !from.mask || from.mask[row * width + label];
}

// Whether the packs of a row may be held or staged, rather than read again. Those of float64 are
// all streamed: fewer kernels to build.
template <class T>
constexpr bool kHeld = sizeof(T) < 8;

}  // namespace syntonic
