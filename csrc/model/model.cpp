#include "model/model.hpp"

#include <algorithm>
#include <cmath>
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
  lm_head_ = LMHead(lm_head);
  norm_ = std::move(norm);
}

void Model::add_layer(AttentionConfig attention, AttentionWeights weights, DenseLayer ffn, LayerNorms norms) {
  const auto known = std::find(shapes_.begin(), shapes_.end(), attention.shape);
  attention.plan = int(known - shapes_.begin());
  if (known == shapes_.end()) shapes_.push_back(attention.shape);
  if (attention.cache_group >= num_cache_groups()) {
    pools_.resize(attention.cache_group + 1);
    open_pools_.resize(attention.cache_group + 1);
    superblocks_.resize(attention.cache_group + 1);
  }
  unpacks_ |= attention.kv_format != KVFormat::BF16;
  selects_ |= attention.key_summaries;
  layers_.push_back({AttentionLayer(attention, std::move(weights)), std::move(ffn), std::move(norms)});
}

Model::Stream::Stream(int64_t max_tokens, bool has_forecasts, const Model& model)
    : hidden(max_tokens, model.config_.hidden_size), normed(max_tokens, model.config_.hidden_size) {
  int64_t columns = model.config_.hidden_size;  // attention's output passes through here as well
  for (const AttentionShape& shape : model.shapes_)
    columns = std::max(columns, int64_t(shape.num_heads) * shape.head_dim);
  quantized = QuantizedBuffer(max_tokens, columns);
  if (!has_forecasts) return;
  next_normed = Rows(max_tokens, model.config_.hidden_size);
  next_quantized = QuantizedBuffer(max_tokens, model.config_.hidden_size);
}

int64_t Model::Stream::bytes() const {
  return hidden.bytes() + normed.bytes() + quantized.bytes() + next_normed.bytes() + next_quantized.bytes();
}

Model::Workspace::Workspace(const Limits& limits, int num_threads, const Model& model)
    : update(limits.max_tokens, model.config_.hidden_size),
      attention(limits, num_threads, model.plans_, model.unpacks_, model.selects_),
      dense(model.dense_workspace(limits)),
      shared(limits.max_tokens, false, model),
      token_seq(limits.max_tokens) {
  for (int t = 0; t < num_threads; ++t) replicas.emplace_back(kReplicatedTokens, model.selects_, model);
}

DenseWorkspace Model::dense_workspace(const Limits& limits) const {
  int64_t columns = 0;
  bool floats = false;
  for (const Layer& layer : layers_) {
    columns = std::max(columns, layer.ffn.weights().up.rows);
    floats |= is_float(layer.ffn.weights().down.format);
  }
  return {limits.max_tokens, columns, floats};
}

void Model::allocate(const Limits& limits) {
  limits_ = limits;
  plans_.clear();
  for (const AttentionShape& shape : shapes_) plans_.emplace_back(shape, limits, pool_.num_threads());
  for (RopeTable& rope : ropes_) {
    rope.cos = Buffer<float>(limits.max_tokens * rope.num_pairs());
    rope.sin = Buffer<float>(limits.max_tokens * rope.num_pairs());
  }
  ws_ = std::make_unique<Workspace>(limits, pool_.num_threads(), *this);
  lm_head_.allocate(limits, pool_.num_threads());
}

int64_t Model::workspace_bytes() const {
  int64_t bytes = ws_->update.bytes() + ws_->attention.bytes() + ws_->dense.bytes() + ws_->shared.bytes() +
                  lm_head_.bytes();
  for (const Stream& replica : ws_->replicas) bytes += replica.bytes();
  for (const AttentionPlan& plan : plans_) bytes += plan.bytes();
  for (const RopeTable& rope : ropes_) bytes += rope.cos.bytes() + rope.sin.bytes();
  return bytes;
}

int64_t Model::superblock_bytes() const {
  int64_t bytes = 0;
  for (const Superblocks& superblocks : superblocks_) bytes += superblocks.bytes();
  return bytes;
}

