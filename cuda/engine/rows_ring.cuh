// Rows on their way through shared memory: a persistent grid whose teams read the rows to come
// while they work on the one at hand.
#pragma once

#include "core/async_copy.cuh"
#include "engine/column_sums.cuh"

namespace syntonic {

// A copy goes at full speed only where its source and its target lie alike in lines of 128 bytes.
// Rows that begin at any 16-byte piece of a line are therefore shifted by as much in the ring, for
// which every warp, or team that is smaller, has room.
__host__ __device__ constexpr int ring_unit(int team) { return team < kWarp ? team : kWarp; }

// The distance of the pieces of one pack: the threads of the block, and the room for shifts, which
// rows of a few pieces do without.
__host__ __device__ constexpr int ring_stride(int threads, int team, int64_t row_bytes) {
  const bool shifts = row_bytes % (16 * kLine) != 0 && team >= 2 * kLine;
  return threads + (shifts ? threads / ring_unit(team) * kLine : 0);
}

// The packs of a thread in a row that goes through the ring: a few pieces of 16 bytes each,
// `stride` apart.
struct Slot {
  uint4* first;
  int stride;
  int pack_stride;

  __device__ uint4* pack(int k) const { return first + k * pack_stride; }
};

// K packs of `pieces` 16-byte pieces a thread and a row, in dynamic shared memory. A thread copies
// and reads only packs of its own, but these lie elsewhere for another row: the threads of a warp
// must meet before a turn is filled again.
template <int K>
struct Ring {
  uint4* base;  // of this thread
  int stride;
  int pieces;
  unsigned most;  // by which rows are shifted

  __device__ Ring(uint4* shared, int pieces, const Team& team, int64_t row_bytes)
      : stride(ring_stride(static_cast<int>(blockDim.x), team.size, row_bytes)), pieces(pieces) {
    const bool shifts = stride > static_cast<int>(blockDim.x);
    const int unit = static_cast<int>(threadIdx.x) / ring_unit(team.size);
    base = shared + threadIdx.x + (shifts ? unit * kLine : 0);
    most = shifts ? kLine - 1 : 0;
  }

  // Of the row that takes this turn, whose packs begin with number `pack` of the array.
  __device__ Slot slot(int turn, unsigned pack) const {
    return {base + turn * K * pieces * stride + (pack & most), stride, pieces * stride};
  }
};

// Where the rows of a unit of work lie, K packs a thread. Rows that are no whole packs begin inside
// of one; all rows of a team begin in the same place of one, `begin`, since the team goes from row
// to row by whole packs. The first and the last pack then hold elements that are not the row's.
template <class T, int K, bool kWhole>
class RowPacks {
 public:
  static constexpr int N = kVector<T>;
  const Team& team;
  int width;
  int begin;

  __device__ RowPacks(const Team& team, int width, int64_t first_row)
      : team(team),
        width(width),
        begin(kWhole ? 0 : static_cast<int>(static_cast<unsigned>(first_row) * width % N)) {
    if constexpr (!kWhole) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        present_ |= part<N>(first(k), begin, begin + width).present << k * N;
      }
    }
  }

  // Of the first pack, in the array.
  __device__ int64_t start(int64_t row) const { return row * width - begin; }
  __device__ unsigned first_pack(int64_t row) const {
    const unsigned number = static_cast<unsigned>(row), each = static_cast<unsigned>(width);
    return kWhole ? number * (each / N) : (number * each - begin) / N;
  }
  // Pack k of this thread, relative to start(row); nothing of a row that does not exist.
  __device__ auto at(int k, bool exists) const {
    if constexpr (kWhole) {
      return Span{first(k), 1, exists ? width : 0};
    } else {
      return Part{first(k), exists ? present(k) : 0};
    }
  }
  // The same for its columns in an array of `width` elements, relative to -begin.
  __device__ auto columns(int k) const { return at(k, true); }
  __device__ uint32_t present(int k) const {
    if constexpr (kWhole) return first(k) < width ? kAll<N> : 0;
    return present_ >> k * N & kAll<N>;
  }
  // How they are read: by vectors, or short of the last one.
  __device__ auto how_columns() const {
    if constexpr (kWhole) {
      return true;
    } else {
      return begin + width;
    }
  }
  // How a row is read, of an array of so many.
  __device__ auto how(int64_t row, int64_t rows) const {
    if constexpr (kWhole) {
      return true;
    } else {
      const int64_t left = rows - 1 - row;  // a few narrow ones may end within the last pack
      const int end = begin + width;
      return left >= N ? end + N : end + min(static_cast<int>(left) * width, N);
    }
  }

 private:
  __device__ int first(int k) const { return (k * team.size + team.rank) * N; }

  uint32_t present_ = 0;  // of K packs, a bit for each element
};

