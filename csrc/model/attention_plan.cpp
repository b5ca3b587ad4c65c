#include "model/attention_plan.hpp"

#include <algorithm>

namespace tael {
namespace {

// Rows of one piece that reads all blocks, if its tokens do not end before: enough that a block of K and V is read
// once for many queries, few enough that their states stay in the L2 cache.
constexpr int kRows = 128;

}  // namespace

AttentionPlan::AttentionPlan(const AttentionShape& shape, const Limits& limits, int num_threads)
    : shape_(shape), num_threads_(num_threads) {
  const int64_t partitions = (limits.max_model_len + kPartitionTokens - 1) / kPartitionTokens;
  // Two sequences at full length, or more shorter ones; sequences beyond that are not cut.
  max_shared_ = 2 * partitions * shape.num_heads * attention_state_floats(shape.head_dim);
  const int64_t whole = shape.num_kv_heads * (limits.max_tokens + limits.max_seqs);
  spans_.reserve(limits.max_tokens);
  pieces_.reserve(whole + 2 * partitions * shape.num_kv_heads);
  merges_ = std::vector<AttentionMerge>(4 * num_threads);
}

// Those of a block may choose together.
int64_t AttentionPlan::max_piece_rows() const {
  return std::max(kRows, kBlockTokens * shape_.heads_per_kv_head());
}

int64_t AttentionPlan::bytes() const {
  return int64_t(spans_.capacity() * sizeof(BlockSpan) + pieces_.capacity() * sizeof(AttentionPiece) +
                 merges_.size() * sizeof(AttentionMerge));
}

// A block is cut into equal pieces.
int AttentionPlan::tokens_per_piece() const {
  int tokens = kBlockTokens;
  while (tokens > 1 && tokens * shape_.heads_per_kv_head() > kRows) tokens /= 2;
  return tokens;
}

// Blocks that the queries of a token read; 0 where that is all of them.
int32_t AttentionPlan::budget(const Batch& batch, int32_t token) const {
  if (!batch.kv_budgets || shape_.window != INT32_MAX) return 0;
  while (batch.kv_budgets[token] == kWithPrevious) --token;
  if (batch.kv_budgets[token] == 0) return 0;
  const int32_t budget = budget_of_layer(batch.kv_budgets[token], shape_.budget_percent);
  return batch.positions[token] / kBlockTokens < budget ? 0 : budget;
}

void AttentionPlan::prepare(const Batch& batch) {
  spans_.clear();
  for (int32_t s = 0; s < batch.num_seqs; ++s)
    for (int32_t token = batch.query_start[s]; token < batch.query_start[s + 1];) {
      const int32_t position = batch.positions[token];
      const int32_t count = std::min(kBlockTokens - position % kBlockTokens, batch.query_start[s + 1] - token);
      spans_.push_back({s, token, count, position / kBlockTokens});
      token += count;
    }
  const int step = tokens_per_piece();
  int64_t num_whole = 0;
  for (const BlockSpan& span : spans_) num_whole += (span.num_tokens + step - 1) / step;
  const bool few = num_whole * shape_.num_kv_heads < 4 * num_threads_;

  pieces_.clear();
  int64_t shared = 0;
  int32_t num_merges = 0;
  for (const BlockSpan& span : spans_) {
    AttentionPiece pieces[kBlockTokens];  // of one head
    const int num_pieces = cut_span(batch, span, pieces);
    // Tokens of one head after the other: they read much the same blocks, which L2 then holds.
    for (int32_t head = 0; head < shape_.num_kv_heads; ++head)
      for (int i = 0; i < num_pieces; ++i) {
        AttentionPiece piece = pieces[i];
        piece.kv_head = head;
        const int64_t floats =
            int64_t(piece.num_tokens) * shape_.heads_per_kv_head() * attention_state_floats(shape_.head_dim);
        const int32_t first = piece.first_partition, last = piece.last_partition;
        const bool cut = few && num_threads_ > 1 && last - first > 1 && piece.budget == 0 &&
                         shared + (last - first) * floats <= max_shared_;
        if (!cut) {
          pieces_.push_back(piece);
          continue;
        }
        AttentionMerge& merge = merges_[num_merges];  // there are fewer than 4 per thread
        merge.states = shared;
        merge.first_partition = first;
        merge.num_partitions = last - first;
        piece.merge = num_merges++;
        for (int32_t p = first; p < last; ++p) {
          piece.first_partition = p;
          piece.last_partition = p + 1;
          pieces_.push_back(piece);
        }
        shared += (last - first) * floats;
      }
  }
}

// The pieces of a span, of KV head 0 and not cut into partitions. Tokens that choose what they read are one for each
// choice.
int AttentionPlan::cut_span(const Batch& batch, const BlockSpan& span, AttentionPiece* pieces) const {
  const int32_t step = tokens_per_piece(), end = span.first_token + span.num_tokens;
  int num_pieces = 0;
  for (int32_t token = span.first_token, count; token < end; token += count) {
    const int32_t budget = this->budget(batch, token);
    count = 1;
    const auto belongs = [&](int32_t next) {
      if (budget > 0) return batch.kv_budgets[next] == kWithPrevious;
      return count < step && this->budget(batch, next) == 0;
    };
    while (token + count < end && belongs(token + count)) ++count;
    const int64_t oldest = int64_t(batch.positions[token]) - shape_.window + 1;
    const int32_t first = int32_t(std::max<int64_t>(0, oldest) / kPartitionTokens);
    const int32_t last = batch.positions[token + count - 1] / kPartitionTokens + 1;
    pieces[num_pieces++] = {span.seq, 0, token, count, first, last, -1, budget};
  }
  return num_pieces;
}

}  // namespace tael
