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
    int cluster = 8;         // blocks in a cluster, at most
    int more = 0;            // packs that a row may touch where it does not begin one
    int stages = 0;          // of the ring of rows on their way; 0: rows in registers
    int rows = 1;            // that a stage has
    bool early = false;      // whether what is known of a row is read a turn before its use
  };
  Step step[20];
};

// ---- forward: found on an H200 ----

// Of arrays that are not read by packs.
constexpr RowTuning kForwardUnaligned = {.step = {{.packs = 2, .most = 256}}};
// Of rows that are no whole packs.
constexpr RowTuning kForwardRagged16 = {
    .step = {{.upto = 8, .packs = 2, .more = 1, .stages = 3},
             {.upto = 24, .block = 256, .more = 1, .stages = 3},
             {.upto = 32, .packs = 2},
             {.upto = 96, .block = 256, .more = 1, .stages = 2},
             {.upto = 512, .packs = 2, .block = 256, .more = 1, .stages = 3},
             {.more = 1, .stages = 2}},
};
constexpr RowTuning kForwardRagged = {
    .step = {{.upto = 24, .block = 256, .more = 1, .stages = 3},
             {.upto = 40, .block = 256, .more = 1, .stages = 2},
             {.upto = 64, .packs = 2},
             {.upto = 160, .block = 256, .more = 1, .stages = 2},
             {.upto = 512, .block = 256, .more = 1, .stages = 3},
             {.upto = 8192, .most = 256, .more = 1, .stages = 2},
             {.more = 1, .stages = 3}},
};
constexpr RowTuning kForward = {
    .step = {{.upto = 32, .packs = 2},
             {.upto = 1024},
             {.upto = 1536, .most = 192},
             {.upto = 2048},
             {.upto = 3072, .most = 192},
             {.upto = 8192, .stages = 2},
             {.cluster = 16, .stages = 3}},
};

// Without a residual a thread has registers for more.
constexpr RowTuning kPlainForward16 = {
    .step = {{.upto = 16, .block = 256},
             {.upto = 32, .block = 256, .stages = 3},
             {.upto = 48, .block = 256},
             {.upto = 64, .block = 256, .stages = 3},
             {.upto = 96, .block = 256},
             {.upto = 128, .block = 256, .stages = 3},
             {.upto = 192},
             {.upto = 256, .block = 256, .stages = 3},
             {.upto = 384},
             {.upto = 512, .stages = 3},
             {.upto = 768},
             {.cluster = 16, .stages = 3}},
};
constexpr RowTuning kPlainForward = {
    .step = {{.upto = 32, .packs = 2},
             {.upto = 128},
             {.upto = 256, .packs = 8},
             {.upto = 1024},
             {.upto = 1280, .most = 256, .stages = 3},
             {.cluster = 16, .stages = 3}},
};

// ---- cotangent: found on an H200 ----

