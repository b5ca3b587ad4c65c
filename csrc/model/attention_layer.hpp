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

  Activations q, k, v, out;
  int64_t thread_floats;        // one state set of a thread
  Buffer<float> thread_states;  // [num_threads, 2, thread_floats]
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

  // out[token] = attention(x[token]), [num_tokens, out_stride]. Called by every thread.
  void forward(const Step& step, const Activations& x, const RopeTable& rope, const AttentionPlan& plan,
               const AttentionWorkspace& ws, float* out, int64_t out_stride) const;

 private:
  void append(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws, int64_t token) const;
  AttentionTask task(const Step& step, const AttentionWorkspace& ws, const AttentionPiece& piece) const;

  AttentionConfig config_;
  AttentionWeights weights_;
  KVLayout kv_{};
};

}  // namespace tael
