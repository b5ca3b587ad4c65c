#include "model/model.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "kernels/dispatch.hpp"
#include "quant/dequantize.hpp"

namespace tael {

Model::Model(const std::string& isa, int num_threads, const ModelConfig& config)
    : kernels_(kernels_for(isa)), pool_(num_threads), config_(config) {}

int Model::add_rope(std::vector<float> inv_freq, float attention_factor) {
  ropes_.push_back({std::move(inv_freq), attention_factor, {}, {}});
  return int(ropes_.size()) - 1;
}

void Model::set_ends(const Matrix& embedding, const Matrix& lm_head, Vector norm) {
  embedding_ = embedding;
  lm_head_ = lm_head;
  norm_ = std::move(norm);
}

void Model::add_layer(AttentionConfig attention, AttentionWeights weights, DenseLayer ffn, LayerNorms norms) {
  const auto known = std::find(shapes_.begin(), shapes_.end(), attention.shape);
  attention.plan = int(known - shapes_.begin());
  if (known == shapes_.end()) shapes_.push_back(attention.shape);
  if (attention.cache_group >= num_cache_groups()) pool_blocks_.resize(attention.cache_group + 1);
  layers_.push_back({AttentionLayer(attention, std::move(weights)), std::move(ffn), std::move(norms)});
}

Model::Workspace::Workspace(const Limits& limits, int num_threads, const Model& model)
    : hidden(limits.max_tokens, model.config_.hidden_size),
      normed(limits.max_tokens, model.config_.hidden_size),
      update(limits.max_tokens, model.config_.hidden_size),
      last(limits.max_logits * model.terms_per_logit(), model.config_.hidden_size),
      logits(limits.max_logits * model.logits_stride()),
      attention(limits, num_threads, model.plans_),
      dense(limits.max_tokens,
            std::max_element(model.layers_.begin(), model.layers_.end(), [](const Layer& a, const Layer& b) {
              return a.ffn.weights().up.rows < b.ffn.weights().up.rows;
            })->ffn.weights().up.rows),
      token_seq(limits.max_tokens) {}

void Model::allocate(const Limits& limits) {
  limits_ = limits;
  plans_.clear();
  for (const AttentionShape& shape : shapes_) plans_.emplace_back(shape, limits, pool_.num_threads());
  for (RopeTable& rope : ropes_) {
    rope.cos = Buffer<float>(limits.max_tokens * rope.num_pairs());
    rope.sin = Buffer<float>(limits.max_tokens * rope.num_pairs());
  }
  ws_ = std::make_unique<Workspace>(limits, pool_.num_threads(), *this);
}

int64_t Model::workspace_bytes() const {
  int64_t bytes = ws_->hidden.bytes() + ws_->normed.bytes() + ws_->update.bytes() + ws_->last.bytes() +
                  ws_->logits.bytes() + ws_->attention.bytes() + ws_->dense.bytes();
  for (const RopeTable& rope : ropes_) bytes += rope.cos.bytes() + rope.sin.bytes();
  return bytes;
}

void Model::bind_kv(int cache_group, uint8_t* pool, int64_t num_blocks, int64_t block_bytes) {
  pool_blocks_.at(cache_group) = num_blocks;
  for (Layer& layer : layers_)
    if (layer.attention.config().cache_group == cache_group) layer.attention.bind_kv(pool, block_bytes);
}

void Model::check(const Batch& batch) const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::out_of_range(what);
  };
  require(ws_ != nullptr, "model has no workspace");
  require(batch.num_tokens >= 1 && batch.num_tokens <= limits_.max_tokens, "too many tokens in a step");
  require(batch.num_seqs >= 1 && batch.num_seqs <= limits_.max_seqs, "too many sequences in a step");
  require(batch.num_logits <= limits_.max_logits, "too many logits in a step");
  require(int(batch.block_tables.size()) == num_cache_groups(), "wrong number of block tables");
  require(batch.query_start[0] == 0 && batch.query_start[batch.num_seqs] == batch.num_tokens,
          "query_start does not cover the tokens");
  for (int64_t i = 0; i < batch.num_logits; ++i)
    require(batch.logits_indices[i] >= 0 && batch.logits_indices[i] < batch.num_tokens, "logits index");
  for (int64_t t = 0; t < batch.num_tokens; ++t)
    require(batch.token_ids[t] >= 0 && batch.token_ids[t] < config_.vocab_size, "token id beyond vocabulary");
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int32_t first = batch.query_start[s], last = batch.query_start[s + 1];
    require(first < last && last <= batch.num_tokens, "query_start does not ascend to the tokens");
    const int32_t position = batch.positions[first];
    const int64_t end = int64_t(position) + last - first;
    require(position >= 0 && end <= limits_.max_model_len, "position beyond max_model_len");
    for (int32_t t = first; t < last; ++t)
      require(batch.positions[t] == position + t - first, "positions are not consecutive");
    for (size_t group = 0; group < batch.block_tables.size(); ++group)
      require((end - 1) / kBlockTokens < batch.block_tables[group].stride, "block table too short");
    for (const AttentionShape& shape : shapes_) {
      for (const Layer& layer : layers_) {
        const AttentionConfig& config = layer.attention.config();
        if (!(config.shape == shape)) continue;
        const int32_t* table = batch.block_tables[config.cache_group].row(s);
        const int64_t oldest = std::max<int64_t>(0, int64_t(position) - shape.window + 1);
        for (int64_t b = oldest / kBlockTokens; b <= (end - 1) / kBlockTokens; ++b)
          require(table[b] >= 0 && table[b] < pool_blocks_[config.cache_group], "block outside the pool");
        break;  // layers of one shape share a table
      }
    }
  }
}

