// What is known of devices, by their numbers.
#pragma once

#include <atomic>
#include <cstdint>

namespace syntonic {

// For what has to be asked or done once for each device; doing it twice, as two threads may, must
// be harmless. A device beyond the 64th is never in the set.
class DeviceSet {
 public:
  bool has(int device) const { return bits_.load(std::memory_order_relaxed) & bit(device); }
  void add(int device) { bits_.fetch_or(bit(device), std::memory_order_relaxed); }

 private:
  static uint64_t bit(int device) { return device < 64 ? uint64_t{1} << device : 0; }

  std::atomic<uint64_t> bits_{0};
};

}  // namespace syntonic
