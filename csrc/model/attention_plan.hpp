// Who attends to what in one step, for all layers of one shape and share of the KV budgets.
#pragma once

#include <atomic>

#include "model/block_selection.hpp"
#include "model/step.hpp"

namespace tael {

struct AttentionShape {
  int num_heads, num_kv_heads, head_dim;
  int window;          // INT32_MAX: full attention
  int budget_percent;  // of the KV budgets of tokens

  int heads_per_kv_head() const { return num_heads / num_kv_heads; }
  bool operator==(const AttentionShape&) const = default;
};

// Consecutive tokens of one sequence that lie in one block.
struct BlockSpan {
  int32_t seq;
  int32_t first_token;  // in the batch
  int32_t num_tokens;
  int32_t block;        // of the sequence: position / kBlockTokens
};

// One KV head of one sequence for a few tokens of one block. Long contexts of few queries are cut into
// partitions, so that every thread has work; whoever finishes the last of them merges them in
// order. The cut does not change the result (see kPartitionTokens).
struct AttentionPiece {
  int32_t seq;
  int32_t kv_head;
  int32_t first_token;  // in the batch
  int32_t num_tokens;
  int32_t first_partition;
  int32_t last_partition;  // exclusive
  int32_t merge;           // index; -1: not cut
  int32_t budget;          // blocks that its tokens choose together; 0: all
};

struct AttentionMerge {
  int64_t states = 0;  // place of the first partition's in the shared states
  int32_t first_partition = 0;
  int32_t num_partitions = 0;
  std::atomic<int32_t> num_finished{0};
};

class AttentionPlan {
 public:
  AttentionPlan(const AttentionShape& shape, const Limits& limits, int num_threads);

  void prepare(const Batch& batch);

  const AttentionShape& shape() const { return shape_; }
  const std::vector<BlockSpan>& spans() const { return spans_; }
  const std::vector<AttentionPiece>& pieces() const { return pieces_; }
  AttentionMerge& merge(int32_t index) { return merges_[index]; }

  int64_t max_piece_rows() const;
  int64_t shared_floats() const { return max_shared_; }
  int64_t bytes() const;

 private:
  int tokens_per_piece() const;
  int cut_span(const Batch& batch, const BlockSpan& span, AttentionPiece* pieces) const;
  int32_t budget(const Batch& batch, int32_t token) const;

  AttentionShape shape_;
  int num_threads_;
  int64_t max_shared_;
  std::vector<BlockSpan> spans_;
  std::vector<AttentionPiece> pieces_;
  std::vector<AttentionMerge> merges_;
};

}  // namespace tael
