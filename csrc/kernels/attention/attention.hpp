// Softmax attention over paged KV, the query heads of a group together so that K and V are read
// once. What a row computes depends on its position only: blocks in ascending order, and blocks
// that it does not see leave its state untouched, whichever rows share its task.
#pragma once

#include "kernels/math.hpp"
#include "kernels/types.hpp"

namespace tael {

template <class S> struct AttentionKernel {
  using F = typename S::F;
  static constexpr int kVectors = kBlockTokens / 16;
  static constexpr float kNegativeInfinity = -__builtin_inff();

  static float& maximum(float* state) { return state[0]; }
  static float& sum(float* state) { return state[1]; }
  static float* output(float* state) { return state + 16; }
  static const float* output(const float* state) { return state + 16; }

  static void partition(const AttentionTask& task, int index, float* states) {
    const int head_dim = task.kv->head_dim;
    const int64_t stride = attention_state_floats(head_dim);
    const int num_rows = task.num_rows();
    for (int r = 0; r < num_rows; ++r) {
      float* state = states + r * stride;
      for (int64_t i = 0; i < stride; ++i) state[i] = 0.0f;
      maximum(state) = kNegativeInfinity;
    }
    const int64_t begin = int64_t(index) * kPartitionTokens;
    const int64_t seen = int64_t(task.first_position) - task.window + 1;
    const int64_t end_of_task = int64_t(task.first_position) + task.num_tokens;
    const int64_t first = seen > begin ? seen : begin;
    const int64_t last = begin + kPartitionTokens < end_of_task ? begin + kPartitionTokens : end_of_task;
    for (int64_t b = first / kBlockTokens; b * kBlockTokens < last; ++b) {
      const int32_t block = task.block_table[b];
      const uint16_t* keys = task.kv->keys(block, task.kv_head);
      const uint16_t* values = task.kv->values(block, task.kv_head);
      const int64_t rest = last - b * kBlockTokens;
      const int num_valid = rest < kBlockTokens ? int(rest) : kBlockTokens;
      int r = 0;
      for (; r + 4 <= num_rows; r += 4) block_rows<4>(task, r, b, keys, values, num_valid, states, stride);
      if (num_rows - r >= 2) block_rows<2>(task, r, b, keys, values, num_valid, states, stride), r += 2;
      if (num_rows - r >= 1) block_rows<1>(task, r, b, keys, values, num_valid, states, stride);
    }
  }

  static void merge(float* total, const float* next, int num_rows, int head_dim) {
    const int64_t stride = attention_state_floats(head_dim);
    for (int r = 0; r < num_rows; ++r, total += stride, next += stride) {
      if (next[0] == kNegativeInfinity) continue;  // saw nothing
      const float top = maximum(total) > next[0] ? maximum(total) : next[0];
      const F a = vector_exp<S>(S::splat(maximum(total) - top));
      const F b = vector_exp<S>(S::splat(next[0] - top));
      sum(total) = first_lane(S::fma(S::splat(sum(total)), a, S::mul(S::splat(next[1]), b)));
      maximum(total) = top;
      for (int d = 0; d < head_dim; d += 16)
        S::store(output(total) + d,
                 S::fma(S::load(output(total) + d), a, S::mul(S::load(output(next) + d), b)));
    }
  }

  static void finish(const AttentionTask& task, const float* states, float* out) {
    const int head_dim = task.kv->head_dim;
    const int64_t stride = attention_state_floats(head_dim);
    for (int r = 0; r < task.num_rows(); ++r) {
      const float* state = states + r * stride;
      float* row = out + (task.query(r) - task.q);
      for (int d = 0; d < head_dim; d += 16)
        S::store(row + d, S::div(S::load(output(state) + d), S::splat(state[1])));
    }
  }

 private:
  static float first_lane(F a) {
    float lanes[16];
    S::store(lanes, a);
    return lanes[0];
  }

  // R rows against one block of which num_valid positions hold KV.
  template <int R>
  static void block_rows(const AttentionTask& task, int first_row, int64_t block_index,
                         const uint16_t* keys, const uint16_t* values, int num_valid, float* states,
                         int64_t stride) {
    float weights[R][kBlockTokens];
    bool any = false;
    scores<R>(task, first_row, keys, weights);
    for (int r = 0; r < R; ++r)
      any |= softmax_row(task, first_row + r, block_index, weights[r], states + (first_row + r) * stride);
    if (any) add_values<R>(task.kv->head_dim, values, num_valid, weights, states + first_row * stride, stride);
  }

  template <int R>
  static void scores(const AttentionTask& task, int first_row, const uint16_t* keys,
                     float (*weights)[kBlockTokens]) {
    const int head_dim = task.kv->head_dim;
    const float* q[R];
    for (int r = 0; r < R; ++r) q[r] = task.query(first_row + r);
    F acc[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) acc[r][v] = S::zero();
    for (int d = 0; d < head_dim; d += 2)
      for (int v = 0; v < kVectors; ++v) {
        const uint16_t* pair = keys + (int64_t(v) * head_dim + d) * 16;
        const F even = S::load_bf16_even(pair), odd = S::load_bf16_odd(pair);
        for (int r = 0; r < R; ++r) {
          acc[r][v] = S::fma(S::splat(q[r][d]), even, acc[r][v]);
          acc[r][v] = S::fma(S::splat(q[r][d + 1]), odd, acc[r][v]);
        }
      }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) S::store(weights[r] + 16 * v, acc[r][v]);
  }

