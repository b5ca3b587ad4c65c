#include "model/superblocks.hpp"

#include <stdexcept>

namespace tael {
namespace {

constexpr int kSuperblockTokens = kSuperblockBlocks * kBlockTokens;

// Complete superblocks that the tokens of a sequence choose among.
int num_superblocks(const Batch& batch, int32_t seq) {
  int num = 0;
  for (int32_t t = batch.query_start[seq]; t < batch.query_start[seq + 1]; ++t) {
    const int complete = batch.positions[t] / kSuperblockTokens;
    // Some layer may read less than the budget.
    if (batch.kv_budgets[t] > 0 && complete > num_scored_superblocks(0)) num = complete;
  }
  return num;
}

int32_t last_block(const int32_t* blocks, int superblock) { return blocks[(superblock + 1) * kSuperblockBlocks - 1]; }

}  // namespace

Superblocks::Superblocks(int64_t num_blocks, const Limits& limits, int num_heads, int64_t head_bytes)
    : head_bytes_(head_bytes), max_rows_(limits.max_model_len / kSuperblockTokens) {
  if (num_blocks == 0 || max_rows_ <= num_scored_superblocks(0)) return;
  const int64_t num_rows = num_blocks / kSuperblockBlocks + limits.max_seqs;
  summaries_ = Buffer<uint8_t>(num_rows * num_heads * head_bytes);
  rows_.resize(num_rows);
  row_of_.resize(num_blocks, -1);
  rows_of_.resize(limits.max_seqs * max_rows_);
  missing_.reserve(num_rows);
}

int64_t Superblocks::bytes() const {
  return summaries_.bytes() + int64_t(rows_.capacity() * sizeof(Row) + missing_.capacity() * sizeof(Missing) +
                                      (row_of_.capacity() + rows_of_.capacity()) * sizeof(int32_t));
}

void Superblocks::prepare(const Batch& batch, const Batch::BlockTable& block_table,
                          const std::vector<int32_t>& restored) {
  missing_.clear();
  if (rows_.empty()) return;
  ++step_;
  for (const int32_t block : restored) forget(block);
  for (int32_t s = 0; s < batch.num_seqs; ++s) {
    const int32_t* blocks = block_table.row(s);
    const int32_t first = batch.positions[batch.query_start[s]], last = batch.positions[batch.query_start[s + 1] - 1];
    for (int32_t b = first / kBlockTokens; b <= last / kBlockTokens; ++b) forget(blocks[b]);
  }
  if (!batch.kv_budgets) return;
  // First all that are there, so that none of them is given away.
  for (int32_t s = 0; s < batch.num_seqs; ++s)
    for (int i = 0, num = num_superblocks(batch, s); i < num; ++i)
      if (const int32_t row = row_of_[last_block(block_table.row(s), i)]; row >= 0) rows_[row].step = step_;
  for (int32_t s = 0; s < batch.num_seqs; ++s)
    for (int i = 0, num = num_superblocks(batch, s); i < num; ++i) {
      const int32_t* blocks = block_table.row(s);
      int32_t& row = row_of_[last_block(blocks, i)];
      if (row < 0) {
        row = take_row();
        rows_[row] = {last_block(blocks, i), step_};
        missing_.push_back({row, blocks + i * kSuperblockBlocks});
      }
      rows_of_[s * max_rows_ + i] = row;
    }
}

void Superblocks::forget(int32_t block) {
  int32_t& row = row_of_[block];
  if (row >= 0) rows_[row].block = -1;
  row = -1;
}

// A row that no sequence of this step has.
int32_t Superblocks::take_row() {
  for (size_t i = 0; i < rows_.size(); ++i) {
    const size_t at = hand_;
    hand_ = hand_ + 1 < rows_.size() ? hand_ + 1 : 0;
    if (rows_[at].step == step_) continue;
    if (rows_[at].block >= 0) row_of_[rows_[at].block] = -1;
    return int32_t(at);
  }
  throw std::logic_error("too few rows for the superblocks of a step");
}

}  // namespace tael
