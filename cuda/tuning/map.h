// How elementwise work is spread: found on an H100 (docs/performance.md).
#pragma once

namespace syntonic {

constexpr int kMapThreads = 256;

// Packs of a thread are loaded before the first is used.
constexpr int kMapPacks = 1;
constexpr int kCrystallizePacks = 2;  // of types wider than 16 bits: computing takes as long

}  // namespace syntonic