// Of rows that are no whole packs.
constexpr RowTuning kCotangentRagged = {
    .step = {{.upto = 512, .packs = 2, .block = 256, .more = 1, .stages = 3},
             {.upto = 4096, .packs = 2, .most = 256, .more = 1, .stages = 3},
             {.packs = 2, .cluster = 16, .more = 1, .stages = 3, .rows = 2}},
};
// Of rows with a cotangent of the sum, in 16 bits: three arrays read and two written.
constexpr RowTuning kCotangent16 = {
    .step = {{.upto = 32, .packs = 1, .block = 256, .stages = 3},
             {.upto = 48, .packs = 2, .block = 384, .stages = 3, .early = true},
             {.upto = 64, .packs = 2, .block = 512, .stages = 3},
             {.upto = 96, .packs = 1, .block = 384, .stages = 3, .early = true},
             {.upto = 128, .packs = 2, .stages = 3},
             {.upto = 160, .packs = 2, .block = 512, .stages = 3, .early = true},
             {.upto = 320, .packs = 2, .stages = 3},
             {.upto = 384, .packs = 2, .stages = 2, .rows = 2},
             {.upto = 512, .packs = 2, .stages = 3},
             {.upto = 640, .packs = 2, .most = 160, .stages = 3},
             {.upto = 768, .packs = 2, .stages = 2, .rows = 2},
             {.upto = 1024, .packs = 2, .most = 256, .stages = 3},
             {.upto = 1536, .packs = 2, .stages = 2, .rows = 2},
             {.upto = 2048, .packs = 2, .most = 128, .stages = 3, .early = true},
             {.upto = 3072, .packs = 2, .stages = 3, .early = true},
             {.upto = 4096, .packs = 2, .stages = 2, .rows = 2},
             {.upto = 8192, .packs = 2, .stages = 3, .early = true},
             {.upto = 16384, .packs = 2, .cluster = 16, .stages = 2, .rows = 2},
             {.cluster = 16, .stages = 2}},
};
constexpr RowTuning kCotangent = {
    .step = {{.upto = 32, .packs = 1, .block = 384, .stages = 3},
             {.upto = 48, .packs = 1, .stages = 3},
             {.upto = 64, .packs = 2, .block = 384, .stages = 3},
             {.upto = 96, .packs = 2, .block = 384, .stages = 3, .early = true},
             {.upto = 128, .packs = 1, .stages = 3},
             {.upto = 192, .packs = 2, .stages = 3},
             {.upto = 320, .packs = 2, .block = 256, .stages = 3},
             {.upto = 384, .packs = 2, .most = 128, .stages = 3},
             {.upto = 512, .packs = 2, .block = 512, .stages = 3},
             {.upto = 768, .packs = 2, .most = 128, .stages = 3},
             {.upto = 1024, .packs = 2, .most = 256, .stages = 3},
             {.upto = 1536, .packs = 2, .most = 160, .stages = 3},
             {.upto = 2048, .packs = 2, .stages = 3},
             {.upto = 3072, .packs = 2, .most = 256, .stages = 3, .early = true},
             {.upto = 4096, .packs = 2, .stages = 2, .rows = 2},
             {.upto = 8192, .packs = 2, .stages = 3, .early = true},
             {.upto = 16384, .packs = 2, .cluster = 16, .stages = 2, .rows = 2},
             {.cluster = 16, .stages = 2}},
};
// Without it, two read and one written: an instruction counts for more, and a late number is not
// made up for by reads that are under way.
constexpr RowTuning kPlainCotangent16 = {
    .step = {{.upto = 64, .packs = 2, .block = 512, .stages = 3, .early = true},
             {.upto = 96, .packs = 3, .stages = 3},
             {.upto = 160, .packs = 2, .block = 512, .stages = 3, .early = true},
             {.upto = 192, .packs = 2, .stages = 3, .early = true},
             {.upto = 256, .packs = 2, .block = 256, .stages = 3, .early = true},
             {.upto = 512, .packs = 2, .stages = 3, .early = true},
             {.upto = 640, .packs = 2, .most = 160, .stages = 3, .early = true},
             {.upto = 1024, .packs = 2, .stages = 3, .early = true},
             {.upto = 1536, .packs = 3, .stages = 3},
             {.upto = 2048, .packs = 2, .stages = 3, .early = true},
             {.upto = 3072, .packs = 3, .stages = 3},
             {.upto = 8192, .packs = 2, .stages = 3, .early = true},
             {.upto = 16384, .packs = 2, .cluster = 16, .stages = 2, .rows = 2},
             {.cluster = 16, .stages = 2}},
};
constexpr RowTuning kPlainCotangent = {
    .step = {{.upto = 64, .packs = 2, .block = 384, .stages = 3, .early = true},
             {.upto = 128, .packs = 2, .block = 512, .stages = 3, .early = true},
             {.upto = 192, .packs = 2, .stages = 3, .early = true},
             {.upto = 256, .packs = 2, .block = 256, .stages = 2, .rows = 2},
             {.upto = 320, .packs = 2, .stages = 3, .early = true},
             {.upto = 384, .packs = 2, .most = 128, .stages = 3, .early = true},
             {.upto = 512, .packs = 2, .stages = 2, .rows = 2},
             {.upto = 768, .packs = 2, .most = 160, .stages = 3, .early = true},
             {.upto = 1024, .packs = 2, .stages = 3, .early = true},
             {.upto = 1280, .packs = 2, .most = 256, .stages = 3, .early = true},
             {.upto = 1536, .packs = 2, .most = 128, .stages = 3, .early = true},
             {.upto = 8192, .packs = 2, .stages = 3, .early = true},
             {.upto = 16384, .packs = 2, .cluster = 16, .stages = 2, .rows = 2},
             {.cluster = 16, .stages = 2}},
};

// ---- RMS norms, and layer norms in float64: not measured ----
//
// The fewest kernels that take every width, with numbers that served the layer norm at most of
// them.

constexpr RowTuning kUntunedForward = {
    .step = {{.upto = 32, .packs = 2}, {.upto = 2048}, {.cluster = 16, .stages = 3}},
};
constexpr RowTuning kUntunedForwardRagged = {
    .step = {{.upto = 32, .packs = 2}, {.cluster = 16, .more = 1, .stages = 2}},
};
constexpr RowTuning kUntunedCotangent = {
    .step = {{.packs = 2, .block = 256, .cluster = 16, .stages = 3, .early = true}},
};
constexpr RowTuning kUntunedCotangentRagged = {
    .step = {{.packs = 2, .block = 256, .cluster = 16, .more = 1, .stages = 3}},
};

// ---- softmax: found on an H100 ----

constexpr RowTuning kPlainSoftmax = {
    .step = {{.upto = 32, .packs = 2}, {.upto = 1024}, {.upto = 1536, .most = 256}, {}},
};
constexpr RowTuning kSoftmax = {.step = {{}}};
constexpr RowTuning kSoftmaxCotangent = {.step = {{.upto = 32, .packs = 2}, {}}};

}  // namespace syntonic
