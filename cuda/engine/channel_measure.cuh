// How a thread goes through the packs of a channel, whatever it measures.
//
// A measure F has the types T of the data, A of accumulation, M of the monoid, and
//   int         kReads, packs that a thread reads at a time
//   int         kStages, how many such reads shared memory holds, from 2 to 5
//   int         kPieces, pieces that are read for a pack of the data
//   Raw<V>      V elements as they are in memory
//   Number      what is computed of one element
//   Channel     what is known of a channel
//   Turn        what is summed over a few packs of a channel
//   Raw<V>   read<V>(int64_t first) const
//   void     start(uint4* pieces, int64_t first) const     starts to copy a pack to shared memory,
//                                                          its pieces kChannelThreads apart
//   Raw<V>   started<V>(const uint4* pieces) const         reads it there
//   void     unpack(const Raw<V>&, Number (&)[V]) const
//   Channel  channel(int64_t partial, int64_t channel) const
//   Turn     begin(const M&, const Number&) const     the number is one that `take` will get
//   void     take(Turn&, const Number&, const Channel&) const
//   void     end(M&, const Turn&, int n) const        adds a turn of n numbers
//   auto     parameters(int64_t result) const         what `store` needs from memory
//   void     store(int64_t result, const M&, parameters, const Channels&, int lane) const
//                                                          called by a warp
#pragma once

#include "core/async_copy.cuh"
#include "engine/row_plan.cuh"
#include "tuning/channels.h"

namespace syntonic {

// Begins a turn of every channel, with a pack that is taken afterwards. Element e is of channel e,
// or all are of one channel.
template <int V, int E, class F>
__device__ void begin_turn(const F& f, const typename F::template Raw<V>& raw,
                           const typename F::M (&found)[E], typename F::Turn (&turn)[E]) {
  static_assert(E == 1 || E == V);
  typename F::Number x[V];
  f.unpack(raw, x);
#pragma unroll
  for (int e = 0; e < E; ++e) turn[e] = f.begin(found[e], x[e]);
}

// Takes the numbers of the first n packs.
template <bool kAll, int R, int V, int E, class F>
__device__ void take_packs(const F& f, const typename F::template Raw<V> (&raw)[R], int n,
                           const typename F::Channel (&channel)[E], typename F::Turn (&turn)[E]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (!kAll && r >= n) continue;
    typename F::Number x[V];
    f.unpack(raw[r], x);
#pragma unroll
    for (int e = 0; e < V; ++e) f.take(turn[e % E], x[e], channel[e % E]);
  }
}

template <int V, int E, class F>
__device__ void end_turn(const F& f, int packs, const typename F::Turn (&turn)[E],
                         typename F::M (&found)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e) f.end(found[e], turn[e], packs * V / E);
}

// Takes `left` packs of V elements, which begin at what `next` returns; reads R of them at a time.
template <int R, int V, int E, class F, class Next>
__device__ void take_in(const F& f, int left, Next next, const typename F::Channel (&channel)[E],
                        typename F::M (&found)[E]) {
  typename F::template Raw<V> raw[R];
  typename F::Turn turn[E];
  for (; left >= R; left -= R) {
#pragma unroll
    for (int r = 0; r < R; ++r) raw[r] = f.template read<V>(next());
    begin_turn<V>(f, raw[0], found, turn);
    take_packs<true, R, V>(f, raw, R, channel, turn);
    end_turn<V>(f, R, turn, found);
  }
  if (left <= 0) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r < left) raw[r] = f.template read<V>(next());
  }
  begin_turn<V>(f, raw[0], found, turn);
  take_packs<false, R, V>(f, raw, left, channel, turn);
  end_turn<V>(f, left, turn, found);
}

// The same for packs of 16 bytes, through stages in shared memory: while one is taken, the others
// are being filled. A thread reads only what it has copied itself. Turns are long, because the end
// of one costs as much as some packs.
template <class F>
constexpr int kPiecesStaged = F::kStages * F::kReads * F::kPieces * kChannelThreads;

template <int V, int E, class F, class Next>
__device__ void take_in_staged(const F& f, uint4* stages, int left, Next next,
                               const typename F::Channel (&channel)[E], typename F::M (&found)[E]) {
  constexpr int R = F::kReads, kPack = F::kPieces * kChannelThreads;
  static_assert(kTurnPacks % R == 0);
  uint4* const own = stages + threadIdx.x;
  const auto after = [&](uint4* stage) {
    return stage == own + (F::kStages - 1) * R * kPack ? own : stage + R * kPack;
  };
  uint4 *fill = own, *stage = own;
  int ahead = left;  // packs whose copy is not yet started
  const auto start = [&] {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r < ahead) f.start(fill + r * kPack, next());
    }
    commit_copies();
    fill = after(fill), ahead -= R;
  };
#pragma unroll
  for (int i = 1; i < F::kStages; ++i) start();
  while (left > 0) {
    const int packs = left < kTurnPacks ? left : kTurnPacks;
    typename F::Turn turn[E];
    for (int taken = 0; taken < packs; taken += R, left -= R) {
      wait_copies(F::kStages - 2);
      start();
      typename F::template Raw<V> raw[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < left) raw[r] = f.template started<V>(stage + r * kPack);
      }
      stage = after(stage);
      if (taken == 0) begin_turn<V>(f, raw[0], found, turn);
      if (left >= R) {
        take_packs<true, R, V>(f, raw, R, channel, turn);
      } else {
        take_packs<false, R, V>(f, raw, left, channel, turn);
      }
    }
    end_turn<V>(f, packs, turn, found);
  }
}

}  // namespace syntonic
