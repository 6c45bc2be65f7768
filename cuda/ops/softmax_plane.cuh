// The logits of planes, along whose inner axes the rows lie.
#pragma once

#include "engine/planes.cuh"
#include "ops/softmax_row.cuh"

namespace syntonic {

// What is known of the logits of a plane.
template <bool kPlain, class T>
struct PlaneLogits {
  using A = Acc<T>;
  static constexpr int N = kVector<T>;
  const Logits<T>& from;
  A scale;
  int64_t parameters;

  __device__ PlaneLogits(const Logits<T>& from, const PlaneShape& shape, int64_t plane)
      : from(from) {
    const int64_t group = plane < shape.planes ? plane / shape.group_planes : 0;
    scale = from.scale_of(group);
    parameters = group * shape.width;
  }

  // z of element number w of a row, which is x.
  __device__ A one(int w, int64_t element, T x, bool& present) const {
    present = true;
    if constexpr (kPlain) return static_cast<A>(x);
    return logit_of(from, scale, element, parameters + w, x, present);
  }

  // z of a pack of elements number w of neighbouring rows.
  __device__ uint32_t pack(int w, int64_t element, const Packed<T, N>& x, A (&z)[N]) const {
    unpack(x, z);
    if constexpr (kPlain) return kAll<N>;
    if (from.bias) {
      const A bias = from.bias[parameters + w];
#pragma unroll
      for (int e = 0; e < N; ++e) z[e] += bias;
    }
    return weigh(from, scale, element, z);
  }
};

}  // namespace syntonic
