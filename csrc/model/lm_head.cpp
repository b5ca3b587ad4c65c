#include "model/lm_head.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace tael {

namespace {

constexpr float kInfinity = __builtin_inff();

bool more_likely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token_id < b.token_id;
}

double sum(const float* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

}  // namespace

LMHead::Input::Input(int64_t max_logits, const LMHead& head)
    : floats(max_logits, head.weight_.columns), quantized(max_logits * head.terms(), head.weight_.columns) {}

void LMHead::allocate(const Limits& limits, int num_threads) {
  max_logits_ = limits.max_logits;
  num_candidates_ = std::min(limits.num_candidates, weight_.rows);
  inputs_.clear();
  scratch_.clear();
  for (int t = 0; t < num_threads; ++t) {
    inputs_.emplace_back(kReplicatedTokens, *this);
    scratch_.emplace_back(max_logits_ * terms() * piece_width());
  }
  inputs_.emplace_back(max_logits_, *this);
  maxima_ = Buffer<float>(max_logits_ * sums_stride());
  std::fill_n(maxima_.data(), max_logits_ * sums_stride(), -kInfinity);  // what follows the last piece stays so
  sums_ = Buffer<float>(max_logits_ * sums_stride());
  scaled_sums_ = Buffer<float>(max_logits_ * sums_stride());
  factors_ = Buffer<float>(max_logits_);
  const int64_t room = 2 * num_candidates_ + piece_width();
  candidate_buffer_ = Buffer<Candidate>(num_threads * max_logits_ * room);
  candidates_.clear();
  for (int64_t i = 0; i < num_threads * max_logits_; ++i)
    candidates_.push_back({candidate_buffer_.data() + i * room, 0, -kInfinity});
  out_ = {0, Buffer<int32_t>(max_logits_ * num_candidates_), Buffer<float>(max_logits_ * num_candidates_),
          Buffer<double>(max_logits_), Buffer<double>(max_logits_), Buffer<float>(max_logits_ * logits_stride())};
}

int64_t LMHead::bytes() const {
  int64_t bytes = maxima_.bytes() + sums_.bytes() + scaled_sums_.bytes() + factors_.bytes() +
                  candidate_buffer_.bytes() + out_.bytes();
  for (const Input& input : inputs_) bytes += input.floats.bytes() + input.quantized.bytes();
  for (const Buffer<float>& scratch : scratch_) bytes += scratch.bytes();
  return bytes;
}

void LMHead::forward(const Step& s, const Rows& normed) {
  const int64_t num_logits = s.batch.num_logits;
  const LinearInput x = gather(s, normed);
  for (int64_t i = 0; i < num_logits; ++i) {
    Candidates& own = candidates_[s.thread * max_logits_ + i];
    own.count = 0;
    own.limit = -kInfinity;
  }
  if (s.thread == 0) {
    x_ = x;
    out_.num_logits = num_logits;
  }
  float* scratch = scratch_[s.thread].data();
  s.pool.parallel_for(s.thread, num_pieces(), [&](int64_t piece) {
    multiply(s.kernels, piece, x, scratch);
    for (int64_t i = 0; i < num_logits; ++i) {
      float* logits = scratch + i * terms() * piece_width();
      add_piece(s, piece, i, logits, finish_logits(s.kernels, piece, logits));
    }
  });
  s.pool.parallel_for(s.thread, num_logits, [&](int64_t i) { finish_row(s, i); });
}

// The rows go through the head in two int8 terms, the second being what the first left over:
// rounding there costs a quarter of the whole model's divergence (benchmarks/kld.py), and a
// second row per sequence costs little where the head's bytes are the limit.
LinearInput LMHead::gather(const Step& s, const Rows& normed) const {
  const Input& input = s.replicated() ? inputs_[s.thread] : inputs_.back();
  const LinearInput x = {input.floats.floats(s.batch.num_logits),
                         input.quantized.rows(s.batch.num_logits * terms(), weight_.columns)};
  s.for_tokens(s.batch.num_logits, [&](int64_t i) {
    float* row = input.floats.row(i);
    memcpy(row, normed.row(s.batch.logits_indices[i]), input.floats.columns() * sizeof(float));
    if (terms() == 1) return;
    s.kernels.quantize(row, 0, x.quantized.num_groups, x.quantized, 2 * i);
    x.quantized.subtract_from(row, 2 * i);
    s.kernels.quantize(row, 0, x.quantized.num_groups, x.quantized, 2 * i + 1);
  });
  return x;
}

// Logits of one piece of the vocabulary for all terms of the rows in x: [num_terms, piece_width()].
void LMHead::multiply(const Kernels& kernels, int64_t piece, const LinearInput& x, float* out) const {
  const int64_t first = piece * piece_tiles(), last = std::min(first + piece_tiles(), num_tiles(weight_.rows));
  for (int64_t block = 0; block < num_token_blocks(x); ++block)
    multiply_tiles(kernels, weight_, first, last, x, block, out + block_start(x, block) * piece_width(),
                   piece_width());
}

