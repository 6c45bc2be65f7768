// How rows are spread over threads, by width: data, found by measurement. docs/performance.md says
// how it was measured and what it won.
#pragma once

#include "core/types.h"

namespace syntonic {

// Cotangent kernels for one pack a thread are compiled for blocks of at most this size, so that
// more of them fit on a multiprocessor at once.
constexpr int kFewThreads = 384;

// The widths of one table follow each other; the last entry holds for all wider rows.
struct RowTuning {
  struct Step {
    int64_t upto = 0;        // packs in a row; 0: any number
    int packs = 4;           // that a thread takes
    int block = 128;         // threads that a block of smaller teams is filled up to
    int most = kMaxThreads;  // threads in a block; a wider team is a cluster, where there are
    int more = 0;            // packs that a row may touch where it does not begin one
    bool early = false;      // whether what is known of a row is read a turn before its use
  };
  Step step[20];
  int stages = 0;  // rows on their way to a team at any time; 0: rows in registers
};

// ---- forward: found on an H200 ----

// Of arrays that are not read by packs.
constexpr RowTuning kForwardUnaligned = {
    .step = {{.upto = 256, .packs = 2, .most = 256},
             {.upto = 8192, .most = 256, .more = 1},
             {.more = 1}},
};
constexpr RowTuning kForward = {
    .step = {{.upto = 32, .packs = 2},
             {.upto = 1024},
             {.upto = 1536, .most = 192},
             {.upto = 2048},
             {.upto = 3072, .most = 192},
             {.upto = 16384},
             {.packs = 8}},
};

// Without a residual a thread has registers for more.
constexpr RowTuning kPlainForward16 = {
    .step = {{.upto = 96, .block = 256},
             {.upto = 128},
             {.upto = 192, .packs = 8},
             {.upto = 256, .block = 256},
             {.upto = 1024},
             {.upto = 1536, .most = 192},
             {.upto = 2048},
             {.upto = 3072, .most = 192},
             {.upto = 16384},
             {.packs = 8}},
};
constexpr RowTuning kPlainForward = {
    .step = {{.upto = 32, .packs = 2},
             {.upto = 128},
             {.upto = 256, .packs = 8},
             {.upto = 16384},
             {.packs = 8}},
};

// ---- cotangent: found on an H200 ----

constexpr RowTuning kCotangentUnaligned = {.step = {{.packs = 2, .block = 256}}, .stages = 3};
// Of rows with a cotangent of the sum, in 16 bits: three arrays read and two written.
constexpr RowTuning kCotangent16 = {
    .step = {{.upto = 32, .packs = 1, .block = 256},
             {.upto = 48, .packs = 2, .block = 512, .early = true},
             {.upto = 64, .packs = 2, .block = 512},
             {.upto = 96, .packs = 1, .block = 384, .early = true},
             {.upto = 128, .packs = 2},
             {.upto = 160, .packs = 1, .block = 320, .early = true},
             {.upto = 320, .packs = 2},
             {.upto = 384, .packs = 2, .early = true},
             {.upto = 512, .packs = 2},
             {.upto = 640, .packs = 2, .most = 160},
             {.upto = 768, .packs = 2, .most = 192, .early = true},
             {.upto = 1024, .packs = 2, .most = 256},
             {.upto = 1536, .packs = 2, .most = 384, .early = true},
             {.upto = 2048, .packs = 2, .most = 128, .early = true},
             {.upto = 8192, .packs = 2, .early = true},
             {.packs = 4}},
    .stages = 3,
};
constexpr RowTuning kCotangent = {
    .step = {{.upto = 32, .packs = 1, .block = 384},
             {.upto = 128, .packs = 1},
             {.upto = 192, .packs = 2, .block = 192},
             {.upto = 384, .packs = 1},
             {.upto = 512, .packs = 2, .block = 512},
             {.upto = 768, .packs = 2, .most = 192},
             {.upto = 1024, .packs = 2, .most = 256},
             {.upto = 2048, .packs = 2},
             {.upto = 8192, .packs = 2, .early = true},
             {.packs = 4}},
    .stages = 3,
};
// Without it, two read and one written: an instruction counts for more, and a late number is not
// made up for by reads that are under way.
constexpr RowTuning kPlainCotangent16 = {
    .step = {{.upto = 32, .packs = 2, .block = 256, .early = true},
             {.upto = 48, .packs = 3, .block = 256},
             {.upto = 64, .packs = 2, .block = 256, .early = true},
             {.upto = 96, .packs = 3, .block = 512},
             {.upto = 128, .packs = 2, .block = 256, .early = true},
             {.upto = 192, .packs = 2, .early = true},
             {.upto = 256, .packs = 2, .block = 256, .early = true},
             {.upto = 512, .packs = 2, .early = true},
             {.upto = 640, .packs = 2, .most = 160, .early = true},
             {.upto = 768, .packs = 3},
             {.upto = 1024, .packs = 2, .early = true},
             {.upto = 1536, .packs = 3},
             {.upto = 2048, .packs = 2, .early = true},
             {.upto = 3072, .packs = 3},
             {.upto = 8192, .packs = 2, .early = true},
             {.packs = 4}},
    .stages = 3,
};
constexpr RowTuning kPlainCotangent = {
    .step = {{.upto = 64, .packs = 2, .early = true},
             {.upto = 128, .packs = 2, .block = 256, .early = true},
             {.upto = 192, .packs = 2, .early = true},
             {.upto = 8192, .packs = 2, .block = 256, .early = true},
             {.packs = 4}},
    .stages = 3,
};

// ---- softmax: found on an H100 ----

constexpr RowTuning kPlainSoftmax = {
    .step = {{.upto = 32, .packs = 2}, {.upto = 1024}, {.upto = 1536, .most = 256}, {}},
};
constexpr RowTuning kSoftmax = {.step = {{}}};
constexpr RowTuning kSoftmaxCotangent = {.step = {{.upto = 32, .packs = 2}, {}}};

}  // namespace syntonic
