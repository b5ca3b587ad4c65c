#include "model/attention_layer.hpp"

#include <algorithm>

#include "common/half.hpp"

namespace tael {

AttentionWorkspace::AttentionWorkspace(const Limits& limits, int num_threads,
                                       const std::vector<AttentionPlan>& plans)
    : thread_floats(0) {
  int64_t q_columns = 0, kv_columns = 0, shared = 0;
  for (const AttentionPlan& plan : plans) {
    const AttentionShape& shape = plan.shape();
    q_columns = std::max(q_columns, int64_t(shape.num_heads) * shape.head_dim);
    kv_columns = std::max(kv_columns, int64_t(shape.num_kv_heads) * shape.head_dim);
    thread_floats = std::max(thread_floats, plan.piece_floats());
    shared = std::max(shared, plan.shared_floats());
  }
  q = Activations(limits.max_tokens, q_columns);
  out = Activations(limits.max_tokens, q_columns);
  k = Activations(limits.max_tokens, kv_columns);
  v = Activations(limits.max_tokens, kv_columns);
  thread_states = Buffer<float>(num_threads * 2 * thread_floats);
  shared_states = Buffer<float>(shared);
}

int64_t AttentionWorkspace::bytes() const {
  return q.bytes() + k.bytes() + v.bytes() + out.bytes() + thread_states.bytes() + shared_states.bytes();
}

void AttentionLayer::forward(const Step& step, const Activations& x, const RopeTable& rope,
                             const AttentionPlan& plan, const AttentionWorkspace& ws, float* out,
                             int64_t out_stride) const {
  const Kernels& kernels = step.kernels;
  const int64_t num_tokens = step.batch.num_tokens;
  const int head_dim = config_.shape.head_dim;
  linear(step.pool, kernels, x, num_tokens,
         {{&weights_.q, ws.q.row(0), ws.q.columns()},
          {&weights_.k, ws.k.row(0), ws.k.columns()},
          {&weights_.v, ws.v.row(0), ws.v.columns()}});

  step.pool.parallel_for(num_tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) append(step, rope, ws, token);
  });

  step.pool.parallel_for(int64_t(plan.pieces().size()), 1, [&](int64_t first, int64_t last) {
    float* total = ws.thread_states.data() + step.thread * 2 * ws.thread_floats;
    for (int64_t i = first; i < last; ++i) {
      const AttentionPiece& piece = plan.pieces()[i];
      const AttentionTask t = task(step, ws, piece);
      if (piece.state >= 0) {
        kernels.attention_partition(t, piece.first_partition, ws.shared_states.data() + piece.state);
        continue;
      }
      kernels.attention_partition(t, piece.first_partition, total);
      for (int p = piece.first_partition + 1; p < piece.last_partition; ++p) {
        kernels.attention_partition(t, p, total + ws.thread_floats);
        kernels.attention_merge(total, total + ws.thread_floats, t.num_rows(), head_dim);
      }
      kernels.attention_finish(t, total, ws.out.row(piece.first_token) + (t.q - ws.q.row(piece.first_token)));
    }
  });

  if (!plan.merges().empty())
    step.pool.parallel_for(int64_t(plan.merges().size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const AttentionPiece& piece = plan.merges()[i];
        const AttentionTask t = task(step, ws, piece);
        const int64_t floats = t.num_rows() * attention_state_floats(head_dim);
        float* total = ws.shared_states.data() + piece.state;
        for (int p = 1; p < piece.last_partition - piece.first_partition; ++p)
          kernels.attention_merge(total, total + p * floats, t.num_rows(), head_dim);
        kernels.attention_finish(t, total, ws.out.row(piece.first_token) + (t.q - ws.q.row(piece.first_token)));
      }
    });

  if (!is_float(weights_.o.format))
    step.pool.parallel_for(num_tokens, 1, [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; ++token) ws.out.quantize(kernels, token);
    });
  linear(step.pool, kernels, ws.out, num_tokens, {{&weights_.o, out, out_stride}});
}

AttentionTask AttentionLayer::task(const Step& step, const AttentionWorkspace& ws,
                                   const AttentionPiece& piece) const {
  const AttentionShape& shape = config_.shape;
  const int heads = shape.heads_per_kv_head();
  return {
      .kv = &kv_,
      .block_table = step.batch.block_tables[config_.cache_group].row(piece.seq),
      .kv_head = piece.kv_head,
      .num_heads = heads,
      .num_tokens = piece.num_tokens,
      .first_position = step.batch.positions[piece.first_token],
      .window = shape.window,
      .q = ws.q.row(piece.first_token) + int64_t(piece.kv_head) * heads * shape.head_dim,
      .q_stride = ws.q.columns(),
  };
}

// Finishes q in place and stores k and v of one token.
void AttentionLayer::append(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws,
                            int64_t token) const {
  const Kernels& kernels = step.kernels;
  const AttentionShape& shape = config_.shape;
  const int head_dim = shape.head_dim;
  float *q = ws.q.row(token), *k = ws.k.row(token), *v = ws.v.row(token);
  const int64_t q_size = int64_t(shape.num_heads) * head_dim, kv_size = int64_t(shape.num_kv_heads) * head_dim;
  if (weights_.q_bias) kernels.add(q, weights_.q_bias.data(), q_size);
  if (weights_.k_bias) kernels.add(k, weights_.k_bias.data(), kv_size);
  if (weights_.v_bias) kernels.add(v, weights_.v_bias.data(), kv_size);
  const float* cos = rope.cos.data() + token * rope.num_pairs();
  const float* sin = rope.sin.data() + token * rope.num_pairs();
  for (int h = 0; h < shape.num_heads; ++h, q += head_dim) {
    if (weights_.q_norm) kernels.rms_norm(q, weights_.q_norm.data(), head_dim, config_.norm_eps, q);
    kernels.rope(q, cos, sin, rope.num_pairs());
    for (int d = 0; d < head_dim; ++d) q[d] *= config_.scale;
  }

  const int32_t position = step.batch.positions[token];
  const int slot = position % kBlockTokens;
  const int32_t block = step.batch.block_tables[config_.cache_group].row(
      step.batch.token_seq[token])[position / kBlockTokens];
  for (int h = 0; h < shape.num_kv_heads; ++h, k += head_dim, v += head_dim) {
    if (weights_.k_norm) kernels.rms_norm(k, weights_.k_norm.data(), head_dim, config_.norm_eps, k);
    kernels.rope(k, cos, sin, rope.num_pairs());
    uint16_t* keys = kv_.keys(block, h) + int64_t(slot / 16) * head_dim * 16 + slot % 16 * 2;
    uint16_t* values = kv_.values(block, h) + int64_t(slot / 2) * head_dim * 2 + slot % 2;
    for (int d = 0; d < head_dim; ++d) {
      keys[d / 2 * 32 + d % 2] = float_to_bf16(k[d]);
      values[d * 2] = float_to_bf16(v[d]);
    }
  }
}

}  // namespace tael
