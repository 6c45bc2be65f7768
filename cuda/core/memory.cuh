// Packs between memory and registers: which elements they are, how they pass the caches, and arrays
// whose type is known at run time only.
#pragma once

#include "core/pack.cuh"

namespace syntonic {

constexpr int kLine = 8;  // pieces of 16 bytes in a line of memory, which has 128 bytes

// Where the elements of a pack lie in a row, or in a stretch of one: first, first + step, ... short
// of end.
//
// Vector access (one 16-byte transaction a pack, step 1) needs aligned pointers and a row width
// that is a multiple of the pack. Otherwise neighbouring threads take neighbouring elements, so
// that a warp still touches whole sectors, whatever the alignment.
struct Span {
  int first;
  int step;
  int end;

  __device__ bool holds(int e) const { return first + e * step < end; }

  // Which of N elements it holds; all or none of them, where it is read by vectors.
  template <int N>
  __device__ uint32_t present(bool vector) const {
    if (vector) return first < end ? kAll<N> : 0;
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) bits |= uint32_t{holds(e)} << e;
    return bits;
  }
};

// Elements side by side of an aligned array, some of which are a row's, a bit for each: a row that
// is no whole packs begins and ends inside of one. They are read whole.
struct Part {
  int first;
  uint32_t present;

  __device__ bool holds(int e) const { return present >> e & 1; }
};

// The elements from `first` on that are those of a row from begin to short of end.
template <int N>
__device__ Part part(int first, int begin, int end) {
  if (first >= begin && first + N <= end) return {first, kAll<N>};
  uint32_t present = 0;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    present |= uint32_t{first + e >= begin && first + e < end} << e;
  }
  return {first, present};
}

// The span of pack number `index` of the thread `rank` out of `size` that share [0, end).
template <int N>
__device__ Span span(bool vector, int index, int size, int rank, int end) {
  return vector ? Span{(index * size + rank) * N, 1, end}
                : Span{index * N * size + rank, size, end};
}

// How data passes the caches, chosen by measurement. Read once: past the L1 cache, which is left to
// the parameters; pays where a row of those is large. Written once: first to leave the L2 cache;
// pays beside reads by copies in the background, and beside reads of what is still in the L2 cache.
// Elsewhere both cost more than they save. Passing:
// the first to leave the L2 cache too, where an array is read from one end to the other.
enum class Cache { once, keep, passing };

#if __CUDA_ARCH__ >= 800
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

// Volatile, for the compiler must not move a load before the wait for the launches before this one.
template <Cache kCache, int kWords>
__device__ void load_words(const void* address, uint32_t (&word)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4* source = static_cast<const uint4*>(address) + i / 4;
#ifdef __CUDA_ARCH__
      if constexpr (kCache == Cache::once) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[i]), "=r"(word[i + 1]), "=r"(word[i + 2]), "=r"(word[i + 3])
                     : "l"(source));
        continue;
      }
#endif
#if __CUDA_ARCH__ >= 800
      if constexpr (kCache == Cache::passing) {
        asm volatile("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                     : "=r"(word[i]), "=r"(word[i + 1]), "=r"(word[i + 2]), "=r"(word[i + 3])
                     : "l"(source), "l"(evict_first()));
        continue;
      }
#endif
      const uint4 four = __ldg(source);
      word[i] = four.x, word[i + 1] = four.y, word[i + 2] = four.z, word[i + 3] = four.w;
    }
  } else if constexpr (kWords == 2) {
    const uint2 two = __ldg(static_cast<const uint2*>(address));
    word[0] = two.x, word[1] = two.y;
  } else {
    static_assert(kWords == 1);
    word[0] = __ldg(static_cast<const uint32_t*>(address));
  }
}

// One element of a pack, whose words are zero before.
template <class T, int N>
__device__ void load_element(Packed<T, N>& packed, int e, const T* source) {
  if constexpr (sizeof(T) == 2) {
    packed.word[e / 2] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(source))} << e % 2 * 16;
  } else if constexpr (sizeof(T) == 4) {
    packed.word[e] = __ldg(reinterpret_cast<const uint32_t*>(source));
  } else {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(source));
    packed.word[2 * e] = two.x, packed.word[2 * e + 1] = two.y;
  }
}

