// What the layers of a model share during one step.
#pragma once

#include <vector>

#include "model/linear.hpp"

namespace tael {

// Largest step that a model will be asked for; all memory is allocated for it at load.
struct Limits {
  int64_t max_tokens;
  int64_t max_seqs;
  int64_t max_logits;
  int64_t max_model_len;
  int64_t num_candidates;
};

// The arrays of ForwardBatch (tael/backends/base.py), and the sequence of each token.
struct Batch {
  struct BlockTable {
    const int32_t* data;
    int64_t stride;
    const int32_t* row(int64_t seq) const { return data + seq * stride; }
  };
  int64_t num_tokens;
  int64_t num_seqs;
  int64_t num_logits;
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* query_start;
  const int32_t* logits_indices;
  const float* temperatures;
  const bool* full_logits;
  const int32_t* token_seq;
  // Per token, blocks that its queries read; 0: all; kWithPrevious: those of the token before it in its block, which
  // the queries of both choose. Null: all of all.
  const int32_t* kv_budgets;
  std::vector<BlockTable> block_tables;  // one per cache group
  std::vector<BlockTable> open_tables;   // likewise, if some group fills blocks in a pool of their own
  std::vector<std::vector<int32_t>> restored_blocks;  // per cache group

  // One token per sequence: none reads what another of this step appends to the KV cache.
  bool is_decode() const { return num_tokens == num_seqs; }
};

constexpr int32_t kWithPrevious = -1;

constexpr int64_t kReplicatedTokens = 4;

struct Step {
  const Batch& batch;
  const Kernels& kernels;
  ThreadPool& pool;
  int thread;

  // Whether every thread does all work on single tokens by itself, in buffers of its own: for a few
  // tokens that takes less time than to meet at a barrier.
  bool replicated() const { return batch.num_tokens <= kReplicatedTokens; }

  // Calls fn(token) for all tokens, shared among the threads unless replicated.
  template <class Fn> void for_tokens(int64_t num_tokens, Fn&& fn) const {
    if (replicated())
      for (int64_t t = 0; t < num_tokens; ++t) fn(t);
    else
      pool.parallel_for(thread, num_tokens, fn);
  }
};

// A vector parameter, padded with zeros to whole groups; empty where the model has none.
struct Vector {
  std::vector<float> values;
  explicit operator bool() const { return !values.empty(); }
  const float* data() const { return values.data(); }
};

struct RopeTable {
  std::vector<float> inv_freq;
  float attention_factor;
  Buffer<float> cos, sin;  // [max_tokens, num_pairs], of this step
  int num_pairs() const { return int(inv_freq.size()); }
  float* cos_of(int64_t token) const { return cos.data() + token * num_pairs(); }
  float* sin_of(int64_t token) const { return sin.data() + token * num_pairs(); }
};

}  // namespace tael