// A parameter at the columns of a thread, held for all rows of a unit of work. Where there is none
// it is `absent` everywhere.
template <class A, int N, int K>
class HeldParameter {
 public:
  template <class Packs>
  __device__ HeldParameter(const A* parameter, int64_t start, A absent, const Packs& packs) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A x[N];
      if (parameter) {
        load_parameter(parameter + start - packs.begin, packs.columns(k), packs.how_columns(), x);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) x[e] = absent;
      }
#pragma unroll
      for (int e = 0; e < N; ++e) held_[k][e] = x[e];
    }
  }

  __device__ void read(int k, A (&x)[N]) const {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = held_[k][e];
  }

 private:
  A held_[K > 0 ? K : 1][N];
};

// In how many places of a pack rows begin.
inline int phases(int64_t width, int vector) {
  int phases = 1;
  while (phases * width % vector != 0) phases *= 2;
  return phases;
}

struct NoSums {};
struct NothingKnown {};

// Rows first, first + apart, ... short of end, each for one of the teams of a block in turn.
struct Course {
  int64_t partial;
  int64_t first;
  int64_t end;
  int64_t apart;
  int64_t step;  // from turn to turn
  int64_t part;  // where the sums of its columns go
};

// Calls work with every course of this block, or cluster. Courses are interleaved, so that what
// runs at the same time reads what lies together. Where rows are no whole packs, and workers too
// few to be a multiple of the phases, a course has rows of one phase: those of a partial are shared
// out in the order of their phases, and a worker has a few courses.
template <bool kWhole, class F>
__device__ void for_courses(const Workers& workers, const Team& team, F work) {
  const int phases = kWhole ? 1 : workers.phases;
  for (int64_t unit = cluster_index(); unit < workers.partials * workers.members;
       unit += gridDim.x / team.blocks) {
    const int64_t partial = unit / workers.members, member = unit % workers.members;
    const int64_t origin = partial * workers.rows;
    Course course = {partial, origin + member * team.count, origin + workers.rows,
                     1,       workers.members * team.count, unit};
    if constexpr (kWhole) {
      work(course);
      continue;
    }
    const int64_t from = workers.rows * member / workers.members;
    const int64_t to = workers.rows * (member + 1) / workers.members;
    int64_t end = 0;  // of a phase, in that order
    for (int phase = 0; phase < phases; ++phase) {
      const int64_t begin = end;
      end += (workers.rows - phase + phases - 1) / phases;
      // Neighbours meet in a phase, even if one has no row of it: so no part is left out.
      if (phases > 1) {
        if (from >= end && phase + 1 < phases) continue;
        course.first = origin + phase + (max(from, begin) - begin) * phases;
        course.end = origin + phase + (min(to, end) - begin) * phases;
        course.apart = phases;
        course.step = team.count * phases;
        course.part = partial * workers.parts() + member + phase;
      }
      work(course);
      if (to < end) break;
    }
  }
}

template <class M>
__device__ M& part_of(M& value, int) {
  return value;
}
template <class M, int R>
__device__ M& part_of(Each<M, R>& value, int r) {
  return value.of[r];
}

