// Builds the kernel table of one instruction set. Included by its object file only.
#pragma once

#include "kernels/activation/activation.hpp"
#include "kernels/attention/attention.hpp"
#include "kernels/key_summary/key_summary.hpp"
#include "kernels/logits/logits.hpp"
#include "kernels/matmul/matmul.hpp"
#include "kernels/quantize/quantize.hpp"
#include "kernels/rms_norm/rms_norm.hpp"
#include "kernels/rope/rope.hpp"

namespace tael {

template <class S> void set_attention(Kernels& k) {
  k.name = S::kName;
  k.attention_partition = AttentionKernel<S>::partition;
  k.attention_merge = AttentionKernel<S>::merge;
  k.attention_finish = AttentionKernel<S>::finish;
  k.score_bounds = score_bounds<S>;
  k.score_codes = score_codes<S>;
  k.to_bf16 = to_bf16<S>;
}

template <class S> void set_quantized_matmul(Kernels& k) {
  k.matmul[int(Format::Q4_0)] = quantized_matmul<S, tiles::Q4_0<S>>;
  k.matmul[int(Format::Q4_1)] = quantized_matmul<S, tiles::Q4_1<S>>;
  k.matmul[int(Format::Q5_0)] = quantized_matmul<S, tiles::Q5_0<S>>;
  k.matmul[int(Format::Q5_1)] = quantized_matmul<S, tiles::Q5_1<S>>;
  k.matmul[int(Format::Q8_0)] = quantized_matmul<S, tiles::Q8_0<S>>;
  k.matmul[int(Format::Q2_K)] = quantized_matmul<S, tiles::Q2_K<S>>;
  k.matmul[int(Format::Q3_K)] = quantized_matmul<S, tiles::Q3_K<S>>;
  k.matmul[int(Format::Q4_K)] = quantized_matmul<S, tiles::Q4_K<S>>;
  k.matmul[int(Format::Q5_K)] = quantized_matmul<S, tiles::Q5_K<S>>;
  k.matmul[int(Format::Q6_K)] = quantized_matmul<S, tiles::Q6_K<S>>;
  k.matmul[int(Format::IQ4_NL)] = quantized_matmul<S, tiles::IQ4_NL<S>>;
  k.matmul[int(Format::MXFP4)] = quantized_matmul<S, tiles::MXFP4<S>>;
}

template <class S> Kernels make_kernels() {
  Kernels k{};
  set_attention<S>(k);
  k.quantize = quantize<S>;
  k.rms_norm = rms_norm<S>;
  k.add = add<S>;
  k.add_normed = add_normed<S>;
  k.rope = rope<S>;
  k.gated_activation = gated_activation<S>;
  k.largest = largest<S>;
  k.sum_exp = sum_exp<S>;
  k.rescale_sums = rescale_sums<S>;
  k.select_at_least = select_at_least<S>;
  k.matmul_float[int(Format::F32)] = float_matmul<S, F32Columns<S>>;
  k.matmul_float[int(Format::F16)] = float_matmul<S, F16Columns<S>>;
  k.matmul_float[int(Format::BF16)] = float_matmul<S, BF16Columns<S>>;
  set_quantized_matmul<S>(k);
  return k;
}

}  // namespace tael
