#include "tiers/tiered_pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace tael {
namespace {

// Four lanes over 64-bit words. Each step is invertible, so that a change of one word changes its lane; turned,
// since a product carries nothing from high bits to low ones.
uint32_t checksum(const uint8_t* data, int64_t bytes) {
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;
  uint64_t lanes[4] = {1, 2, 3, 4};
  for (int64_t i = 0; i < bytes; i += 32)
    for (int lane = 0; lane < 4; ++lane) {
      uint64_t word;
      memcpy(&word, data + i + lane * 8, 8);
      lanes[lane] = std::rotl((lanes[lane] ^ word) * kFactor, 29);
    }
  uint64_t all = 0;
  for (const uint64_t lane : lanes) all = (all ^ (lane >> 32) ^ lane) * kFactor;
  return uint32_t(all >> 32);
}

}  // namespace

TieredPool::TieredPool(int fd, int64_t num_blocks, int heads_per_block, uint8_t* slots, int64_t num_slots,
                       int64_t slot_bytes)
    : num_blocks_(num_blocks),
      heads_per_block_(heads_per_block),
      slots_(slots),
      slot_bytes_(slot_bytes),
      states_(num_slots),
      slot_of_(num_blocks * heads_per_block, -1),
      checksums_(num_blocks * heads_per_block),
      file_(fd, kMaxInFlight) {
  if (slot_bytes % kAlignment != 0) throw std::invalid_argument("slots are not aligned");
#ifdef MADV_DONTFORK
  // After a fork while a read is under way, its bytes could come into the page of the other process (open(2)).
  madvise(slots, num_slots * slot_bytes, MADV_DONTFORK);
#endif
}

int64_t TieredPool::bytes() const {
  return int64_t(states_.size() * sizeof(Slot) + slot_of_.size() * (sizeof(int32_t) + sizeof(uint32_t)));
}

TieredPool::Counters TieredPool::counters() {
  const Lock lock(mutex_);
  return counters_;
}

FileOp TieredPool::op(bool is_write, int32_t slot) const {
  return {is_write, states_[slot].key * slot_bytes_, slots_ + slot * slot_bytes_, slot_bytes_, slot};
}

// One thread at a time asks the kernel what has ended, the others wait for it.
template <class Fn> void TieredPool::wait_until(Lock& lock, Fn holds) {
  constexpr int kMost = 64;
  FileResult results[kMost];
  uint32_t sums[kMost];
  while (!holds()) {
    if (is_reaping_) {
      changed_.wait(lock);
      continue;
    }
    is_reaping_ = true;
    lock.unlock();
    const int count = file_.wait(results, kMost);
    for (int i = 0; i < count; ++i) sums[i] = checksum(slot(int32_t(results[i].tag)), slot_bytes_);
    lock.lock();
    is_reaping_ = false;
    for (int i = 0; i < count; ++i) complete(results[i], sums[i]);
    changed_.notify_all();
  }
}

void TieredPool::pin(int head, const int32_t* blocks, int n, int32_t* slots) {
  int64_t keys[kMaxPinned];
  for (int i = 0; i < n; ++i) keys[i] = int64_t(blocks[i]) * heads_per_block_ + head;
  pin(keys, n, slots);
}

void TieredPool::pin(const int64_t* keys, int n, int32_t* slots) {
  FileOp loads[kMaxPinned];
  int num_loads = 0;
  {
    Lock lock(mutex_);
    for (int i = 0; i < n; ++i) {
      const int64_t key = keys[i];
      int32_t slot = slot_of_[key];
      if (slot < 0) {
        slot = take_slot(lock);
        // While that waited for others, one of them may have brought it.
        if (slot_of_[key] >= 0) {
          states_[slot].state = State::Free;
          slot = slot_of_[key];
        } else {
          slot_of_[key] = slot;
          states_[slot].key = key;
          states_[slot].state = State::Loading;
          loads[num_loads++] = op(false, slot);
        }
      }
      states_[slot].num_uses = std::min<uint8_t>(states_[slot].num_uses + 1, kMostUses);
      ++states_[slot].num_pins;
      slots[i] = slot;
    }
    counters_.num_hits += n - num_loads;
    counters_.num_loads += num_loads;
    wait_until(lock, [&] { return num_in_flight_ + num_loads <= kMaxInFlight; });
    num_in_flight_ += num_loads;
  }
  file_.submit(loads, num_loads);
}

void TieredPool::prefetch(int head, const int32_t* blocks, int n) {
  if (!file_.is_asynchronous()) return;
  FileOp loads[kMaxPinned];
  int num_loads = 0;
  {
    const Lock lock(mutex_);
    for (int i = 0; i < n && num_loads < kMaxPinned && num_in_flight_ < kMaxInFlight; ++i) {
      const int64_t key = int64_t(blocks[i]) * heads_per_block_ + head;
      if (slot_of_[key] >= 0) continue;
      const int32_t slot = find_slot();
      if (slot < 0) break;
      slot_of_[key] = slot;
      states_[slot] = {key, 0, State::Loading, 0};  // not read yet
      loads[num_loads++] = op(false, slot);
      ++num_in_flight_;
    }
    counters_.num_prefetches += num_loads;
  }
  file_.submit(loads, num_loads);
}