// An operation is, for one thread and one course:
//   Known     what is known of a row beside its packs; known(row) reads it
//   Row       what this comes to: made of a Known
//   Measure   a monoid: what is found out of a whole row
//   fetch     begins to copy a row into its slot of the ring
//   measure   of a row in its slot, what this thread's packs add to the Measure
//   finish    stores the results of a row in its slot, given its Measure
//   leave     stores the column sums
//
// A turn takes kRows rows, which are measured before those of the turn before are finished, so that
// no thread waits for the reduction. kEarly: what is known of a row is read one turn earlier still.
// Needs two stages of the ring.
template <class Op, bool kEarly>
__global__ void __launch_bounds__(Op::kThreads, Op::kBlocks)
    rows_in_ring(const typename Op::Arguments a, const Workers workers,
                 const typename Op::Sums sums, const int stages) {
  wait_for_launches();
  using Known = typename Op::Known;
  using Row = typename Op::Row;
  constexpr int R = Op::kRows;
  using Measure = std::conditional_t<R == 1, typename Op::Measure, Each<typename Op::Measure, R>>;
  extern __shared__ __align__(16 * kLine) uint4 dynamic[];
  __shared__ Exchange<Measure> exchange;
  const Team team(a.team);
  Reducer<Measure> reduce(exchange, team);
  const Ring<Op::kPacks> ring(dynamic, a.pieces, team, a.width * sizeof(typename Op::T));

  for_courses<Op::kWhole>(workers, team, [&](const Course& course) {
    // All teams of the block make the same number of turns, `first` being the row of the first.
    int64_t first = course.first, row = first + team.index * course.apart;
    const int64_t end = course.end, next = course.step, step = R * next;
    Op op(a, team, row, course.partial);
    const auto slot = [&](int turn, int r, int64_t row) {
      return ring.slot(turn * R + r, op.packs.first_pack(row));
    };
    const auto fetch = [&](int turn, int64_t row) {
#pragma unroll
      for (int r = 0; r < R; ++r, row += next) op.fetch(slot(turn, r, row), row, row < end);
      commit_copies();
    };
    const auto know = [&](Known(&known)[R], int64_t row) {
#pragma unroll
      for (int r = 0; r < R; ++r, row += next) known[r] = row < end ? op.known(row) : Known{};
    };
    const auto measure = [&](const Row(&rows)[R], int turn, int64_t row) {
      Measure measure;
#pragma unroll
      for (int r = 0; r < R; ++r, row += next) {
        part_of(measure, r) = op.measure(slot(turn, r, row), rows[r], row, row < end);
      }
      reduce.post(measure);
    };

    if (Op::kWhole || first < end) {
      for (int turn = 0; turn < stages; ++turn) fetch(turn, row + turn * step);
      Known known[R];
      Row rows[R];
      know(known, row);
#pragma unroll
      for (int r = 0; r < R; ++r) rows[r] = Row(known[r]);
      know(known, row + step);
      wait_copies(stages - 1);
      measure(rows, 0, row);
      for (int turn = 0; first < end; first += step, row += step) {
        Measure measured = reduce.collect();
        const int next_turn = turn + 1 == stages ? 0 : turn + 1;
        Known later[R];
        Row next_rows[R];
        if constexpr (kEarly) {
          know(later, row + 2 * step);
        } else {
          know(known, row + step);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) next_rows[r] = Row(known[r]);
        if (first + step < end) {
          wait_copies(stages - 2);
          measure(next_rows, next_turn, row + step);
        }
        int64_t own = row;
#pragma unroll
        for (int r = 0; r < R; ++r, own += next) {
          op.finish(slot(turn, r, own), rows[r], own, own < end, part_of(measured, r));
        }
        __syncwarp();
        fetch(turn, row + stages * step);
        turn = next_turn;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          rows[r] = next_rows[r];
          if constexpr (kEarly) known[r] = later[r];
        }
      }
      wait_copies(0);
    }
    op.leave(sums, course.part, dynamic);
    // Before the ring is filled again: by its own warp, or by teams that shared its memory.
    if (team.count > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  });
}

// Bytes of the ring of a kernel by this plan, of `rows` rows a turn, whose stages are cut to what
// fits; 0 if not even the two fit that a ring needs.
template <class K>
size_t fit_ring(RowPlan& plan, K* kernel, int rows, int pieces, int64_t row_bytes) {
  const int stride = ring_stride(plan.threads, plan.team, row_bytes);
  const size_t turn = sizeof(uint4) * rows * plan.packs * pieces * stride;
  plan.stages = std::min<int>(plan.stages, dynamic_shared_capacity(kernel) / turn);
  return plan.stages < 2 ? 0 : plan.stages * turn;
}

}  // namespace syntonic
