// Packs on their way through shared memory, copied in the background from compute capability 8.0
// on, so that the rows to come neither wait for the row at hand nor take registers from it.
#pragma once

#include "core/memory.cuh"

namespace syntonic {

// Copies kBytes (4, 8 or a multiple of 16) to shared memory in the background, 16-byte pieces
// `stride` pieces apart. Of piece i, exist(i) bytes are copied, and the others are zeros.
template <int kBytes, Cache kCache, class Exist>
__device__ void copy_pieces(uint4* shared, int stride, const void* address, Exist exist) {
#pragma unroll
  for (int i = 0; i < (kBytes + 15) / 16; ++i) {
    constexpr int kPiece = kBytes < 16 ? kBytes : 16;
    const void* source = static_cast<const char*>(address) + 16 * i;
    uint4* target = shared + i * stride;
    const int bytes = exist(i);
#if __CUDA_ARCH__ >= 800
    const auto where = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    if constexpr (kPiece == 16 && kCache == Cache::passing) {
      asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(where),
                   "l"(source), "r"(bytes), "l"(evict_first())
                   : "memory");
    } else if constexpr (kPiece == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(where), "l"(source),
                   "r"(bytes)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(where), "l"(source),
                   "n"(kPiece), "r"(bytes)
                   : "memory");
    }
#else
    uint32_t word[kPiece / 4] = {};
    if (bytes == kPiece) {
      load_words<Cache::once>(source, word);
    } else {
#pragma unroll
      for (int h = 0; h < kPiece / 2; ++h) {
        if (2 * h >= bytes) break;
        word[h / 2] |= uint32_t{__ldg(static_cast<const uint16_t*>(source) + h)} << h % 2 * 16;
      }
    }
#pragma unroll
    for (int w = 0; w < kPiece / 4; ++w) reinterpret_cast<uint32_t*>(target)[w] = word[w];
#endif
  }
}

// All of them; or zeros, where there is nothing to copy.
template <int kBytes, Cache kCache = Cache::keep>
__device__ void copy_async(uint4* shared, int stride, const void* address, bool present) {
  constexpr int kPiece = kBytes < 16 ? kBytes : 16;
  copy_pieces<kBytes, kCache>(shared, stride, address, [&](int) { return present ? kPiece : 0; });
}

// The first `bytes` of them, and zeros.
template <int kBytes>
__device__ void copy_first(uint4* shared, int stride, const void* address, int bytes) {
  constexpr int kPiece = kBytes < 16 ? kBytes : 16;
  copy_pieces<kBytes, Cache::keep>(shared, stride, address, [&](int i) {
    const int rest = bytes - 16 * i;
    return rest < 0 ? 0 : rest < kPiece ? rest : kPiece;
  });
}

// Ends a group of copies.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups` groups of this thread are under way, or some fewer.
__device__ inline void wait_copies(int groups) {
#if __CUDA_ARCH__ >= 800
  // Not a branch for each number, which becomes a jump through a table.
  asm volatile(
      "{\n"
      ".reg .pred none, one, more;\n"
      "setp.lt.s32 none, %0, 1;\n"
      "setp.eq.s32 one, %0, 1;\n"
      "setp.gt.s32 more, %0, 1;\n"
      "@none cp.async.wait_group 0;\n"
      "@one cp.async.wait_group 1;\n"
      "@more cp.async.wait_group 2;\n"
      "}" ::"r"(groups)
      : "memory");
#endif
}

// A pack that another pass will read from shared memory.
template <class T, int N>
__device__ void stage(uint4* shared, int stride, const T* row, const Span& at, bool vector) {
  constexpr int kBytes = N * sizeof(T);
  if (vector) {
    const bool present = at.first < at.end;
    return copy_async<kBytes>(shared, stride, present ? row + at.first : row, present);
  }
  const Packed<T, N> packed = load<T, N>(row, at, false);
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) {
    reinterpret_cast<uint32_t*>(shared + i / 4 * stride)[i % 4] = packed.word[i];
  }
}

// The same of a row that is no whole packs; nothing from `limit` on, where the array ends.
template <class T, int N>
__device__ void stage(uint4* shared, int stride, const T* row, const Part& at, int limit) {
  const int exist = at.present == 0 ? 0 : min(limit - at.first, N);
  copy_first<N * sizeof(T)>(shared, stride, exist == 0 ? row : row + at.first, exist * sizeof(T));
}

template <class T, int N>
__device__ Packed<T, N> staged(const uint4* shared, int stride) {
  constexpr int kWords = N * sizeof(T) / 4;
  Packed<T, N> packed;
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 four = shared[i / 4 * stride];
      packed.word[i] = four.x, packed.word[i + 1] = four.y;
      packed.word[i + 2] = four.z, packed.word[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      packed.word[i] = reinterpret_cast<const uint32_t*>(shared)[i];
    }
  }
  return packed;
}

// A pack of this thread's own, for itself to read again.
template <class T, int N>
__device__ void put(uint4* shared, int stride, const Packed<T, N>& packed) {
  static_assert(N * sizeof(T) % 16 == 0);
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 4); i += 4) {
    shared[i / 4 * stride] =
        make_uint4(packed.word[i], packed.word[i + 1], packed.word[i + 2], packed.word[i + 3]);
  }
}

// Puts a pack of 16 bytes in the place of one that this thread has read.
template <class T, int N>
__device__ void put_back(uint4* shared, const Packed<T, N>& packed) {
  static_assert(N * sizeof(T) == 16);
  *shared = make_uint4(packed.word[0], packed.word[1], packed.word[2], packed.word[3]);
}

// `how` is whether a Span is read by vectors, or the limit of a Part. Most likely the type is T.
template <class T, int N, class At, class How>
__device__ void stage_any(const AnyArray& array, uint4* shared, int stride, int64_t start,
                          const At& at, How how) {
  if (array.dtype == kDType<T>) {
    return stage<T, N>(shared, stride, static_cast<const T*>(array.data) + start, at, how);
  }
  switch (array.dtype) {
    case DType::f16:
    case DType::bf16:  // only bytes are moved
      return stage<f16, N>(shared, stride, static_cast<const f16*>(array.data) + start, at, how);
    case DType::f32:
      return stage<float, N>(shared, stride, static_cast<const float*>(array.data) + start, at,
                             how);
    case DType::f64:
      return stage<double, N>(shared, stride, static_cast<const double*>(array.data) + start, at,
                              how);
  }
}

template <class T, class A, int N>
__device__ void unpack_staged(const AnyArray& array, const uint4* shared, int stride, A (&x)[N]) {
  if (array.dtype == kDType<T>) return unpack(staged<T, N>(shared, stride), x);
  switch (array.dtype) {
    case DType::f16:
      return unpack(staged<f16, N>(shared, stride), x);
    case DType::bf16:
      return unpack(staged<bf16, N>(shared, stride), x);
    case DType::f32:
      return unpack(staged<float, N>(shared, stride), x);
    case DType::f64:
      return unpack(staged<double, N>(shared, stride), x);
  }
}

}  // namespace syntonic
