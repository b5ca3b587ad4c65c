// The attention mixer: projections, QK-norm, rotary embedding, KV append, attention.
#pragma once

#include "kernels/key_summary/key_summary.hpp"
#include "model/attention_plan.hpp"
#include "model/block_selection.hpp"
#include "model/superblocks.hpp"
#include "tiers/tiered_pool.hpp"

namespace tael {

struct AttentionConfig {
  AttentionShape shape;
  float scale;
  float norm_eps;
  int rope;              // index of the rotary table
  int plan;              // index of the plan of this shape
  int cache_group;
  KVFormat kv_format;    // of complete blocks
  bool key_summaries;    // complete blocks have them
  int64_t layer_offset;  // bytes, of this layer in a block of the group
  int64_t open_layer_offset;  // and in a block that is being filled, if those have a pool of their own
  int first_head;             // of this layer among the KV heads of a block of the group
};

struct AttentionWeights {
  Matrix q, k, v, o;
  Vector q_bias, k_bias, v_bias, o_bias, q_norm, k_norm;
};

// Buffers that the attention layers use in turn.
struct AttentionWorkspace {
  // `unpacks`: blocks of some layer are compressed; `selects`: and have summaries.
  AttentionWorkspace(const Limits& limits, int num_threads, const std::vector<AttentionPlan>& plans, bool unpacks,
                     bool selects);
  int64_t bytes() const;

  // Queries as the kernels take them, and the blocks that they choose.
  struct Queries {
    Buffer<uint16_t> q;
    BlockSelection selection;
  };
  // What a thread needs for one piece.
  struct Scratch {
    Buffer<float> states;     // two sets
    Buffer<float> head;       // of a query, a key or a value
    Buffer<uint16_t> unpacked;  // a chunk of KV blocks
    Buffer<int32_t> slots;      // of a tiered pool, by entry of a block table
    Queries own, next;          // next: see Forecast
    int64_t state_floats;     // of one set
  };
  Rows q, k, v, out;
  Rows next_q;  // of few tokens: see Forecast
  std::vector<Scratch> scratch;  // per thread
  Buffer<float> shared_states;
};

class AttentionLayer;

// What a layer can know of the next: the queries that its input would have there, since the residual stream
// changes little from layer to layer (InfiniGen, arXiv:2406.19707).
struct Forecast {
  const AttentionLayer* layer;
  LinearInput x;
  const RopeTable* rope;
};

class AttentionLayer {
 public:
  AttentionLayer(const AttentionConfig& config, AttentionWeights weights)
      : config_(config), weights_(std::move(weights)) {}

  const AttentionConfig& config() const { return config_; }
  const AttentionWeights& weights() const { return weights_; }
  // `open` is the pool of blocks that are being filled; without one (data null), these are blocks
  // of `complete` too. `summaries` are those of the layer's blocks, `superblocks` those of the group.
  void bind_kv(const KVPool& complete, const KVPool& open, const KVPool& summaries, const Superblocks* superblocks) {
    complete_ = complete;
    open_ = open;
    summaries_ = summaries;
    superblocks_ = superblocks;
    tiered_ = nullptr;
  }
  // Complete blocks in a tiered pool: `complete` are its slots.
  void bind_kv(TieredPool* tiered, const KVPool& open, const KVPool& summaries, const Superblocks* superblocks) {
    bind_kv({tiered->data(), tiered->slot_bytes(), 0, head_bytes()}, open, summaries, superblocks);
    tiered_ = tiered;
  }
  int64_t head_bytes() const { return kv_head_bytes(config_.kv_format, config_.shape.head_dim); }

  // ws.out = attention(x), before the output projection. Called by every thread. Meanwhile the blocks that the
  // next layer is likely to read are brought into memory, if there is a forecast (null if not).
  void attend(const Step& step, const LinearInput& x, const RopeTable& rope, AttentionPlan& plan,
              AttentionWorkspace& ws, const Forecast* next) const;
  // Whether a step reads some of its blocks in memory, which others of the step before may have left on disk.
  bool takes_forecasts(const Step& step) const {
    return tiered_ && config_.key_summaries && step.batch.kv_budgets && step.replicated() && step.batch.is_decode();
  }

 private:
  void run_piece(const Step& step, const RopeTable& rope, AttentionPlan& plan, AttentionWorkspace& ws,
                 const AttentionPiece& piece, const Forecast* next) const;
  void finish(const AttentionPiece& piece, const AttentionTask& task, const Step& step, const AttentionWorkspace& ws,
              const float* states) const;
  void prefetch(const Step& step, const RopeTable& rope, AttentionWorkspace& ws, int32_t seq, int32_t kv_head) const;
  AttentionTask task_of(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws, const Rows& q,
                        const AttentionPiece& piece, AttentionWorkspace::Queries& queries) const;
  void append(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws, int64_t token, int kv_head) const;
  AttentionTask select(const Step& step, const AttentionTask& task, int32_t seq, int budget,
                       BlockSelection& selection) const;
  int find_candidates(const Step& step, const AttentionTask& task, int32_t seq, int budget, int first, int last,
                      BlockSelection& selection) const;
  // Of a complete block, or of the slot that its head is in.
  uint8_t* complete_head(int32_t place, int kv_head) const { return complete_.head(place, tiered_ ? 0 : kv_head); }
  void complete_block(const Step& step, int32_t seq, int32_t block, int kv_head) const;
  uint16_t* open_keys(const Batch& batch, int32_t seq, int32_t block, int kv_head) const;

  AttentionConfig config_;
  AttentionWeights weights_;
  KVPool complete_{}, open_{}, summaries_{};
  const Superblocks* superblocks_ = nullptr;
  TieredPool* tiered_ = nullptr;
};

}  // namespace tael
