// The gated feed-forward layer.
#pragma once

#include <cstring>

#include "model/step.hpp"

namespace tael {

struct DenseWeights {
  Matrix gate, up, down;
};

struct DenseWorkspace {
  DenseWorkspace(int64_t max_tokens, int64_t intermediate_size, bool floats)
      : hidden(floats ? max_tokens : 0, intermediate_size), quantized(max_tokens, intermediate_size) {}
  int64_t bytes() const { return hidden.bytes() + quantized.bytes(); }

  Rows hidden;  // where `down` is of a float format
  QuantizedBuffer quantized;
};

class DenseLayer {
 public:
  DenseLayer(Activation activation, const DenseWeights& weights)
      : activation_(activation), weights_(weights) {}

  const DenseWeights& weights() const { return weights_; }

  // out[token] = down(activation(gate(x)) * up(x)). Called by every thread.
  void forward(const Step& step, const LinearInput& x, const DenseWorkspace& ws, float* out,
               int64_t out_stride) const {
    const int64_t num_tokens = step.batch.num_tokens;
    const LinearInput hidden = {ws.hidden.floats(num_tokens), ws.quantized.rows(step.kernels, num_tokens, weights_.up.rows)};
    const int64_t num_groups = hidden.quantized.num_groups;
    step.pool.parallel_for(step.thread, num_groups * num_token_blocks(x), [&](int64_t item) {
      hidden_group(step, x, item / num_groups, item % num_groups, hidden);
    });
    linear(step.pool, step.thread, step.kernels, hidden, {{&weights_.down, out, out_stride}});
  }

 private:
  // 32 columns of the hidden rows, which are one group of the int8 activations that `down` reads.
  void hidden_group(const Step& step, const LinearInput& x, int64_t block, int64_t group,
                    const LinearInput& hidden) const {
    alignas(64) float gate[kMaxTokenBlock * kGroupColumns], up[kMaxTokenBlock * kGroupColumns];
    const int64_t tiles = num_tiles(weights_.up.rows), first = group * 2, last = first + 2 < tiles ? first + 2 : tiles;
    const int64_t count = multiply_tiles(step.kernels, weights_.gate, first, last, x, block, gate, kGroupColumns);
    multiply_tiles(step.kernels, weights_.up, first, last, x, block, up, kGroupColumns);
    for (int64_t t = 0; t < count; ++t) {
      float *g = gate + t * kGroupColumns, *u = up + t * kGroupColumns;
      if (last - first == 1)  // the matrix ends here
        for (int c = kTileRows; c < kGroupColumns; ++c) g[c] = u[c] = 0.0f;
      step.kernels.gated_activation(activation_, g, u, kGroupColumns, g);
      const int64_t token = block_start(x, block) + t;
      if (is_float(weights_.down.format))
        memcpy(const_cast<float*>(hidden.floats.row(token)) + group * kGroupColumns, g, sizeof(float) * kGroupColumns);
      else
        step.kernels.quantize(g, group, 1, hidden.quantized, token);
    }
  }

  Activation activation_;
  DenseWeights weights_;
};

}  // namespace tael
