// How reductions over channels, rows and columns are spread: found on an H100
// (docs/performance.md).
#pragma once

namespace syntonic {

// ---- channels: the statistics of a batch norm and the sums of its cotangent ----

constexpr int kChannelThreads = 256;
constexpr int kTurnPacks = 16;  // of a thread, before what they add to is merged
constexpr int kMergeWarps = 4;  // of a block that merges what workers left
constexpr int kMergeRows = 9;   // that a lane reads at once

// What a measure of channels takes in at a time.
struct ChannelTuning {
  int reads;   // packs of a thread
  int stages;  // how often that in shared memory, at least 2 and at most 5
};
constexpr ChannelTuning kMomentsOfChannels = {.reads = 2, .stages = 4};
constexpr ChannelTuning kSumsOfChannels = {.reads = 1, .stages = 4};
// Where the cotangent is wider than the data.
constexpr ChannelTuning kSumsOfWideCotangents = {.reads = 1, .stages = 3};

constexpr int kNormalisePacks = 4;  // of a thread that makes y, all on their way at once

// ---- column sums: gradients of parameters ----

constexpr int kFoldColumns = 32;
constexpr int kFoldLanes = 16;  // threads that share a column

// ---- a sum of squares ----

constexpr int kSquarePacks = 4;       // of a thread, on their way at once
constexpr int kSquareTilesAlone = 4;  // of each of several workers, who cost a second launch

}  // namespace syntonic
