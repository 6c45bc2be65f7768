// Packs on their way through shared memory, copied in the background from compute capability 8.0
// on, so that the rows to come neither wait for the row at hand nor take registers from it.
#pragma once

#include "row.cuh"

namespace syntonic {

// Copies kBytes (4, 8 or a multiple of 16) to shared memory in the background, 16-byte pieces
// `stride` pieces apart; or zeros, where there is nothing to copy.
template <int kBytes, Cache kCache = Cache::keep>
__device__ void copy_async(uint4* shared, int stride, const void* address, bool present) {
#pragma unroll
  for (int i = 0; i < (kBytes + 15) / 16; ++i) {
    constexpr int kPiece = kBytes < 16 ? kBytes : 16;
    const void* source = static_cast<const char*>(address) + 16 * i;
    uint4* target = shared + i * stride;
#if __CUDA_ARCH__ >= 800
    const auto where = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    const int bytes = present ? kPiece : 0;
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
    if (present) load_words<Cache::once>(source, word);
#pragma unroll
    for (int w = 0; w < kPiece / 4; ++w) reinterpret_cast<uint32_t*>(target)[w] = word[w];
#endif
  }
}

// Ends a group of copies.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups` groups of this thread are under way.
__device__ inline void wait_copies(int groups) {
#if __CUDA_ARCH__ >= 800
  switch (groups) {
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
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

// Puts a pack of 16 bytes in the place of one that this thread has read.
template <class T, int N>
__device__ void put_back(uint4* shared, const Packed<T, N>& packed) {
  static_assert(N * sizeof(T) == 16);
  *shared = make_uint4(packed.word[0], packed.word[1], packed.word[2], packed.word[3]);
}

template <int N>
__device__ void stage_any(const AnyArray& array, uint4* shared, int stride, int64_t start,
                          const Span& at, bool vector) {
  switch (array.dtype) {
    case DType::f16:
    case DType::bf16:  // only bytes are moved
      return stage<f16, N>(shared, stride, static_cast<const f16*>(array.data) + start, at, vector);
    case DType::f32:
      return stage<float, N>(shared, stride, static_cast<const float*>(array.data) + start, at,
                             vector);
    case DType::f64:
      return stage<double, N>(shared, stride, static_cast<const double*>(array.data) + start, at,
                              vector);
  }
}

template <class A, int N>
__device__ void unpack_staged(const AnyArray& array, const uint4* shared, int stride, A (&x)[N]) {
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

// A copy goes at full speed only where its source and its target lie alike in lines of 128 bytes.
// Rows that begin at any 16-byte piece of a line are therefore shifted by as much in the ring, for
// which every warp, or team that is smaller, has room.
constexpr int kLine = 8;  // pieces

__host__ __device__ constexpr int ring_unit(int team) { return team < kWarp ? team : kWarp; }

// The distance of the pieces of one pack: the threads of the block, and the room for shifts, which
// rows of a few pieces do without.
__host__ __device__ constexpr int ring_stride(int threads, int team, int64_t row_bytes) {
  const bool shifts = row_bytes % (16 * kLine) != 0 && team >= 2 * kLine;
  return threads + (shifts ? threads / ring_unit(team) * kLine : 0);
}

// The rows that are on their way, K packs of `pieces` 16-byte pieces a thread each, in dynamic
// shared memory. A thread copies and reads only packs of its own, but these lie elsewhere for
// another row: the threads of a warp must meet before a turn is filled again.
template <int K>
struct Ring {
  uint4* base;  // of this thread
  int stride;
  int pieces;
  unsigned step;  // from row to row, by which shifts grow

  __device__ Ring(uint4* shared, int pieces, const Team& team, int64_t row_bytes)
      : stride(ring_stride(static_cast<int>(blockDim.x), team.size, row_bytes)), pieces(pieces) {
    const bool shifts = stride > static_cast<int>(blockDim.x);
    const int unit = static_cast<int>(threadIdx.x) / ring_unit(team.size);
    base = shared + threadIdx.x + (shifts ? unit * kLine : 0);
    step = shifts ? static_cast<unsigned>(row_bytes / 16 % kLine) : 0;
  }

  // The first pack of the row that takes this turn; the next one is pieces * stride further.
  __device__ uint4* packs_of(int64_t row, int turn) const {
    return base + turn * K * pieces * stride + static_cast<unsigned>(row) * step % kLine;
  }
};

// Dynamic shared memory that a block of this kernel may use beside what it declares.
template <class K>
int ring_capacity(K* kernel) {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, kernel);
  return most - static_cast<int>(attributes.sharedSizeBytes);
}

// Bytes of the ring of a kernel by this plan, whose stages are cut to what fits; 0 if not even the
// two fit that a ring needs.
template <class K>
size_t fit_ring(RowPlan& plan, K* kernel, int pieces, int64_t row_bytes) {
  const int stride = ring_stride(plan.threads, plan.team, row_bytes);
  const size_t turn = sizeof(uint4) * plan.packs * pieces * stride;
  plan.stages = std::min<int>(plan.stages, ring_capacity(kernel) / turn);
  return plan.stages < 2 ? 0 : plan.stages * turn;
}

// Loads a kernel and lets it use all the shared memory that there is.
template <class K>
Status load_ring(K* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              ring_capacity(kernel));
}

}  // namespace syntonic
