// The complete blocks of one cache group: all of them in a file, as many as there is room for in memory.
//
// What moves is one KV head of one layer of one block, here called a *head*: what a selection of blocks
// asks for. A head is in memory in a slot:
//
//     slot  [head_bytes, rounded up to kAlignment]      file  [block][layer, KV head][slot]
//
// It is written as soon as it is complete, so that a slot can be given away without a write before. Which
// slot that is, a clock decides that counts (as PostgreSQL's of buffers does): each read of a slot adds one, up
// to kMostUses, each pass of the hand takes one, and a slot with none left is given away. What comes back from
// the file must have the checksum that it went with.
#pragma once

#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "tiers/async_file.hpp"

namespace tael {

// What was asked for could not be read back.
struct LostBlocks : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class TieredPool {
 public:
  // Of places in memory and in the file: direct I/O asks for it.
  static constexpr int64_t kAlignment = 512;

  struct Counters {
    int64_t num_hits, num_loads, num_prefetches, num_stores, num_errors;
  };

  // `slots` is [num_slots, slot_bytes] and stays the caller's.
  TieredPool(int fd, int64_t num_blocks, int heads_per_block, uint8_t* slots, int64_t num_slots, int64_t slot_bytes);

  // Starts to bring one head of n blocks into memory, and writes the slots to `slots`. They stay where they
  // are until unpin(); wait() returns when their bytes are there. Of one thread no more than kMaxPinned may
  // be pinned at a time.
  void pin(int head, const int32_t* blocks, int n, int32_t* slots);
  void wait(const int32_t* slots, int n);
  void unpin(const int32_t* slots, int n);
  static constexpr int kMaxPinned = 96;
  // Fewest slots for that many threads.
  static constexpr int64_t min_slots(int num_threads) { return (num_threads + 1) * int64_t(kMaxPinned + 1); }

  // Starts to bring one head of n blocks into memory, as far as that goes without waiting.
  void prefetch(int head, const int32_t* blocks, int n);

  // A slot to put a head into, which end_store() then writes to the file.
  int32_t begin_store(int head, int32_t block);
  void end_store(int32_t slot);

  // All heads of a block, a slot each. Reading throws LostBlocks if one cannot be read.
  void read_block(int32_t block, uint8_t* out);
  void write_block(int32_t block, const uint8_t* in);

  // The blocks that could not be written or read back since the last call, and the reason of the first. Whoever
  // waits for such a head reads zeros; what it had in memory is gone too.
  struct Lost {
    std::vector<int32_t> blocks;
    std::string reason;
  };
  Lost take_lost();

  uint8_t* slot(int32_t index) const { return slots_ + index * slot_bytes_; }
  uint8_t* data() const { return slots_; }
  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t num_blocks() const { return num_blocks_; }
  int heads_per_block() const { return heads_per_block_; }
  Counters counters();
  int64_t bytes() const;  // without the slots

 private:
  enum class State : uint8_t { Free, Filling, Storing, Loading, Ready };
  struct Slot {
    int64_t key = -1;  // block * heads_per_block + head
    uint16_t num_pins = 0;
    State state = State::Free;
    uint8_t num_uses = 0;
  };
  using Lock = std::unique_lock<std::mutex>;

  void pin(const int64_t* keys, int n, int32_t* slots);
  int32_t take_slot(Lock& lock);
  int32_t find_slot();
  template <class Fn> void wait_until(Lock& lock, Fn holds);
  void complete(const FileResult& result, uint32_t sum);
  FileOp op(bool is_write, int32_t slot) const;

  static constexpr int kMaxInFlight = 512;
  // Instead of 1, "read since the last pass": with random weights, 64K tokens and a third of them in memory an
  // answer loads 12% less with 3, and 14% with 7.
  static constexpr uint8_t kMostUses = 3;

  const int64_t num_blocks_;
  const int heads_per_block_;
  uint8_t* const slots_;
  const int64_t slot_bytes_;
  std::mutex mutex_;  // of all that follows
  std::condition_variable changed_;
  std::vector<Slot> states_;
  std::vector<int32_t> slot_of_;      // by key; -1: not in memory
  std::vector<uint32_t> checksums_;   // by key
  int64_t hand_ = 0;
  int num_in_flight_ = 0;
  bool is_reaping_ = false;
  Lost lost_;
  Counters counters_{};
  AsyncFile file_;  // last: it goes first, while the slots are there
};

}  // namespace tael