namespace {

// One layer's part of a pool, which holds `bytes` from `offset` on.
KVPool part(const BlockPool& pool, int64_t offset, int64_t bytes, int64_t head_bytes) {
  if (pool.num_blocks > 0 && offset + bytes > pool.block_bytes) throw std::invalid_argument("KV blocks are too small");
  return {pool.num_blocks > 0 ? pool.data : nullptr, pool.block_bytes, offset, head_bytes};
}

KVPool open_part(const BlockPool& open, const AttentionConfig& config) {
  const int64_t head_bytes = bf16_head_bytes(config.shape.head_dim);
  return part(open, config.open_layer_offset, config.shape.num_kv_heads * head_bytes, head_bytes);
}

// One layer's key summaries: of a pool with a row for every head, which holds those of num_blocks.
KVPool summaries_part(const BlockPool& heads, int64_t num_blocks, const AttentionConfig& config) {
  if (!config.key_summaries || num_blocks == 0) return {};
  const int64_t bytes = heads.block_bytes / num_blocks;
  if (config.first_head + config.shape.num_kv_heads > heads.num_blocks || summary_bytes(config.shape.head_dim) > bytes)
    throw std::invalid_argument("there is no room for the key summaries");
  return {heads.data, bytes, config.first_head * heads.block_bytes, heads.block_bytes};
}

}  // namespace

// For the layers of a group that have summaries.
const Superblocks* Model::make_superblocks(int cache_group, int64_t num_blocks) {
  if (!ws_) throw std::logic_error("allocate() comes before bind_kv()");
  int num_heads = 0;
  int64_t bytes = 0;
  bool selects = false;
  for (const Layer& layer : layers_) {
    const AttentionConfig& config = layer.attention.config();
    if (config.cache_group != cache_group) continue;
    selects |= config.key_summaries;
    num_heads = std::max(num_heads, config.first_head + config.shape.num_kv_heads);
    bytes = std::max(bytes, bounds_bytes(config.shape.head_dim));
  }
  superblocks_.at(cache_group) = Superblocks(selects ? num_blocks : 0, limits_, num_heads, bytes);
  return &superblocks_[cache_group];
}

void Model::bind_kv(int cache_group, const BlockPool& blocks, const BlockPool& open, const BlockPool& summaries) {
  const Superblocks* superblocks = make_superblocks(cache_group, blocks.num_blocks);
  for (Layer& layer : layers_) {
    const AttentionConfig& config = layer.attention.config();
    if (config.cache_group != cache_group) continue;
    if (config.kv_format != KVFormat::BF16 && open.num_blocks == 0)
      throw std::invalid_argument("blocks that are being filled need a pool");
    const int64_t head_bytes = layer.attention.head_bytes();
    layer.attention.bind_kv(
        part(blocks, config.layer_offset, config.shape.num_kv_heads * head_bytes, head_bytes), open_part(open, config),
        summaries_part(summaries, blocks.num_blocks, config), superblocks);
  }
  pools_.at(cache_group) = blocks;
  open_pools_.at(cache_group) = open;
}

void Model::bind_kv(int cache_group, TieredPool* tiered, const BlockPool& open, const BlockPool& summaries) {
  if (open.num_blocks == 0) throw std::invalid_argument("blocks that are being filled need a pool");
  const Superblocks* superblocks = make_superblocks(cache_group, tiered->num_blocks());
  for (Layer& layer : layers_) {
    const AttentionConfig& config = layer.attention.config();
    if (config.cache_group != cache_group) continue;
    if (layer.attention.head_bytes() > tiered->slot_bytes() ||
        config.first_head + config.shape.num_kv_heads > tiered->heads_per_block())
      throw std::invalid_argument("the tiered pool is too small");
    layer.attention.bind_kv(tiered, open_part(open, config), summaries_part(summaries, tiered->num_blocks(), config),
                            superblocks);
  }
  pools_.at(cache_group) = {tiered->data(), tiered->num_blocks(), 0};
  open_pools_.at(cache_group) = open;
}

