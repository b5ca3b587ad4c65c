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

LMHead::Input::Input(int64_t max_logits, int64_t columns)
    : floats(max_logits, columns), first_terms(max_logits, columns), terms(2 * max_logits, columns) {}

void LMHead::allocate(const Limits& limits, int num_threads) {
  max_logits_ = limits.max_logits;
  num_candidates_ = std::min(limits.num_candidates, weight_.rows);
  inputs_.clear();
  scratch_.clear();
  for (int t = 0; t < num_threads; ++t) {
    inputs_.emplace_back(kReplicatedTokens, weight_.columns);
    scratch_.emplace_back(std::max<int64_t>(max_logits_, 2) * piece_width());
  }
  inputs_.emplace_back(max_logits_, weight_.columns);
  maxima_ = Buffer<float>(max_logits_ * sums_stride());
  std::fill_n(maxima_.data(), max_logits_ * sums_stride(), -kInfinity);  // what follows the last piece stays so
  sums_ = Buffer<float>(max_logits_ * sums_stride());
  scaled_sums_ = Buffer<float>(max_logits_ * sums_stride());
  factors_ = Buffer<float>(max_logits_);
  refined_.resize(max_logits_ * kRefinedTokens);
  num_refined_.resize(max_logits_);
  const int64_t room = 2 * num_kept() + piece_width();
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
  for (const Input& input : inputs_) bytes += input.floats.bytes() + input.first_terms.bytes() + input.terms.bytes();
  for (const Buffer<float>& scratch : scratch_) bytes += scratch.bytes();
  return bytes;
}

void LMHead::forward(const Step& s, const Rows& normed) {
  const int64_t num_logits = s.batch.num_logits;
  const Input& input = this->input(s);
  const LinearInput x = {input.floats.floats(num_logits), input.first_terms.rows(s.kernels, num_logits, weight_.columns)};
  gather(s, normed, x);
  for (int64_t i = 0; i < num_logits; ++i) candidates_[s.thread * max_logits_ + i].clear();
  if (s.thread == 0) {
    last_input_ = &input;
    out_.num_logits = num_logits;
  }
  float* scratch = scratch_[s.thread].data();
  s.pool.parallel_for(s.thread, num_pieces(), [&](int64_t piece) {
    multiply(s.kernels, piece, x, scratch);
    for (int64_t i = 0; i < num_logits; ++i) add_piece(s, piece, i, scratch + i * piece_width());
  });
  if (is_rounded()) {
    s.pool.parallel_for(s.thread, num_logits, [&](int64_t i) { choose_refined(i); });
    s.pool.parallel_for(s.thread, num_logits * kRefinedTokens, [&](int64_t item) {
      const int64_t row = item / kRefinedTokens;
      if (item % kRefinedTokens >= num_refined_[row]) return;
      multiply_refined(s.kernels, refined_[item], input, row, scratch);
      add_piece(s, refined_[item], row, scratch);
    });
  }
  s.pool.parallel_for(s.thread, num_logits, [&](int64_t i) { finish_row(s, i); });
}

QuantizedRows LMHead::terms(const Input& input, int64_t row) const {
  return input.terms.packs_of(2, 2 * max_logits_, weight_.columns).packs(row, row + 1);
}

void LMHead::gather(const Step& s, const Rows& normed, const LinearInput& x) const {
  const Input& input = this->input(s);
  s.for_tokens(s.batch.num_logits, [&](int64_t i) {
    float* row = input.floats.row(i);
    memcpy(row, normed.row(s.batch.logits_indices[i]), input.floats.columns() * sizeof(float));
    if (!is_rounded()) return;
    const int64_t num_groups = x.quantized.num_groups;
    const QuantizedRows both = terms(input, i);
    s.kernels.quantize(row, 0, num_groups, x.quantized, i);
    s.kernels.quantize(row, 0, num_groups, both, 0);
    both.subtract_from(row, 0);
    s.kernels.quantize(row, 0, num_groups, both, 1);
  });
}