void TieredPool::wait(const int32_t* slots, int n) {
  Lock lock(mutex_);
  for (int i = 0; i < n; ++i)
    wait_until(lock, [&, slot = slots[i]] { return states_[slot].state != State::Loading; });
}

void TieredPool::unpin(const int32_t* slots, int n) {
  const Lock lock(mutex_);
  for (int i = 0; i < n; ++i) --states_[slots[i]].num_pins;
}

int32_t TieredPool::begin_store(int head, int32_t block) {
  const int64_t key = int64_t(block) * heads_per_block_ + head;
  Lock lock(mutex_);
  // An earlier owner's bytes may still be on their way to this place of the file.
  wait_until(lock, [&] { return slot_of_[key] < 0 || states_[slot_of_[key]].state == State::Ready; });
  int32_t slot = slot_of_[key];
  if (slot < 0) {
    slot = take_slot(lock);
    slot_of_[key] = slot;
  }
  states_[slot] = {key, 1, State::Filling, 1};
  return slot;
}

void TieredPool::end_store(int32_t slot) {
  const uint32_t sum = checksum(this->slot(slot), slot_bytes_);
  {
    Lock lock(mutex_);
    wait_until(lock, [&] { return num_in_flight_ < kMaxInFlight; });
    ++num_in_flight_;
    ++counters_.num_stores;
    checksums_[states_[slot].key] = sum;
    states_[slot].state = State::Storing;
    --states_[slot].num_pins;
  }
  const FileOp store = op(true, slot);
  file_.submit(&store, 1);
}

TieredPool::Lost TieredPool::take_lost() {
  const Lock lock(mutex_);
  return std::exchange(lost_, {});
}

void TieredPool::read_block(int32_t block, uint8_t* out) {
  bool is_lost = false;
  for (int first = 0; first < heads_per_block_; first += kMaxPinned) {
    const int n = std::min(kMaxPinned, heads_per_block_ - first);
    int64_t keys[kMaxPinned];
    int32_t slots[kMaxPinned];
    for (int i = 0; i < n; ++i) keys[i] = int64_t(block) * heads_per_block_ + first + i;
    pin(keys, n, slots);
    wait(slots, n);
    for (int i = 0; i < n; ++i) memcpy(out + (first + i) * slot_bytes_, slot(slots[i]), slot_bytes_);
    const Lock lock(mutex_);
    for (int i = 0; i < n; ++i) {
      is_lost |= states_[slots[i]].key != keys[i];
      --states_[slots[i]].num_pins;
    }
  }
  if (is_lost) throw LostBlocks("a KV block could not be read back");
}

void TieredPool::write_block(int32_t block, const uint8_t* in) {
  for (int head = 0; head < heads_per_block_; ++head) {
    const int32_t slot = begin_store(head, block);
    memcpy(this->slot(slot), in + head * slot_bytes_, slot_bytes_);
    end_store(slot);
  }
}

// A free slot, or the next that may be given away; -1 if there is none. What it held is forgotten.
int32_t TieredPool::find_slot() {
  for (size_t i = 0; i < (kMostUses + 1) * states_.size(); ++i) {
    const int32_t at = int32_t(hand_);
    hand_ = hand_ + 1 < int64_t(states_.size()) ? hand_ + 1 : 0;
    Slot& slot = states_[at];
    if (slot.num_pins > 0 || (slot.state != State::Free && slot.state != State::Ready)) continue;
    if (slot.num_uses > 0 && slot.state == State::Ready) {
      --slot.num_uses;
      continue;
    }
    if (slot.state == State::Ready) slot_of_[slot.key] = -1;
    slot = {-1, 0, State::Filling, 0};
    return at;
  }
  return -1;
}

// As find_slot, but waits for those that are being read or written.
int32_t TieredPool::take_slot(Lock& lock) {
  int32_t slot = -1;
  wait_until(lock, [&] { return (slot = find_slot()) >= 0 || num_in_flight_ == 0; });
  if (slot < 0) throw std::logic_error("too few slots");
  return slot;
}

void TieredPool::complete(const FileResult& result, uint32_t sum) {
  Slot& slot = states_[result.tag];
  --num_in_flight_;
  const bool is_whole = result.result == slot_bytes_ && sum == checksums_[slot.key];
  if (is_whole) {
    slot.state = State::Ready;
    return;
  }
  ++counters_.num_errors;
  const char* what = slot.state == State::Storing ? "could not be written" : "could not be read back";
  if (lost_.reason.empty())
    lost_.reason = std::string("KV blocks ") + what + ": " +
                   (result.result < 0             ? strerror(int(-result.result))
                    : result.result < slot_bytes_ ? "the file ends too early"
                                                  : "the checksum is wrong");
  lost_.blocks.push_back(int32_t(slot.key / heads_per_block_));
  memset(this->slot(int32_t(result.tag)), 0, slot_bytes_);
  slot_of_[slot.key] = -1;
  slot = {-1, slot.num_pins, State::Free, 0};
}

}  // namespace tael