void Model::check(const Batch& batch) const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::out_of_range(what);
  };
  require(ws_ != nullptr, "model has no workspace");
  require(batch.num_tokens >= 1 && batch.num_tokens <= limits_.max_tokens, "too many tokens in a step");
  require(batch.num_seqs >= 1 && batch.num_seqs <= limits_.max_seqs, "too many sequences in a step");
  require(batch.num_logits <= std::min(limits_.max_logits, batch.num_tokens), "too many logits in a step");
  require(int(batch.block_tables.size()) == num_cache_groups(), "wrong number of block tables");
  require(int(batch.restored_blocks.size()) == num_cache_groups(), "wrong number of lists of restored blocks");
  for (size_t group = 0; group < pools_.size(); ++group)
    for (const int32_t block : batch.restored_blocks[group])
      require(block >= 0 && block < pools_[group].num_blocks, "restored block outside the pool");
  require(batch.query_start[0] == 0 && batch.query_start[batch.num_seqs] == batch.num_tokens,
          "query_start does not cover the tokens");
  for (int64_t i = 0; i < batch.num_logits; ++i) {
    require(batch.logits_indices[i] >= 0 && batch.logits_indices[i] < batch.num_tokens, "logits index");
    require(batch.temperatures[i] > 0.0f, "temperature is not above 0");
  }
  for (int64_t t = 0; t < batch.num_tokens; ++t)
    require(batch.token_ids[t] >= 0 && batch.token_ids[t] < config_.vocab_size, "token id beyond vocabulary");
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int32_t first = batch.query_start[s], last = batch.query_start[s + 1];
    require(first < last && last <= batch.num_tokens, "query_start does not ascend to the tokens");
    const int32_t position = batch.positions[first];
    const int64_t end = int64_t(position) + last - first;
    require(position >= 0 && end <= limits_.max_model_len, "position beyond max_model_len");
    for (int32_t t = first; t < last; ++t) {
      require(batch.positions[t] == position + t - first, "positions are not consecutive");
      const int32_t budget = batch.kv_budgets ? batch.kv_budgets[t] : 0;
      if (budget == kWithPrevious)
        require(t > first && batch.positions[t] % kBlockTokens > 0, "no token before this one in its block");
      else
        require(budget == 0 || (selects_ && budget >= kMinBudgetBlocks), "KV budget too small");
    }
    for (size_t group = 0; group < batch.block_tables.size(); ++group) {
      require((end - 1) / kBlockTokens < batch.block_tables[group].stride, "block table too short");
      if (open_pools_[group].num_blocks == 0) continue;
      require(group < batch.open_tables.size(), "no table of open blocks");
      const int64_t num_open = (end - 1) / kBlockTokens - position / kBlockTokens + 1;
      require(num_open <= batch.open_tables[group].stride, "table of open blocks too short");
      for (int64_t b = 0; b < num_open; ++b) {
        const int32_t block = batch.open_tables[group].row(s)[b];
        require(block >= 0 && block < open_pools_[group].num_blocks, "open block outside the pool");
      }
    }
    for (const AttentionShape& shape : shapes_) {
      for (const Layer& layer : layers_) {
        const AttentionConfig& config = layer.attention.config();
        if (!(config.shape == shape)) continue;
        const int32_t* table = batch.block_tables[config.cache_group].row(s);
        const int64_t oldest = std::max<int64_t>(0, int64_t(position) - shape.window + 1);
        for (int64_t b = oldest / kBlockTokens; b <= (end - 1) / kBlockTokens; ++b)
          require(table[b] >= 0 && table[b] < pools_[config.cache_group].num_blocks, "block outside the pool");
        break;  // layers of one shape share a table
      }
    }
  }
}

const HeadOutput& Model::forward(Batch batch) {
  check(batch);
  for (int64_t s = 0; s < batch.num_seqs; ++s)
    for (int32_t t = batch.query_start[s]; t < batch.query_start[s + 1]; ++t) ws_->token_seq[t] = int32_t(s);
  batch.token_seq = ws_->token_seq.data();
  for (AttentionPlan& plan : plans_) plan.prepare(batch);
  for (size_t group = 0; group < superblocks_.size(); ++group)
    superblocks_[group].prepare(batch, batch.block_tables[group], batch.restored_blocks[group]);
  pool_.run([&](int thread) { step({batch, kernels_, pool_, thread}); });
  return lm_head_.output();
}

