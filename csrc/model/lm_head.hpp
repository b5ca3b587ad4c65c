// The last layer: logits of a few rows, and what sampling needs to know of them. A piece of the
// vocabulary is finished while its logits are in the L1 cache; whole rows are kept where asked for.
#pragma once

#include "model/step.hpp"

namespace tael {

// HeadOutput of tael/backends/base.py, row by row. Valid until the next step.
struct HeadOutput {
  int64_t num_logits = 0;
  Buffer<int32_t> top_token_ids;  // [max_logits, num_candidates]
  Buffer<float> top_logits;
  Buffer<double> sum_exp;  // [max_logits]
  Buffer<double> sum_exp_at_temperature;
  Buffer<float> logits;  // [max_logits, stride]

  int64_t bytes() const {
    return top_token_ids.bytes() + top_logits.bytes() + sum_exp.bytes() + sum_exp_at_temperature.bytes() +
           logits.bytes();
  }
};

// Sums of exponentials are kept for each piece and added in ascending order, so that they round
// alike whichever thread took a piece.
//
// Rounding the rows to int8 would cost a quarter of the whole model's divergence (benchmarks/kld.py),
// so a row has a second int8 term, what the first left over. That is multiplied where it matters: with
// the pieces that hold the tokens that are the most likely by the first term.
class LMHead {
 public:
  LMHead() = default;
  explicit LMHead(const Matrix& weight) : weight_(weight) {}

  void allocate(const Limits& limits, int num_threads);
  // Called by every thread. `normed` holds the rows that batch.logits_indices counts.
  void forward(const Step& s, const Rows& normed);
  const HeadOutput& output() const { return out_; }

  // The token at quantile `uniform`, in [0, 1), of a row of the last step at its temperature, tokens
  // being in order of their ids. Never one of probability zero. Throws std::out_of_range.
  Candidate draw(const Kernels& kernels, int64_t row, double uniform) const;

  int64_t num_candidates() const { return num_candidates_; }
  int64_t logits_stride() const { return weight_.padded_rows(); }
  int64_t bytes() const;

 private:
  static constexpr int64_t kRefinedTokens = 16;

  struct Input {
    Input(int64_t max_logits, int64_t columns);
    Rows floats;
    QuantizedBuffer first_terms;
    QuantizedBuffer terms;  // both of a row side by side, in a pack of their own
  };
  // The most likely tokens of a row among the pieces that one thread took, and some more.
  struct Candidates {
    Candidate* data;
    int64_t count;
    float limit;  // logits below are not among them
    void keep(int64_t num);
    void clear() { count = 0, limit = -__builtin_inff(); }
  };

  bool is_rounded() const { return !is_float(weight_.format); }
  // Candidates that stay while pieces are refined: some of them may turn out to be less likely.
  int64_t num_kept() const { return num_candidates_ + (is_rounded() ? kRefinedTokens : 0); }
  int64_t piece_tiles() const { return tiles_at_a_time(weight_); }
  int64_t piece_width() const { return piece_tiles() * kTileRows; }
  int64_t num_pieces() const { return (num_tiles(weight_.rows) + piece_tiles() - 1) / piece_tiles(); }
  int64_t sums_stride() const { return padded_columns(num_pieces()); }

  const Input& input(const Step& s) const { return s.replicated() ? inputs_[s.thread] : inputs_.back(); }
  QuantizedRows terms(const Input& input, int64_t row) const;
  void gather(const Step& s, const Rows& normed, const LinearInput& x) const;
  void multiply(const Kernels& kernels, int64_t piece, const LinearInput& x, float* out) const;
  void multiply_refined(const Kernels& kernels, int64_t piece, const Input& input, int64_t row, float* out) const;
  void add_piece(const Step& s, int64_t piece, int64_t row, float* logits);
  int64_t mask_padding(int64_t piece, float* logits) const;
  Candidates& merge_candidates(int64_t row);
  void choose_refined(int64_t row);
  bool is_refined(int64_t row, int64_t piece) const;
  void finish_row(const Step& s, int64_t row);

  Matrix weight_{};
  int64_t max_logits_ = 0, num_candidates_ = 0;
  std::vector<Input> inputs_;            // per thread for replicated steps, then one for all others
  const Input* last_input_ = nullptr;    // of the last step
  std::vector<Buffer<float>> scratch_;   // per thread: logits of a piece for all rows
  Buffer<float> maxima_;                 // [max_logits, sums_stride()]: of each piece
  Buffer<float> sums_, scaled_sums_;     // likewise; in the end relative to the maximum of the row
  Buffer<float> factors_;                // 1 / temperature
  Buffer<Candidate> candidate_buffer_;
  std::vector<Candidates> candidates_;   // [num_threads, max_logits]
  std::vector<int64_t> refined_;         // [max_logits, kRefinedTokens]: pieces, the first num_refined_
  std::vector<int64_t> num_refined_;     // [max_logits]
  HeadOutput out_;
};

}  // namespace tael
