// The logits of a row that is streamed.
#pragma once

#include "engine/rows_staged.cuh"
#include "engine/rows_streamed.cuh"
#include "ops/softmax.cuh"

namespace syntonic {

template <bool kPlain, class T>
struct LogitStream {
  using A = Acc<T>;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = kPlain ? kPacksUnderWay<T> : 4;  // the others need registers

  const Logits<T>& from;
  const Stretch<T>& of;
  RowStart row;
  A scale;

  __device__ LogitStream(const Logits<T>& from, const Stretch<T>& of, int64_t group, int width)
      : from(from), of(of), row{of.start, group * width, width}, scale(from.scale_of(group)) {}

  __device__ uint32_t read(int pack, const Packed<T, N>& x, A (&z)[N]) const {
    return logits_of<kPlain>(from, scale, row, of.first(pack), x, z);
  }
  // Only a cross entropy has plain logits here. It reads them once: the cache need not keep them.
  __device__ Packed<T, N> raw(int pack) const {
    constexpr Cache kCache = kPlain ? Cache::passing : Cache::keep;
    return read_pack<T, N, kCache>(from.x + of.start + of.first(pack));
  }
  __device__ A edge(int i, bool& present) const {
    return logit_at(from, scale, row, of.edge(i), present);
  }

  // The largest logit and the sum, of the elements of this thread.
  __device__ MaxSum<A> max_sum(const Team& team) const {
    MaxSum<A> found;
    uint32_t any = 0;
    // The first of its single elements is read together with the first packs.
    bool edge_present = false;
    A first_edge[1][1] = {{-kInfinity<A>}};
    if (team.rank < of.edges()) first_edge[0][0] = edge(team.rank, edge_present);
    for (int turn = team.rank; turn < of.packs; turn += kPacks * team.size) {
      Packed<T, N> x[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int pack = turn + k * team.size;
        x[k] = pack < of.packs ? raw(pack) : lowest_pack<T, N>();
      }
      if constexpr (kPlain) {
        Packed<T, N> top = x[0];
#pragma unroll
        for (int k = 1; k < kPacks; ++k) raise(top, x[k]);
        const A base = found.raise_to(largest(top));
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          A z[N];
          unpack(x[k], z);
          add_terms<T>(found.sum, base, z);
        }
        any |= 1;
      } else {
        A z[kPacks][N];
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          const int pack = turn + k * team.size;
          if (pack < of.packs) {
            any |= read(pack, x[k], z[k]);
          } else {
            hide_absent(0, z[k], -kInfinity<A>);
          }
        }
        found.template extend<T>(z);
      }
    }
    found.template extend<T>(first_edge);
    any |= edge_present;
    for (int i = team.rank + team.size; i < of.edges(); i += team.size) {
      bool present;
      const A z[1][1] = {{edge(i, present)}};
      found.template extend<T>(z);
      any |= present;
    }
    tell_apart(found, any);
    return found;
  }
};

}  // namespace syntonic
