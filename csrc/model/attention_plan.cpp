#include "model/attention_plan.hpp"

#include <algorithm>

namespace tael {
namespace {

// Rows of one piece: enough that a block of K and V is read once for many queries, few enough
// that their states stay in the L2 cache.
constexpr int kRows = 64;

}  // namespace

AttentionPlan::AttentionPlan(const AttentionShape& shape, const Limits& limits, int num_threads)
    : shape_(shape), num_threads_(num_threads) {
  const int64_t partitions = (limits.max_model_len + kPartitionTokens - 1) / kPartitionTokens;
  // Two sequences at full length, or more shorter ones; sequences beyond that are not cut.
  max_shared_ = 2 * partitions * shape.num_heads * attention_state_floats(shape.head_dim);
  const int64_t whole = shape.num_kv_heads * (limits.max_tokens + limits.max_seqs);
  pieces_.reserve(whole + 2 * partitions * shape.num_kv_heads);
  merges_ = std::vector<AttentionMerge>(4 * num_threads);
}

int64_t AttentionPlan::max_piece_rows() const { return std::max(kRows, shape_.heads_per_kv_head()); }

int AttentionPlan::tokens_per_piece() const { return std::max(1, kRows / shape_.heads_per_kv_head()); }

void AttentionPlan::prepare(const Batch& batch) {
  const int step = tokens_per_piece();
  int64_t num_whole = 0;
  for (int64_t s = 0; s < batch.num_seqs; ++s)
    num_whole += (batch.query_start[s + 1] - batch.query_start[s] + step - 1) / step;
  const bool few = num_whole * shape_.num_kv_heads < 4 * num_threads_;

  pieces_.clear();
  int64_t shared = 0;
  int32_t num_merges = 0;
  for (int32_t s = 0; s < batch.num_seqs; ++s) {
    const int32_t end = batch.query_start[s + 1];
    for (int32_t token = batch.query_start[s]; token < end; token += step) {
      const int32_t count = std::min(step, end - token);
      const int64_t oldest = int64_t(batch.positions[token]) - shape_.window + 1;
      const int32_t first = int32_t(std::max<int64_t>(0, oldest) / kPartitionTokens);
      const int32_t last = batch.positions[token + count - 1] / kPartitionTokens + 1;
      const int64_t floats =
          int64_t(count) * shape_.heads_per_kv_head() * attention_state_floats(shape_.head_dim);
      for (int32_t head = 0; head < shape_.num_kv_heads; ++head) {
        const bool cut = few && num_threads_ > 1 && last - first > 1 &&
                         shared + (last - first) * floats <= max_shared_;
        if (!cut) {
          pieces_.push_back({s, head, token, count, first, last, -1});
          continue;
        }
        AttentionMerge& merge = merges_[num_merges];  // there are fewer than 4 per thread
        merge.states = shared;
        merge.first_partition = first;
        merge.num_partitions = last - first;
        for (int32_t p = first; p < last; ++p) pieces_.push_back({s, head, token, count, p, p + 1, num_merges});
        shared += (last - first) * floats;
        ++num_merges;
      }
    }
  }
}

}  // namespace tael
