// Plain types shared by every launcher. Nothing here knows of XLA or Python.
#pragma once

#include <cstdint>

#ifdef SYNTONIC_HOST
// The tests compile the FFI handlers against plain C++ launchers: no CUDA headers, no stream.
namespace syntonic {
struct Stream {};
using Status = int;
constexpr Status kSuccess = 0;
}  // namespace syntonic
#else
#include <cuda_runtime_api.h>
namespace syntonic {
using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status kSuccess = cudaSuccess;
}  // namespace syntonic
#endif

namespace syntonic {

enum class DType : int32_t { f16, bf16, f32, f64 };

// The type in which statistics, sums and transcendental functions are computed.
constexpr DType accumulation(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// groups x count rows of width elements, contiguous. Parameters have one row of `width` per group.
struct Rows {
  int64_t groups;
  int64_t count;  // rows in a group
  int64_t width;

  constexpr int64_t total() const { return groups * count; }
  constexpr int64_t elements() const { return groups * count * width; }
};

// What a layer norm keeps of a row: shift, slope and rest, by which
// (x - mean) / sqrt(var + epsilon) = (x / 4 + shift) * slope + rest.
constexpr int kRowStatistics = 3;

// partials x outer x count x inner elements, contiguous: `count` channels, the elements of one
// being reduced to one result for each partial.
struct Channels {
  int64_t partials;
  int64_t outer;
  int64_t count;
  int64_t inner;

  constexpr int64_t results() const { return partials * count; }
  constexpr int64_t elements() const { return results() * outer * inner; }
};

// groups x outer x width x inner elements, contiguous: a softmax runs along `width`, each of its
// rows being the elements of one outer and one inner place. Parameters have `width` elements per
// group.
struct Planes {
  int64_t groups;
  int64_t outer;  // in a group
  int64_t width;
  int64_t inner;

  constexpr int64_t rows() const { return groups * outer * inner; }
  constexpr int64_t elements() const { return rows() * width; }
};

constexpr int kMaxThreads = 512;  // in a block of any kernel that reduces

// A function applied to the residual sum. The numbers are the `activation` attribute of the calls.
enum class Activation : int32_t { none, relu, gelu, golden_gelu };

}  // namespace syntonic