// Every thread runs this; the stages inside share the work. A decode step meets at five barriers a
// layer: after q k v, attention, o, gate and up, down.
void Model::step(const Step& s) {
  embed(s);
  const int64_t num_tokens = s.batch.num_tokens, stride = ws_->update.columns();
  float* update = ws_->update.row(0);
  const Vector none;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const AttentionLayer& attention = layer.attention;
    const AttentionConfig& config = attention.config();
    Forecast next{};
    const bool has_next = i + 1 < layers_.size() && layers_[i + 1].attention.takes_forecasts(s);
    if (has_next) next = forecast(s, layers_[i + 1]);
    attention.attend(s, input(s, stream(s).normed.floats(num_tokens)), ropes_[config.rope], plans_[config.plan],
                     ws_->attention, has_next ? &next : nullptr);
    const LinearInput attended = input(s, ws_->attention.out.floats(num_tokens));
    if (!is_float(attention.weights().o.format))
      s.for_tokens(num_tokens, [&](int64_t t) {
        kernels_.quantize(attended.floats.row(t), 0, attended.quantized.num_groups, attended.quantized, t);
      });
    linear(s.pool, s.thread, kernels_, attended, {{&attention.weights().o, update, stride}});
    add_and_norm(s, attention.weights().o_bias, layer.norms.mixer_post, layer.norms.ffn);
    layer.ffn.forward(s, input(s, stream(s).normed.floats(num_tokens)), ws_->dense, update, stride);
    add_and_norm(s, none, layer.norms.ffn_post, i + 1 < layers_.size() ? layers_[i + 1].norms.mixer : norm_);
  }
  if (s.batch.num_logits > 0) lm_head_.forward(s, stream(s).normed);
}

const Model::Stream& Model::stream(const Step& s) const {
  return s.replicated() ? ws_->replicas[s.thread] : ws_->shared;
}

LinearInput Model::input(const Step& s, const FloatRows& floats) const {
  return {floats, stream(s).quantized.rows(s.kernels, s.batch.num_tokens, floats.columns)};
}

// As if this layer left the residual stream as it is. By every thread for itself.
Forecast Model::forecast(const Step& s, const Layer& next) const {
  const Stream& stream = this->stream(s);
  const int64_t num_tokens = s.batch.num_tokens;
  const LinearInput x = {stream.next_normed.floats(num_tokens),
                         stream.next_quantized.rows(s.kernels, num_tokens, stream.next_normed.columns())};
  for (int64_t t = 0; t < num_tokens; ++t) {
    float* row = stream.next_normed.row(t);
    kernels_.rms_norm(stream.hidden.row(t), next.norms.mixer.data(), config_.hidden_size, config_.norm_eps, row);
    kernels_.quantize(row, 0, x.quantized.num_groups, x.quantized, t);
  }
  return {&next.attention, x, &ropes_[next.attention.config().rope]};
}

// Token embeddings into the residual stream, and their first norm.
void Model::embed(const Step& s) {
  const Stream& stream = this->stream(s);
  s.for_tokens(s.batch.num_tokens, [&](int64_t t) {
    const int32_t id = s.batch.token_ids[t];
    float* hidden = stream.hidden.row(t);
    dequantize_row(embedding_.format, embedding_.tile(id / kTileRows), id % kTileRows, config_.hidden_size, hidden);
    for (int64_t c = 0; c < config_.hidden_size; ++c) hidden[c] *= config_.embedding_scale;
    norm_token(s, layers_[0].norms.mixer, t);
    if (s.replicated() && s.thread != 0) return;  // tables are for all, and first read after a barrier
    for (RopeTable& rope : ropes_)
      for (int i = 0; i < rope.num_pairs(); ++i) {
        const float angle = float(s.batch.positions[t]) * rope.inv_freq[i];
        rope.cos_of(t)[i] = cosf(angle) * rope.attention_factor;
        rope.sin_of(t)[i] = sinf(angle) * rope.attention_factor;
      }
  });
}

void Model::norm_token(const Step& s, const Vector& norm, int64_t token) {
  const Stream& stream = this->stream(s);
  kernels_.rms_norm(stream.hidden.row(token), norm.data(), config_.hidden_size, config_.norm_eps,
                    stream.normed.row(token));
  const LinearInput out = input(s, stream.normed.floats(s.batch.num_tokens));
  kernels_.quantize(stream.normed.row(token), 0, out.quantized.num_groups, out.quantized, token);
}

// hidden += post_norm(update + bias); normed = norm(hidden), also in int8.
void Model::add_and_norm(const Step& s, const Vector& bias, const Vector& post_norm, const Vector& norm) {
  const Stream& stream = this->stream(s);
  s.for_tokens(s.batch.num_tokens, [&](int64_t t) {
    float* hidden = stream.hidden.row(t);
    const float* update = ws_->update.row(t);
    if (post_norm)
      kernels_.add_normed(hidden, update, post_norm.data(), config_.hidden_size, config_.norm_eps);
    else
      kernels_.add(hidden, update, stream.hidden.columns());
    if (bias) kernels_.add(hidden, bias.data(), stream.hidden.columns());
    norm_token(s, norm, t);
  });
}

}  // namespace tael
