// The gated feed-forward layer.
#pragma once

#include "model/step.hpp"

namespace tael {

struct DenseWeights {
  Matrix gate, up, down;
};

struct DenseWorkspace {
  DenseWorkspace(int64_t max_tokens, int64_t intermediate_size)
      : gate(max_tokens * padded_columns(intermediate_size)),
        up(max_tokens * padded_columns(intermediate_size)),
        hidden(max_tokens, intermediate_size) {}
  int64_t bytes() const { return gate.bytes() + up.bytes() + hidden.bytes(); }

  Buffer<float> gate, up;
  Activations hidden;
};

class DenseLayer {
 public:
  DenseLayer(Activation activation, const DenseWeights& weights)
      : activation_(activation), weights_(weights) {}

  const DenseWeights& weights() const { return weights_; }

  // out[token] = down(activation(gate(x)) * up(x)). Called by every thread.
  void forward(const Step& step, const Activations& x, const DenseWorkspace& ws, float* out,
               int64_t out_stride) const {
    const Kernels& kernels = step.kernels;
    const int64_t num_tokens = step.batch.num_tokens, columns = ws.hidden.columns();
    linear(step.pool, kernels, x, num_tokens,
           {{&weights_.gate, ws.gate.data(), columns}, {&weights_.up, ws.up.data(), columns}});
    step.pool.parallel_for(num_tokens, 1, [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; ++token) {
        kernels.gated_activation(activation_, ws.gate.data() + token * columns,
                                 ws.up.data() + token * columns, columns, ws.hidden.row(token));
        if (!is_float(weights_.down.format)) ws.hidden.quantize(kernels, token);
      }
    });
    linear(step.pool, kernels, ws.hidden, num_tokens, {{&weights_.down, out, out_stride}});
  }

 private:
  Activation activation_;
  DenseWeights weights_;
};

}  // namespace tael
