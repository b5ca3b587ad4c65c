// Who attends to what in one step, for all layers of one shape.
#pragma once

#include "model/step.hpp"

namespace tael {

struct AttentionShape {
  int num_heads, num_kv_heads, head_dim;
  int window;  // INT32_MAX: full attention

  int heads_per_kv_head() const { return num_heads / num_kv_heads; }
  bool operator==(const AttentionShape&) const = default;
};

// One KV head of one sequence for a few tokens. Long contexts of few queries are cut into
// partitions, so that every thread has work; `merges` then combines them. The cut does not
// change the result (see kPartitionTokens).
struct AttentionPiece {
  int32_t seq;
  int32_t kv_head;
  int32_t first_token;  // in the batch
  int32_t num_tokens;
  int32_t first_partition;
  int32_t last_partition;  // exclusive
  int64_t state;           // place in the shared states; -1: done by one thread
};

class AttentionPlan {
 public:
  AttentionPlan(const AttentionShape& shape, const Limits& limits, int num_threads);

  void prepare(const Batch& batch);

  const AttentionShape& shape() const { return shape_; }
  const std::vector<AttentionPiece>& pieces() const { return pieces_; }
  const std::vector<AttentionPiece>& merges() const { return merges_; }

  // Floats of the states of the largest piece, for one partition.
  int64_t piece_floats() const { return max_rows() * attention_state_floats(shape_.head_dim); }
  int64_t shared_floats() const { return max_shared_; }

 private:
  int max_rows() const;
  int tokens_per_piece() const;

  AttentionShape shape_;
  int num_threads_;
  int64_t max_shared_;
  std::vector<AttentionPiece> pieces_, merges_;
};

}  // namespace tael