const float* Model::forward(Batch batch) {
  check(batch);
  for (int64_t s = 0; s < batch.num_seqs; ++s)
    for (int32_t t = batch.query_start[s]; t < batch.query_start[s + 1]; ++t) ws_->token_seq[t] = int32_t(s);
  batch.token_seq = ws_->token_seq.data();
  for (AttentionPlan& plan : plans_) plan.prepare(batch);
  pool_.run([&](int thread) { step({batch, kernels_, pool_, thread}); });
  return ws_->logits.data();
}

// Every thread runs this; the stages inside share the work.
void Model::step(const Step& s) {
  embed(s);
  const int64_t stride = ws_->update.columns();
  float* update = ws_->update.row(0);
  const Vector none;
  const Vector* post = &none;  // of the previous layer
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const AttentionConfig& attention = layer.attention.config();
    add_and_norm(s, *post, layer.norms.mixer);
    layer.attention.forward(s, ws_->normed, ropes_[attention.rope], plans_[attention.plan], ws_->attention,
                            update, stride);
    if (layer.attention.weights().o_bias)
      s.pool.parallel_for(s.batch.num_tokens, 1, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          kernels_.add(update + t * stride, layer.attention.weights().o_bias.data(), stride);
      });
    add_and_norm(s, layer.norms.mixer_post, layer.norms.ffn);
    layer.ffn.forward(s, ws_->normed, ws_->dense, update, stride);
    post = &layer.norms.ffn_post;
  }
  add_and_norm(s, *post, norm_);
  if (s.batch.num_logits > 0) project_logits(s);
}

// Token embeddings into `update`: the first add_and_norm puts them into the residual stream.
void Model::embed(const Step& s) {
  s.pool.parallel_for(s.batch.num_tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int32_t id = s.batch.token_ids[t];
      float* row = ws_->update.row(t);
      dequantize_row(embedding_.format, embedding_.tile(id / kTileRows), id % kTileRows, config_.hidden_size, row);
      for (int64_t c = 0; c < config_.hidden_size; ++c) row[c] *= config_.embedding_scale;
      memset(ws_->hidden.row(t), 0, ws_->hidden.columns() * sizeof(float));
      for (RopeTable& rope : ropes_)
        for (int i = 0; i < rope.num_pairs(); ++i) {
          const float angle = float(s.batch.positions[t]) * rope.inv_freq[i];
          rope.cos.data()[t * rope.num_pairs() + i] = cosf(angle) * rope.attention_factor;
          rope.sin.data()[t * rope.num_pairs() + i] = sinf(angle) * rope.attention_factor;
        }
    }
  });
}

// hidden += post_norm(update); normed = norm(hidden), also in int8.
void Model::add_and_norm(const Step& s, const Vector& post_norm, const Vector& norm) {
  const int64_t columns = config_.hidden_size;
  s.pool.parallel_for(s.batch.num_tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float *update = ws_->update.row(t), *hidden = ws_->hidden.row(t);
      if (post_norm) kernels_.rms_norm(update, post_norm.data(), columns, config_.norm_eps, update);
      kernels_.add(hidden, update, ws_->hidden.columns());
      kernels_.rms_norm(hidden, norm.data(), columns, config_.norm_eps, ws_->normed.row(t));
      ws_->normed.quantize(kernels_, t);
    }
  });
}

// The last rows go through the head in two int8 terms, the second being what the first left over:
// rounding there costs a quarter of the whole model's divergence (benchmarks/kld.py), and a
// second row per sequence costs little where the head's bytes are the limit.
void Model::project_logits(const Step& s) {
  const int64_t num_logits = s.batch.num_logits, terms = terms_per_logit();
  s.pool.parallel_for(num_logits, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* x = ws_->normed.row(s.batch.logits_indices[i]);
      memcpy(ws_->last.row(i * terms), x, ws_->last.columns() * sizeof(float));
      if (terms == 1) continue;
      ws_->last.quantize(kernels_, i * terms);
      ws_->last.subtract_quantized(i * terms, ws_->last.row(i * terms + 1));
      ws_->last.quantize(kernels_, i * terms + 1);
    }
  });
  const int64_t stride = lm_head_.padded_rows();
  linear(s.pool, kernels_, ws_->last, num_logits * terms, {{&lm_head_, ws_->logits.data(), stride}});
  if (terms == 2)
    s.pool.parallel_for(num_logits, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* logits = ws_->logits.data() + i * logits_stride();
        kernels_.add(logits, logits + stride, stride);
      }
    });
}

}  // namespace tael
