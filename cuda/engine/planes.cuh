// Reductions along an inner axis, and along short ragged rows. A row lies across a plane, its
// elements `inner` apart. There are three ways to go through planes:
//
//   tile      a block copies some whole planes, which are contiguous, to shared memory, and reads
//             their rows there element by element
//   columns   a block stages the rows of a few packs side by side; the blocks of a cluster share
//             their length; a thread reads only what it has copied itself
//   stream    the rows of neighbouring elements are read twice from memory
#pragma once

#include "engine/rows_staged.cuh"
#include "engine/stretch.cuh"

namespace syntonic {

constexpr int kPlaneWarps = kPlaneThreads / kWarp;

// The planes of a call, and how many of their rows a block takes.
struct PlaneShape {
  int64_t planes;
  int64_t group_planes;
  int width;
  int inner;
  int lanes;  // columns: threads side by side; tile: planes of a block

  __host__ __device__ constexpr int64_t size() const { return int64_t{width} * inner; }
};

inline PlaneShape plane_shape(const Planes& shape, int lanes) {
  return {shape.groups * shape.outer, shape.outer, static_cast<int>(shape.width),
          static_cast<int>(shape.inner), lanes};
}

// ---- tile ----

// Planes of a tile; 0 where one is too large.
inline int tile_planes(const Planes& shape, int64_t item) {
  const int64_t bytes = shape.width * shape.inner * item;
  if (bytes > 3 * kTileBytes || shape.inner > kTileRows) return 0;
  return static_cast<int>(
      std::max<int64_t>(1, std::min(kTileBytes / bytes, kTileRows / shape.inner)));
}

// Pieces of a tile. It has room to begin at the place in a line where its first element lies.
template <class T>
__host__ __device__ constexpr int64_t tile_pieces(const PlaneShape& shape) {
  return shape.lanes * shape.size() * int64_t{sizeof(T)} / 16 + kLine + 1;
}

// Some planes in shared memory. An element has the place in a line that it has in global memory.
template <class T>
struct Tile {
  static constexpr int N = kVector<T>;
  Stretch<T> of;
  T* data;

  __device__ Tile(uint4* pieces, const T* array, const PlaneShape& shape)
      : of(array, int64_t{blockIdx.x} * shape.lanes * shape.size(), elements(shape), true) {
    const auto address = reinterpret_cast<uintptr_t>(array + of.start);
    data = reinterpret_cast<T*>(pieces) + address % (16 * kLine) / sizeof(T);
  }

  __device__ static int elements(const PlaneShape& shape) {
    const int64_t rest = shape.planes - int64_t{blockIdx.x} * shape.lanes;
    return static_cast<int>((rest < shape.lanes ? rest : shape.lanes) * shape.size());
  }

  __device__ void copy_from(const T* array) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < of.packs; i += threads) {
      const int at = of.first(i);
      copy_async<16>(reinterpret_cast<uint4*>(data + at), 1, array + of.start + at, true);
    }
    commit_copies();
    for (int i = thread; i < of.edges(); i += threads) {
      data[of.edge(i)] = array[of.start + of.edge(i)];
    }
  }

  __device__ void copy_to(T* array) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < of.packs; i += threads) {
      const int at = of.first(i);
      write_pack(array + of.start + at, staged<T, N>(reinterpret_cast<uint4*>(data + at), 1));
    }
    for (int i = thread; i < of.edges(); i += threads) {
      array[of.start + of.edge(i)] = data[of.edge(i)];
    }
  }
};

// Threads that share a row of a tile: neighbours in a warp, a power of two.
__host__ __device__ inline int tile_slots(const PlaneShape& shape) {
  int slots = 1;
  while (slots < kWarp && slots < shape.width &&
         2 * slots * shape.lanes * shape.inner <= kPlaneThreads) {
    slots *= 2;
  }
  return slots;
}

inline int tile_threads(const PlaneShape& shape) {
  return static_cast<int>(ceil_div(tile_slots(shape) * shape.lanes * shape.inner, kWarp) * kWarp);
}

// The row of a tile that this thread shares, and its elements of it.
struct TileRow {
  int slots;
  int slot;
  bool any;  // whether there is such a row
  int64_t plane;
  int64_t row = 0;  // of all rows
  int first = 0;    // element of the tile

