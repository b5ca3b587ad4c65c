// The attention mixer: projections, QK-norm, rotary embedding, KV append, attention.
#pragma once

#include "model/attention_plan.hpp"

namespace tael {

struct AttentionConfig {
  AttentionShape shape;
  float scale;
  float norm_eps;
  int rope;              // index of the rotary table
  int plan;              // index of the plan of this shape
  int cache_group;
  int64_t layer_offset;  // bytes, of this layer in a block of the group
};

struct AttentionWeights {
  Matrix q, k, v, o;
  Vector q_bias, k_bias, v_bias, o_bias, q_norm, k_norm;
};

// Buffers that the attention layers use in turn.
struct AttentionWorkspace {
  AttentionWorkspace(const Limits& limits, int num_threads, const std::vector<AttentionPlan>& plans);
  int64_t bytes() const;

  // What a thread needs for one piece.
  struct Scratch {
    Buffer<float> states;     // two sets
    Buffer<float> head;       // of a query, a key or a value
    Buffer<uint16_t> q;
    int64_t state_floats;     // of one set
  };
  Rows q, k, v, out;
  std::vector<Scratch> scratch;  // per thread
  Buffer<float> shared_states;
};

class AttentionLayer {
 public:
  AttentionLayer(const AttentionConfig& config, AttentionWeights weights)
      : config_(config), weights_(std::move(weights)) {}

  const AttentionConfig& config() const { return config_; }
  const AttentionWeights& weights() const { return weights_; }
  void bind_kv(uint8_t* pool, int64_t block_bytes) {
    kv_ = {pool, block_bytes, config_.layer_offset, config_.shape.num_kv_heads, config_.shape.head_dim};
  }

  // ws.out = attention(x), before the output projection. Called by every thread.
  void attend(const Step& step, const LinearInput& x, const RopeTable& rope, AttentionPlan& plan,
              const AttentionWorkspace& ws) const;

 private:
  void run_piece(const Step& step, const RopeTable& rope, AttentionPlan& plan, const AttentionWorkspace& ws,
                 const AttentionPiece& piece) const;
  void finish(const AttentionPiece& piece, const AttentionTask& task, const Step& step, const AttentionWorkspace& ws,
              const float* states) const;
  void prepare_queries(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws,
                       const AttentionPiece& piece) const;
  void append(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws, int64_t token, int kv_head) const;

  AttentionConfig config_;
  AttentionWeights weights_;
  KVLayout kv_{};
};

}  // namespace tael