template <class T, int N>
__device__ void store_element(T* target, const Packed<T, N>& packed, int e) {
  const auto& word = packed.word;
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(word[e / 2] >> e % 2 * 16);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<uint32_t*>(target) = word[e];
  } else {
    *reinterpret_cast<uint2*>(target) = make_uint2(word[2 * e], word[2 * e + 1]);
  }
}

// Packs out of the span read as zero.
template <class T, int N, Cache kCache = Cache::once>
__device__ Packed<T, N> load(const T* row, const Span& at, bool vector) {
  Packed<T, N> packed = {};
  if (vector) {
    if (at.first < at.end) load_words<kCache>(row + at.first, packed.word);
    return packed;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (at.holds(e)) load_element(packed, e, row + at.first + e * at.step);
  }
  return packed;
}

// Of elements that are not the row's, whatever lies there; zero where none is. None beyond `limit`,
// where the array ends, is read.
template <class T, int N, Cache kCache = Cache::once>
__device__ Packed<T, N> load(const T* row, const Part& at, int limit) {
  Packed<T, N> packed = {};
  if (at.present == 0) return packed;
  if (at.first + N <= limit) {
    load_words<kCache>(row + at.first, packed.word);
    return packed;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (at.holds(e)) load_element(packed, e, row + at.first + e);
  }
  return packed;
}

// A whole pack.
template <Cache kCache = Cache::keep, class T, int N>
__device__ void store_pack(T* target, const Packed<T, N>& packed) {
  constexpr int kWords = N * sizeof(T) / 4;
  const uint32_t (&word)[kWords] = packed.word;
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      uint4* const place = reinterpret_cast<uint4*>(target) + i / 4;
      const uint4 four = make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
      if constexpr (kCache == Cache::once) {
        __stcs(place, four);
      } else {
        *place = four;
      }
    }
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(target) = make_uint2(word[0], word[1]);
  } else {
    *reinterpret_cast<uint32_t*>(target) = word[0];
  }
}

template <Cache kCache = Cache::keep, class T, int N>
__device__ void store(T* row, const Span& at, bool vector, const Packed<T, N>& packed) {
  if (vector) {
    if (at.first < at.end) store_pack<kCache>(row + at.first, packed);
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (at.holds(e)) store_element(row + at.first + e * at.step, packed, e);
  }
}

template <Cache kCache = Cache::keep, class T, int N>
__device__ void store(T* row, const Part& at, bool, const Packed<T, N>& packed) {
  if (at.present == kAll<N>) return store_pack<kCache>(row + at.first, packed);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (at.holds(e)) store_element(row + at.first + e, packed, e);
  }
}

// Parameters: one row of the accumulation type beside the data, read again for every row of it.
template <class A, int N>
__device__ void load_parameter(const A* row, const Span& at, bool vector, A (&x)[N]) {
  unpack(load<A, N, Cache::keep>(row, at, vector), x);
}

// Where the packs of the data are shifted against those of the parameters, the pieces of 16 bytes
// that hold the elements are read, one more than otherwise. All threads of a row shift them by as
// much. Near its ends the row is read element by element: no piece reaches beyond `end`.
template <class A, int N>
__device__ void load_parameter(const A* row, const Part& at, int end, A (&x)[N]) {
  constexpr int kPiece = kVector<A>;
  if (at.present != kAll<N> || at.first + N + kPiece > end) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = at.holds(e) ? row[at.first + e] : A(0);
    return;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(row + at.first);
  Packed<A, N + kPiece> wide;
  load_words<Cache::keep>(reinterpret_cast<const void*>(address / 16 * 16), wide.word);
  A y[N + kPiece];
  unpack(wide, y);
#pragma unroll
  for (int by = 1; by < kPiece; by *= 2) {
    const bool shift = address / sizeof(A) & by;
#pragma unroll
    for (int e = 0; e + by < N + kPiece; ++e) y[e] = shift ? y[e + by] : y[e];
  }
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = y[e];
}

