// A decoder-only transformer: one forward() a step, on all threads from embedding to logits.
#pragma once

#include <memory>
#include <string>

#include "model/attention_layer.hpp"
#include "model/dense_layer.hpp"
#include "model/lm_head.hpp"

namespace tael {

struct ModelConfig {
  int64_t hidden_size;
  int64_t vocab_size;
  float norm_eps;
  float embedding_scale;
};

// The blocks of one cache group.
struct BlockPool {
  uint8_t* data = nullptr;
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
};

struct LayerNorms {
  Vector mixer, mixer_post, ffn, ffn_post;
};

class Model {
 public:
  Model(const std::string& isa, int num_threads, const ModelConfig& config);

  // Called in this order before the first forward().
  int add_rope(std::vector<float> inv_freq, float attention_factor);
  void set_ends(const Matrix& embedding, const Matrix& lm_head, Vector norm);
  void add_layer(AttentionConfig attention, AttentionWeights weights, DenseLayer ffn, LayerNorms norms);
  void allocate(const Limits& limits);
  // `open` has no blocks (num_blocks 0) where those that are being filled lie in the first pool. `summaries` are
  // the key summaries of all blocks for every layer and KV head in turn, if the layers have some.
  // Throws std::invalid_argument for blocks too small for the layers.
  void bind_kv(int cache_group, const BlockPool& blocks, const BlockPool& open, const BlockPool& summaries);
  // Likewise for complete blocks in a tiered pool, which must stay where it is.
  void bind_kv(int cache_group, TieredPool* tiered, const BlockPool& open, const BlockPool& summaries);

  // What is known of the logits of batch.logits_indices, valid until the next call.
  // Throws std::out_of_range for a batch beyond the limits, the vocabulary or the block pools. Sequences
  // with blocks that a tiered pool has lost meanwhile (take_lost) get anything.
  const HeadOutput& forward(Batch batch);
  Candidate draw(int64_t row, double uniform) const { return lm_head_.draw(kernels_, row, uniform); }

  const LMHead& lm_head() const { return lm_head_; }
  const ModelConfig& config() const { return config_; }
  int num_cache_groups() const { return int(pools_.size()); }
  int64_t workspace_bytes() const;
  int64_t superblock_bytes() const;

 private:
  struct Layer {
    AttentionLayer attention;
    DenseLayer ffn;
    LayerNorms norms;
  };
  // The residual stream and what linear layers read of it: one for all threads, and a small one
  // for each, of the steps in which they do the same work (Step::replicated).
  struct Stream {
    Stream(int64_t max_tokens, bool has_forecasts, const Model& model);
    int64_t bytes() const;
    Rows hidden, normed;
    QuantizedBuffer quantized;
    Rows next_normed;  // of a Forecast
    QuantizedBuffer next_quantized;
  };
  // Buffers of one step.
  struct Workspace {
    Workspace(const Limits& limits, int num_threads, const Model& model);
    Rows update;  // what a layer adds to the residual stream
    AttentionWorkspace attention;
    DenseWorkspace dense;
    Stream shared;
    std::vector<Stream> replicas;  // per thread
    std::vector<int32_t> token_seq;
  };

  DenseWorkspace dense_workspace(const Limits& limits) const;
  const Superblocks* make_superblocks(int cache_group, int64_t num_blocks);
  void check(const Batch& batch) const;
  void step(const Step& step);
  const Stream& stream(const Step& step) const;
  LinearInput input(const Step& step, const FloatRows& floats) const;
  Forecast forecast(const Step& step, const Layer& next) const;
  void embed(const Step& step);
  void norm_token(const Step& step, const Vector& norm, int64_t token);
  void add_and_norm(const Step& step, const Vector& bias, const Vector& post_norm, const Vector& norm);

  const Kernels& kernels_;
  ThreadPool pool_;
  ModelConfig config_;
  Limits limits_{};
  Matrix embedding_{};
  LMHead lm_head_;
  Vector norm_;
  std::vector<RopeTable> ropes_;
  std::vector<AttentionPlan> plans_;
  std::vector<AttentionShape> shapes_;
  std::vector<Layer> layers_;
  std::vector<BlockPool> pools_, open_pools_;  // per cache group
  std::vector<Superblocks> superblocks_;       // likewise
  bool unpacks_ = false;  // blocks of some layer are compressed
  bool selects_ = false;  // or have summaries
  std::unique_ptr<Workspace> ws_;
};

}  // namespace tael