  __device__ explicit TileRow(const PlaneShape& shape) : slots(tile_slots(shape)) {
    const int own = static_cast<int>(threadIdx.x) / slots;
    slot = static_cast<int>(threadIdx.x) % slots;
    const int local = own / shape.inner, place = own % shape.inner;
    plane = int64_t{blockIdx.x} * shape.lanes + local;
    any = local < shape.lanes && plane < shape.planes;
    if (!any) return;
    row = plane * shape.inner + place;
    first = local * static_cast<int>(shape.size()) + place;
  }

  template <class F>
  __device__ void for_elements(const PlaneShape& shape, F&& f) const {
    if (!any) return;
    int i = first + slot * shape.inner;
#pragma unroll 4
    for (int w = slot; w < shape.width; w += slots, i += slots * shape.inner) f(w, i);
  }
};

// ---- stream ----

// The row of a thread. `slots` threads share a row, of all blocks of the cluster; neighbouring
// threads have neighbouring rows.
struct StridedRow {
  bool any;  // whether there is such a row
  int slot;
  int slots;
  int64_t plane;
  int64_t row;
  int64_t start;  // its first element

  __device__ StridedRow(const PlaneShape& shape, int blocks) {
    const int thread = static_cast<int>(threadIdx.x);
    const int own = static_cast<int>(blockDim.x) / shape.lanes;
    slots = own * blocks;
    slot = thread / shape.lanes + own * cluster_rank();
    const int tiles = (shape.inner + shape.lanes - 1) / shape.lanes;
    const int64_t unit = int64_t{blockIdx.x} / blocks;
    plane = unit / tiles;
    const int place = static_cast<int>(unit % tiles) * shape.lanes + thread % shape.lanes;
    any = place < shape.inner && thread < own * shape.lanes;
    row = plane * shape.inner + place;
    start = plane * shape.size() + place;
  }
};

struct StreamPlan {
  int lanes;
  int blocks = 1;  // of a cluster
  int64_t count;   // clusters
};

template <class K>
StreamPlan plan_strided_rows(const Planes& shape, K* kernel) {
  StreamPlan plan;
  plan.lanes = static_cast<int>(std::min<int64_t>(shape.inner, kTileColumns));
  plan.count = shape.groups * shape.outer * ceil_div(shape.inner, plan.lanes);
  const int64_t turns = ceil_div(shape.width * plan.lanes, kPlaneThreads);
  while (compiled_for_90(kernel) && plan.blocks < kMaxCluster && turns > 16 * plan.blocks) {
    plan.blocks *= 2;
  }
  return plan;
}

// ---- columns ----

struct ColumnPlan {
  int lanes = 1;
  StagePlan stage;

  // Clusters that the planes take.
  int64_t count(const Planes& shape, int vector) const {
    return shape.groups * shape.outer * ceil_div(shape.inner, lanes * vector);
  }
};

// For the columns of each of `arrays` arrays.
template <class T, class K>
ColumnPlan plan_columns(const Planes& shape, int arrays, K* kernel) {
  ColumnPlan plan;
  while (plan.lanes < kColumnLanes && plan.lanes * kVector<T> < shape.inner) plan.lanes *= 2;
  const int64_t pieces = shape.width * plan.lanes;
  const int most = compiled_for_90(kernel) ? kMaxCluster : 1;
  StagePlan& stage = plan.stage;
  stage.blocks = 1;
  while (stage.blocks < most && pieces * arrays > kStagePieces * stage.blocks) stage.blocks *= 2;
  const int64_t share = ceil_div(pieces, stage.blocks);
  const int64_t warps = std::max<int64_t>(1, share / (kWarp * kColumnPacks));
  stage.threads = static_cast<int>(std::min<int64_t>(kPlaneThreads, warps * kWarp));
  const int64_t slots = stage.threads / plan.lanes * stage.blocks;
  stage.shared = sizeof(uint4) * arrays * ceil_div(shape.width, slots) * stage.threads;
  if (stage.shared > static_cast<size_t>(dynamic_shared_capacity(kernel))) stage.blocks = 0;
  return plan;
}

