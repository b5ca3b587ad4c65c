// Bounds of the keys of superblocks, which are so many complete blocks of a sequence in a row. A query of a long
// context looks at these first, and then at the blocks of the best of them only, so that its time hardly grows
// with the length.
//
// A superblock is known by its last block: as long as that keeps its content, it and the blocks before
// it are the same text. There are rows for all superblocks that the sequences of a step can have, which
// are those of the pool and, as sequences with a common beginning part within one, one more each.
#pragma once

#include <vector>

#include "model/block_selection.hpp"
#include "model/step.hpp"

namespace tael {

constexpr int kSuperblockBlocks = 32;

class Superblocks {
 public:
  Superblocks() = default;
  // Summaries of `head_bytes` for each of num_heads KV heads. No sequence has superblocks if num_blocks is 0.
  Superblocks(int64_t num_blocks, const Limits& limits, int num_heads, int64_t head_bytes);

  // Finds rows for the sequences of a step that choose among their superblocks. `restored` are blocks that got
  // other content since the last step by other means than one.
  void prepare(const Batch& batch, const Batch::BlockTable& block_table, const std::vector<int32_t>& restored);

  // Of a sequence, by superblock.
  const int32_t* rows(int32_t seq) const { return rows_of_.data() + seq * max_rows_; }

  // A row that is to be filled before it is read, and the blocks that it summarizes.
  struct Missing {
    int32_t row;
    const int32_t* blocks;
  };
  const std::vector<Missing>& missing() const { return missing_; }

  KVPool pool(int first_head) const {
    const int64_t of_head = int64_t(rows_.size()) * head_bytes_;
    return {summaries_.data(), head_bytes_, first_head * of_head, of_head};
  }
  int64_t bytes() const;

 private:
  struct Row {
    int32_t block = -1;  // the last of its superblock
    int64_t step = 0;    // of its last use
  };
  void forget(int32_t block);
  int32_t take_row();

  int64_t head_bytes_ = 0;
  int64_t max_rows_ = 0;  // of a sequence
  int64_t step_ = 0;
  size_t hand_ = 0;
  Buffer<uint8_t> summaries_;  // [num_heads][rows][head_bytes]
  std::vector<Row> rows_;
  std::vector<int32_t> row_of_;   // by block; -1: none
  std::vector<int32_t> rows_of_;  // [max_seqs][max_rows]
  std::vector<Missing> missing_;
};

}  // namespace tael
