// Rows of logits: how they are read, and the running maximum and sum of a softmax.
#pragma once

#include <limits>

#include "row.cuh"
#include "syntonic_softmax.h"

namespace syntonic {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// The larger number, or NaN if either is: what CUDA's own maximum drops.
template <class A>
__device__ A larger(A a, A b) {
  return b > a || b != b ? b : a;
}

// The largest of some numbers, and the sum of their exponentials relative to it. Without any number
// the sum is 0; where all are -inf it is not, so that the two can be told apart.
template <class A>
struct MaxSum {
  static constexpr bool kCommutes = false;
  A max = -kInfinity<A>;
  A sum = 0;

  // What exponentials are taken relative to: exp(-inf - -inf) would be NaN.
  __device__ static A base(A max) { return max == -kInfinity<A> ? A(0) : max; }
  // Brings a sum relative to `max` to one relative to `total`.
  __device__ static A factor(A max, A total) {
    return max == total ? A(1) : exp(max - base(total));
  }

  __device__ static MaxSum merge(const MaxSum& a, const MaxSum& b) {
    const A max = larger(a.max, b.max);
    return {max, a.sum * factor(a.max, max) + b.sum * factor(b.max, max)};
  }

  // For a sum relative to `max`: what turns exp(z - base(max)) into probabilities.
  __device__ A share(A max) const {
    if (sum == A(0)) return A(0);
    if (this->max == -kInfinity<A>) return kNaN<A>;
    return factor(max, this->max) / sum;
  }
};

// Of K packs, of which the elements that count have their bit in `present`; the others are -inf.
template <class A, int K, int N>
__device__ MaxSum<A> max_sum_of(const A (&z)[K][N], const uint32_t (&present)[K]) {
  MaxSum<A> found;
  uint32_t any = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    any |= present[k];
#pragma unroll
    for (int e = 0; e < N; ++e) found.max = larger(found.max, z[k][e]);
  }
  const A base = MaxSum<A>::base(found.max);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int e = 0; e < N; ++e) found.sum += exp(z[k][e] - base);
  }
  if (any && found.max == -kInfinity<A>) found.sum = A(1);
  return found;
}

// The packs of a row, dealt out to the threads of a team in turns.
template <int N>
struct RowAccess {
  int64_t start;  // of the row, or of the pack of the array that it begins in
  int begin = 0;  // elements from start to the row
  int end;        // and to the end of the row
  int limit = 0;  // packs of the array may be read up to here; 0: not by packs of the array
  bool vector;    // rows are whole packs

  // Rows that do not exist are empty. `shifted`: rows of other than whole packs may be read by the
  // packs of the array.
  __device__ RowAccess(bool vector, bool shifted, int64_t row, int64_t rows, int width)
      : start(row < rows ? row * width : 0), end(row < rows ? width : 0), vector(vector) {
    if (vector || !shifted || end == 0) return;
    begin = static_cast<int>(start % N);
    start -= begin;
    end += begin;
    const int64_t rest = rows * width - start;
    limit = rest < end + N ? static_cast<int>(rest) : end + N;
  }

  __device__ int turns(const Team& team) const {
    return (end + N * team.size - 1) / (N * team.size);
  }

  __device__ Span at(int turn, const Team& team) const {
    if (limit) return {(turn * team.size + team.rank) * N, 1, end, begin, limit};
    return span<N>(vector, turn, team.size, team.rank, end);
  }
};

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
};

template <class A>
__device__ A log_weight(A weight, A scale) {
  return scale * log(larger(A(1e-10), weight));
}

// Which elements of a pack there are, a bit for each, and which of them count.
template <int N>
__device__ uint32_t present_in(const uint8_t* mask, int64_t start, const Span& at, bool vector) {
  uint32_t bits = 0;
  if (vector) {
    if (at.first >= at.end) return 0;
    if (!mask) return (1u << N) - 1;
    const uint8_t* bytes = mask + start + at.first;
    uint32_t word[(N + 3) / 4];
    if constexpr (N == 2) {
      word[0] = __ldg(reinterpret_cast<const uint16_t*>(bytes));
    } else {
      load_words<Cache::keep>(bytes, word);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) bits |= (word[e / 4] >> e % 4 * 8 & 1u) << e;
    return bits;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (!at.holds(e)) continue;
    bits |= mask ? (__ldg(mask + start + at.first + e * at.step) & 1u) << e : 1u << e;
  }
  return bits;
}

// Whether the label of a row is a class that counts.
template <class T>
__device__ bool label_counts(const Logits<T>& from, int64_t row, int width, int label) {
  if (static_cast<unsigned>(label) >= static_cast<unsigned>(width)) return false;
  return !from.mask || from.mask[row * width + label];
}

// z of a pack but for the bias.
template <class T, int N>
__device__ void load_unbiased(const Logits<T>& from, Acc<T> scale, int64_t start, const Span& at,
                              bool vector, Acc<T> (&z)[N]) {
  unpack(load<T, N, Cache::keep>(from.x + start, at, vector), z);
  if (!from.weights) return;
  Acc<T> weight[N];
  unpack(load<T, N, Cache::keep>(from.weights + start, at, vector), weight);
#pragma unroll
  for (int e = 0; e < N; ++e) z[e] += log_weight(weight[e], scale);
}

template <class A, int N>
__device__ void hide_absent(uint32_t present, A (&z)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) z[e] = present >> e & 1 ? z[e] : -kInfinity<A>;
}

// z of a pack of a row, -inf where an element does not count; `parameters`: where those of the
// elements that begin at `start` do. Returns which elements count.
template <class T, int N>
__device__ uint32_t load_logits(const Logits<T>& from, Acc<T> scale, int64_t start,
                                int64_t parameters, const Span& at, bool vector, Acc<T> (&z)[N]) {
  const uint32_t present = present_in<N>(from.mask, start, at, vector);
  load_unbiased(from, scale, start, at, vector, z);
  if (from.bias) {
    Acc<T> bias[N];
    load_parameter(from.bias + parameters, at, vector, bias);
#pragma unroll
    for (int e = 0; e < N; ++e) z[e] += bias[e];
  }
  hide_absent(present, z);
  return present;
}

// Whether rows are whole packs in aligned memory; masks are bytes, of which a pack has fewer.
template <class T, class... P>
bool whole_packs(const SoftmaxLogits& logits, int64_t length, const P*... others) {
  return length % kVector<T> == 0 &&
         all_aligned(logits.x, logits.bias, logits.weights, logits.mask, others...);
}

// Whether rows may be held in registers. Those of float64 are all streamed: fewer kernels to build.
template <class T>
constexpr bool kHeld = sizeof(T) < 8;

// Teams for rows that are streamed through, a few packs of a thread at a time.
constexpr int kStreamPacks = 4;

template <class T>
RowPlan plan_stream(int64_t width) {
  const int64_t threads = ceil_div(width, int64_t{kVector<T>} * kStreamPacks);
  int team = 1;
  while (team < threads && team < kMaxThreads) team *= 2;
  return {0, std::max(team, 128), team};
}

inline Grid grid_of_rows(const RowPlan& plan, int64_t rows) {
  const int cluster = cluster_size(plan);
  return {ceil_div(rows, teams_per_block(plan)) * cluster, plan.threads, cluster};
}

}  // namespace syntonic