  // Turns scores into weights relative to the row's new maximum and rescales its state. False,
  // with weights of zero, where the row sees no position of the block.
  static bool softmax_row(const AttentionTask& task, int row, int64_t block_index, float* weights,
                          float* state) {
    const int64_t start = block_index * kBlockTokens;
    const int64_t oldest = int64_t(task.position(row)) - task.window + 1 - start;
    const int64_t newest = int64_t(task.position(row)) + 1 - start;
    const int first = oldest > 0 ? int(oldest < kBlockTokens ? oldest : kBlockTokens) : 0;
    const int last = newest < kBlockTokens ? int(newest > 0 ? newest : 0) : kBlockTokens;
    if (first >= last) {
      for (int v = 0; v < kVectors; ++v) S::store(weights + 16 * v, S::zero());
      return false;
    }
    F s[kVectors];
    F top = S::splat(kNegativeInfinity);
    for (int v = 0; v < kVectors; ++v) {
      s[v] = S::select_range(first - 16 * v, last - 16 * v, S::load(weights + 16 * v),
                             S::splat(kNegativeInfinity));
      top = S::max(top, s[v]);
    }
    const float row_top = S::max_lane(top);
    const float new_maximum = maximum(state) > row_top ? maximum(state) : row_top;
    F total = S::zero();
    for (int v = 0; v < kVectors; ++v) {
      const F p = vector_exp<S>(S::sub(s[v], S::splat(new_maximum)));
      S::store(weights + 16 * v, p);
      total = S::add(total, p);
    }
    const F rescale = vector_exp<S>(S::splat(maximum(state) - new_maximum));
    sum(state) = first_lane(S::fma(S::splat(sum(state)), rescale, S::splat(S::sum(total))));
    maximum(state) = new_maximum;
    float* out = output(state);
    for (int d = 0; d < task.kv->head_dim; d += 16) S::store(out + d, S::mul(S::load(out + d), rescale));
    return true;
  }

  template <int R>
  static void add_values(int head_dim, const uint16_t* values, int num_valid,
                         const float (*weights)[kBlockTokens], float* states, int64_t stride) {
    for (int d = 0; d < head_dim; d += 16) {
      F acc[R];
      for (int r = 0; r < R; ++r) acc[r] = S::load(output(states + r * stride) + d);
      for (int t = 0; t < num_valid; ++t) {
        const uint16_t* pair = values + (int64_t(t / 2) * head_dim + d) * 2;
        const F v = t % 2 == 0 ? S::load_bf16_even(pair) : S::load_bf16_odd(pair);
        for (int r = 0; r < R; ++r) acc[r] = S::fma(S::splat(weights[r][t]), v, acc[r]);
      }
      for (int r = 0; r < R; ++r) S::store(output(states + r * stride) + d, acc[r]);
    }
  }
};

}  // namespace tael