// The packs of a thread: of N neighbouring rows, every `slots`-th element.
template <class T>
struct ColumnPlace {
  static constexpr int N = kVector<T>;
  int lanes;
  int lane;
  int slot;  // of the cluster
  int slots;
  int64_t plane;
  int64_t start;  // of the first element of its rows in the array
  int64_t row;    // the first of its rows
  int rest;       // rows of the plane from there on
  bool any;       // whether there are such rows

  __device__ explicit ColumnPlace(const PlaneShape& shape, int blocks)
      : lanes(shape.lanes),
        lane(static_cast<int>(threadIdx.x) % lanes),
        slots(static_cast<int>(blockDim.x) / lanes * blocks) {
    slot = static_cast<int>(threadIdx.x) / lanes + slots / blocks * cluster_rank();
    const int tile = lanes * N, tiles = (shape.inner + tile - 1) / tile;
    const int64_t unit = int64_t{blockIdx.x} / blocks;
    plane = unit / tiles;
    const int place = static_cast<int>(unit % tiles) * tile + lane * N;
    rest = shape.inner - place;
    any = rest > 0;
    start = plane * shape.size() + place;
    row = plane * shape.inner + place;
  }

  // Pieces that the packs of a block take.
  __device__ int pieces(const PlaneShape& shape) const {
    return (shape.width + slots - 1) / slots * static_cast<int>(blockDim.x);
  }

  template <class F>
  __device__ void for_packs(const PlaneShape& shape, F&& f) const {
    if (!any) return;
    int piece = static_cast<int>(threadIdx.x);
#pragma unroll 2
    for (int w = slot; w < shape.width; w += slots, piece += blockDim.x) {
      f(w, start + int64_t{w} * shape.inner, piece);
    }
  }
};

// Merges what the threads of a row have found, of all blocks of the cluster, in a fixed order.
template <class M>
struct RowExchange {
  static constexpr int kParts = kPlaneWarps;  // of kTileColumns rows each; more if rows are fewer
  M parts[kParts * kTileColumns];             // `count` entries each, one a row
  M blocks[kMaxCluster][kTileColumns];

  // `filled` parts hold what threads have found. Leaves finish(i, total of row i) in parts[i], for
  // all threads to read.
  template <class Merge, class Finish>
  __device__ void run(int count, int filled, int cluster, Merge merge, Finish finish) {
    const int threads = static_cast<int>(blockDim.x), rank = cluster_rank();
    __syncthreads();
    if (cluster > 1) cluster_wait();  // until all have begun
    for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
      M total = parts[i];
      for (int part = 1; part < filled; ++part) {
        total = merge(total, parts[part * count + i]);
      }
      if (cluster == 1) {
        parts[i] = finish(i, total);
      } else {
        for (int block = 0; block < cluster; ++block) {
          store_in_block(&blocks[rank][i], total, block);
        }
      }
    }
    if (cluster > 1) {
      cluster_arrive();
      cluster_wait();
      for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
        M total = blocks[0][i];
        for (int block = 1; block < cluster; ++block) total = merge(total, blocks[block][i]);
        parts[i] = finish(i, total);
      }
    }
    __syncthreads();
  }
};

// The same if every thread has N neighbouring rows. `across` merges over the lanes of a warp.
template <class M, int N, class Lanes, class Merge, class Finish>
__device__ void exchange_columns(RowExchange<M>& shared, int lanes, int cluster, M (&found)[N],
                                 Lanes across, Merge merge, Finish finish) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, count = lanes * N;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    found[e] = across(found[e]);
    if (lane < lanes) shared.parts[thread / kWarp * count + lane * N + e] = found[e];
  }
  shared.run(count, static_cast<int>(blockDim.x) / kWarp, cluster, merge, finish);
#pragma unroll
  for (int e = 0; e < N; ++e) found[e] = shared.parts[lane % lanes * N + e];
}

// The same if every thread has one row, of `lanes` side by side.
template <class M, class Merge>
__device__ M exchange_row(RowExchange<M>& shared, int lanes, int cluster, const M& found,
                          Merge merge) {
  const int thread = static_cast<int>(threadIdx.x), parts = static_cast<int>(blockDim.x) / lanes;
  if (thread < parts * lanes) shared.parts[thread] = found;
  shared.run(lanes, parts, cluster, merge, [](int, const M& total) { return total; });
  return shared.parts[thread % lanes];
}

}  // namespace syntonic