// Adds the terms of a row. Returns its width in this piece, in whole tiles: ids beyond the vocabulary
// become impossible.
int64_t LMHead::finish_logits(const Kernels& kernels, int64_t piece, float* row) const {
  const int64_t left = weight_.rows - piece * piece_width();
  const int64_t count = std::min(piece_width(), num_tiles(left) * kTileRows);
  if (terms() == 2) kernels.add(row, row + piece_width(), count);
  for (int64_t i = left; i < count; ++i) row[i] = -kInfinity;
  return count;
}

void LMHead::add_piece(const Step& s, int64_t piece, int64_t row, const float* logits, int64_t count) {
  const float top = s.kernels.largest(logits, count);
  const float base = top == -kInfinity ? 0.0f : top;
  const int64_t place = row * sums_stride() + piece, first_id = piece * piece_width();
  maxima_.data()[place] = top;
  sums_.data()[place] = s.kernels.sum_exp(logits, count, base, 1.0f);
  const float temperature = s.batch.temperatures[row];
  if (temperature != 1.0f)
    scaled_sums_.data()[place] = s.kernels.sum_exp(logits, count, base, 1.0f / temperature);
  if (s.batch.full_logits[row])
    memcpy(out_.logits.data() + row * logits_stride() + first_id, logits, count * sizeof(float));
  Candidates& own = candidates_[s.thread * max_logits_ + row];
  if (top < own.limit) return;
  own.count += s.kernels.select_at_least(logits, count, own.limit, int32_t(first_id), own.data + own.count);
  if (own.count >= 2 * num_candidates_) own.keep(num_candidates_);
}

void LMHead::Candidates::keep(int64_t num) {
  if (count < num) return;
  std::nth_element(data, data + num - 1, data + count, more_likely);
  count = num;
  limit = data[num - 1].logit;
}

void LMHead::finish_row(const Step& s, int64_t row) {
  const int64_t k = num_candidates_;
  Candidates& best = candidates_[row];
  best.keep(k);
  for (size_t other = row + max_logits_; other < candidates_.size(); other += max_logits_) {
    candidates_[other].keep(k);
    best.count = std::copy_n(candidates_[other].data, candidates_[other].count, best.data + best.count) - best.data;
    best.keep(k);
  }
  std::sort(best.data, best.data + best.count, more_likely);
  std::fill(best.data + best.count, best.data + k, Candidate{-kInfinity, 0});  // where others are NaN
  for (int64_t i = 0; i < k; ++i) {
    out_.top_token_ids.data()[row * k + i] = best.data[i].token_id;
    out_.top_logits.data()[row * k + i] = best.data[i].logit;
  }
  const float* maxima = maxima_.data() + row * sums_stride();
  const float maximum = s.kernels.largest(maxima, sums_stride());
  float* sums = sums_.data() + row * sums_stride();
  s.kernels.rescale_sums(sums, maxima, sums_stride(), maximum, 1.0f);
  out_.sum_exp.data()[row] = out_.sum_exp_at_temperature.data()[row] = sum(sums, num_pieces());
  const float factor = factors_.data()[row] = 1.0f / s.batch.temperatures[row];
  if (factor == 1.0f) return;
  sums = scaled_sums_.data() + row * sums_stride();
  s.kernels.rescale_sums(sums, maxima, sums_stride(), maximum, factor);
  out_.sum_exp_at_temperature.data()[row] = sum(sums, num_pieces());
}

Candidate LMHead::draw(const Kernels& kernels, int64_t row, double uniform) const {
  if (row < 0 || row >= out_.num_logits) throw std::out_of_range("no such row of logits");
  if (!(uniform >= 0.0 && uniform < 1.0)) throw std::out_of_range("quantile outside [0, 1)");
  const float factor = factors_.data()[row], maximum = out_.top_logits.data()[row * num_candidates_];
  const float* sums = (factor == 1.0f ? sums_ : scaled_sums_).data() + row * sums_stride();
  const double target = uniform * out_.sum_exp_at_temperature.data()[row];
  int64_t piece = 0;
  double above = 0.0;
  while (piece + 1 < num_pieces() && above + sums[piece] <= target) above += sums[piece++];

  // Once more the logits of this piece, for the packs that hold the terms of this row.
  const int64_t size = x_.quantized.pack_size, term = row * terms();
  const int64_t first = term / size, last = (term + terms() - 1) / size + 1;
  const QuantizedRows packs = x_.quantized.packs(first, last);
  float* scratch = scratch_[0].data();
  multiply(kernels, piece, {x_.floats.slice(first * size, packs.num_tokens), packs}, scratch);
  float* logits = scratch + (term - first * size) * piece_width();
  const int64_t count = finish_logits(kernels, piece, logits);
  int64_t chosen = 0;
  for (int64_t i = 0; i < count && above <= target; ++i) {
    const double weight = std::exp(double(factor * (logits[i] - maximum)));
    if (weight > 0.0) chosen = i;
    above += weight;
  }
  return {logits[chosen], int32_t(piece * piece_width() + chosen)};
}

}  // namespace tael