// Logits of one piece of the vocabulary for the rows in x: [num_rows, piece_width()].
void LMHead::multiply(const Kernels& kernels, int64_t piece, const LinearInput& x, float* out) const {
  const int64_t first = piece * piece_tiles(), last = std::min(first + piece_tiles(), num_tiles(weight_.rows));
  for (int64_t block = 0; block < num_token_blocks(x); ++block)
    multiply_tiles(kernels, weight_, first, last, x, block, out + block_start(x, block) * piece_width(),
                   piece_width());
}

// Of one row, both terms: [2, piece_width()], of which the first is the logits.
void LMHead::multiply_refined(const Kernels& kernels, int64_t piece, const Input& input, int64_t row,
                              float* out) const {
  multiply(kernels, piece, {{}, terms(input, row)}, out);
  kernels.add(out, out + piece_width(), piece_width());
}

void LMHead::add_piece(const Step& s, int64_t piece, int64_t row, float* logits) {
  const int64_t count = mask_padding(piece, logits);
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
  if (own.count >= 2 * num_kept()) own.keep(num_kept());
}

// Makes ids beyond the vocabulary impossible. Returns the width of the piece, in whole tiles.
int64_t LMHead::mask_padding(int64_t piece, float* logits) const {
  const int64_t left = weight_.rows - piece * piece_width();
  const int64_t count = std::min(piece_width(), num_tiles(left) * kTileRows);
  for (int64_t i = left; i < count; ++i) logits[i] = -kInfinity;
  return count;
}

void LMHead::Candidates::keep(int64_t num) {
  if (count < num) return;
  std::nth_element(data, data + num - 1, data + count, more_likely);
  count = num;
  limit = data[num - 1].logit;
}

// Of all threads, in the place of the first, in order.
LMHead::Candidates& LMHead::merge_candidates(int64_t row) {
  Candidates& best = candidates_[row];
  best.keep(num_kept());
  for (size_t other = row + max_logits_; other < candidates_.size(); other += max_logits_) {
    Candidates& own = candidates_[other];
    own.keep(num_kept());
    best.count = std::copy_n(own.data, own.count, best.data + best.count) - best.data;
    best.keep(num_kept());
    own.clear();
  }
  std::sort(best.data, best.data + best.count, more_likely);
  return best;
}

// The candidates of the pieces that it chooses are taken away: they come back refined.
void LMHead::choose_refined(int64_t row) {
  Candidates& best = merge_candidates(row);
  int64_t* const first = refined_.data() + row * kRefinedTokens;
  int64_t* last = first;
  for (int64_t i = 0; i < std::min(best.count, kRefinedTokens); ++i) *last++ = best.data[i].token_id / piece_width();
  std::sort(first, last);
  num_refined_[row] = std::unique(first, last) - first;
  best.count = std::remove_if(best.data, best.data + best.count,
                              [&](const Candidate& c) { return is_refined(row, c.token_id / piece_width()); }) -
               best.data;
  best.limit = -kInfinity;
}

bool LMHead::is_refined(int64_t row, int64_t piece) const {
  const int64_t* first = refined_.data() + row * kRefinedTokens;
  return std::binary_search(first, first + num_refined_[row], piece);
}

void LMHead::finish_row(const Step& s, int64_t row) {
  const int64_t k = num_candidates_;
  Candidates& best = merge_candidates(row);
  best.count = std::min(best.count, k);
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

  // Once more the logits of this piece.
  float* logits = scratch_[0].data();
  if (!is_rounded())
    multiply(kernels, piece, {last_input_->floats.floats(row + 1).slice(row, 1), {nullptr, 0, 1, 1}}, logits);
  else if (is_refined(row, piece))
    multiply_refined(kernels, piece, *last_input_, row, logits);
  else
    multiply(kernels, piece, {{}, terms(*last_input_, row)}, logits);
  const int64_t count = mask_padding(piece, logits);
  int64_t chosen = 0;
  for (int64_t i = 0; i < count && above <= target; ++i) {
    const double weight = std::exp(double(factor * (logits[i] - maximum)));
    if (weight > 0.0) chosen = i;
    above += weight;
  }
  return {logits[chosen], int32_t(piece * piece_width() + chosen)};
}

}  // namespace tael
