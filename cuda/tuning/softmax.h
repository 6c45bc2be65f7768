// How the work of a softmax or a cross entropy is spread: found on an H100 (docs/performance.md).
// Rows in registers are in tuning/rows.h.
#pragma once

#include "core/types.h"

namespace syntonic {

// ---- rows ----

// Packs of a row that is held in registers, at most; wider ones are staged or streamed.
constexpr int kRowPacks = kMaxThreads * 4;

// Rows of other than whole packs go through tiles of many up to this width.
constexpr int kTileWidth = 1024;

// Rows that are streamed.
constexpr int kStreamThreads = 256;       // in a block
constexpr int kLeastStreamThreads = 128;  // in a block; smaller teams share one
constexpr int kResidentThreads = 1024;    // of a multiprocessor, in blocks of any size
constexpr int kStreamPacks16 = 8;         // of a thread, under way at a time, in 16 bits
constexpr int kStreamPacks = 4;           // in wider types

// Rows that are staged in shared memory, in pieces of 16 bytes.
constexpr int kStageThreads = 256;
constexpr int kHeldPacks = 4;       // the first of a thread stay in its registers
constexpr int kStagePieces = 2048;  // of a block, unless a cluster has no more blocks,
constexpr int kMostPieces = 4352;   // or no more than the large one must have

// The cotangent of a cross entropy, every element for itself.
constexpr int kPieceThreads = 256;
constexpr int kPiecePacks = 4;  // of a thread

// ---- planes: softmax along an inner axis ----

constexpr int kPlaneThreads = 256;
constexpr int kTileBytes = 16 << 10;      // of the planes of a tile
constexpr int kTileRows = kPlaneThreads;  // of a tile
constexpr int kTileColumns = 64;          // rows of a block, but for tiles
constexpr int kColumnLanes = 8;           // threads side by side: a line of 128 bytes
constexpr int kColumnPacks = 8;           // of a thread at least, as long as there are others

}  // namespace syntonic