// An array whose type is known at run time only: y and its cotangent may have any type. All
// threads take the same branch.
struct AnyArray {
  void* data;
  DType dtype;
};

// Most likely it is T, which is told apart without a jump through a table.
template <class T, Cache kCache = Cache::keep, class At, int N, class A>
__device__ void store_any(const AnyArray& array, int64_t start, const At& at, bool vector,
                          const A (&x)[N]) {
  if (array.dtype == kDType<T>) {
    return store<kCache>(static_cast<T*>(array.data) + start, at, vector, pack<T>(x));
  }
  switch (array.dtype) {
    case DType::f16:
      return store<kCache>(static_cast<f16*>(array.data) + start, at, vector, pack<f16>(x));
    case DType::bf16:
      return store<kCache>(static_cast<bf16*>(array.data) + start, at, vector, pack<bf16>(x));
    case DType::f32:
      return store<kCache>(static_cast<float*>(array.data) + start, at, vector, pack<float>(x));
    case DType::f64:
      return store<kCache>(static_cast<double*>(array.data) + start, at, vector, pack<double>(x));
  }
}

// N elements of a run-time type as they came from memory (float64 beside narrower data: as the
// accumulation type A), so that a load need not be waited for before its values are used.
template <class A, int N>
struct AnyPacked {
  uint32_t word[N * sizeof(A) / 4];
};

template <class T, class A, int N>
__device__ void load_into(AnyPacked<A, N>& packed, const void* data, int64_t start, const Span& at,
                          bool vector) {
  const Packed<T, N> source =
      load<T, N, Cache::keep>(static_cast<const T*>(data) + start, at, vector);
  if constexpr (sizeof(T) <= sizeof(A)) {
#pragma unroll
    for (int i = 0; i < int(N * sizeof(T) / 4); ++i) packed.word[i] = source.word[i];
  } else {
    A x[N];
    unpack(source, x);
    const Packed<A, N> narrowed = pack<A>(x);
#pragma unroll
    for (int i = 0; i < int(N * sizeof(A) / 4); ++i) packed.word[i] = narrowed.word[i];
  }
}

template <class A, int N>
__device__ AnyPacked<A, N> load_any(const AnyArray& array, int64_t start, const Span& at,
                                    bool vector) {
  AnyPacked<A, N> packed;
  switch (array.dtype) {
    case DType::f16:
    case DType::bf16:  // only bytes are moved
      load_into<f16>(packed, array.data, start, at, vector);
      break;
    case DType::f32:
      load_into<float>(packed, array.data, start, at, vector);
      break;
    case DType::f64:
      load_into<double>(packed, array.data, start, at, vector);
      break;
  }
  return packed;
}

template <class T, class A, int N>
__device__ void unpack_as(const AnyPacked<A, N>& packed, A (&x)[N]) {
  Packed<T, N> source;
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 4); ++i) source.word[i] = packed.word[i];
  unpack(source, x);
}

template <class A, int N>
__device__ void unpack_any(const AnyPacked<A, N>& packed, DType dtype, A (&x)[N]) {
  switch (dtype) {
    case DType::f16:
      return unpack_as<f16>(packed, x);
    case DType::bf16:
      return unpack_as<bf16>(packed, x);
    case DType::f32:
      return unpack_as<float>(packed, x);
    case DType::f64:
      return unpack_as<A>(packed, x);
  }
}

// Whether every given pointer (null where absent) allows 16-byte access.
template <class... P>
bool all_aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Whether the packs of all these arrays lie alike; absent ones are null.
template <class... P>
bool alike(const void* first, const P*... others) {
  const auto shift = reinterpret_cast<uintptr_t>(first) % 16;
  return ((others == nullptr || reinterpret_cast<uintptr_t>(others) % 16 == shift) && ...);
}

// A whole, aligned pack.
template <class T, int N, Cache kCache = Cache::keep>
__device__ Packed<T, N> read_pack(const T* address) {
  Packed<T, N> packed;
  load_words<kCache>(address, packed.word);
  return packed;
}

template <class T, int N>
__device__ void write_pack(T* address, const Packed<T, N>& packed) {
  store(address, Span{0, 1, N}, true, packed);
}

}  // namespace syntonic
