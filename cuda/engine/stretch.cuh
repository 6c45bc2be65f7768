// Rows of any width and alignment: whole packs, and single elements at their ends.
#pragma once

#include "core/memory.cuh"

namespace syntonic {

// A contiguous part of an array, such as a row: whole packs, and single elements before and after
// them, whose packs reach into its neighbours. If the arrays of a kernel are not aligned alike, all
// elements are single ones. The packs of a long part begin at a line, so that the accesses of a
// warp touch as few lines as they can.
template <class T>
struct Stretch {
  static constexpr int N = kVector<T>;
  static constexpr int kLong = 8192;
  int64_t start;  // in elements of the array
  int width;
  int head = 0;  // elements before the first whole pack
  int packs = 0;

  __device__ Stretch(const T* array, int64_t start, int width, bool vector)
      : start(start), width(width) {
    if (!vector) return;
    const auto address = reinterpret_cast<uintptr_t>(array + start);
    const int unit = width < kLong ? 16 : 16 * kLine;
    head = min(static_cast<int>(-address % unit / sizeof(T)), width);
    packs = (width - head) / N;
  }

  __device__ int first(int pack) const { return head + pack * N; }
  __device__ int edges() const { return width - packs * N; }
  // The place of the i-th single element.
  __device__ int edge(int i) const { return i < head ? i : i + packs * N; }
};

// A row behind the last one is empty.
template <class T>
__device__ Stretch<T> stretch_of_row(const T* array, int64_t row, int64_t rows, int width,
                                     bool vector) {
  const bool exists = row < rows;
  return {array, exists ? row * width : 0, exists ? width : 0, vector};
}

}  // namespace syntonic
