// Builds the kernel table of one instruction set. Included by its object file only.
#pragma once

#include "kernels/activation/activation.hpp"
#include "kernels/attention/attention.hpp"
#include "kernels/matmul/matmul.hpp"
#include "kernels/quantize/quantize.hpp"
#include "kernels/rms_norm/rms_norm.hpp"
#include "kernels/rope/rope.hpp"

namespace tael {

template <class S> Kernels make_kernels() {
  Kernels k{};
  k.name = S::kName;
  k.quantize = quantize<S>;
  k.rms_norm = rms_norm<S>;
  k.add = add<S>;
  k.rope = rope<S>;
  k.gated_activation = gated_activation<S>;
  k.attention_partition = AttentionKernel<S>::partition;
  k.attention_merge = AttentionKernel<S>::merge;
  k.attention_finish = AttentionKernel<S>::finish;
  k.matmul_float[int(Format::F32)] = matmul<FloatTile, S, F32Columns<S>, FloatRows>;
  k.matmul_float[int(Format::F16)] = matmul<FloatTile, S, F16Columns<S>, FloatRows>;
  k.matmul_float[int(Format::BF16)] = matmul<FloatTile, S, BF16Columns<S>, FloatRows>;
  k.matmul[int(Format::Q4_0)] = matmul<QuantizedTile, S, tiles::Q4_0<S>, QuantizedRows>;
  k.matmul[int(Format::Q4_1)] = matmul<QuantizedTile, S, tiles::Q4_1<S>, QuantizedRows>;
  k.matmul[int(Format::Q5_0)] = matmul<QuantizedTile, S, tiles::Q5_0<S>, QuantizedRows>;
  k.matmul[int(Format::Q5_1)] = matmul<QuantizedTile, S, tiles::Q5_1<S>, QuantizedRows>;
  k.matmul[int(Format::Q8_0)] = matmul<QuantizedTile, S, tiles::Q8_0<S>, QuantizedRows>;
  k.matmul[int(Format::Q2_K)] = matmul<QuantizedTile, S, tiles::Q2_K<S>, QuantizedRows>;
  k.matmul[int(Format::Q3_K)] = matmul<QuantizedTile, S, tiles::Q3_K<S>, QuantizedRows>;
  k.matmul[int(Format::Q4_K)] = matmul<QuantizedTile, S, tiles::Q4_K<S>, QuantizedRows>;
  k.matmul[int(Format::Q5_K)] = matmul<QuantizedTile, S, tiles::Q5_K<S>, QuantizedRows>;
  k.matmul[int(Format::Q6_K)] = matmul<QuantizedTile, S, tiles::Q6_K<S>, QuantizedRows>;
  k.matmul[int(Format::IQ4_NL)] = matmul<QuantizedTile, S, tiles::IQ4_NL<S>, QuantizedRows>;
  k.matmul[int(Format::MXFP4)] = matmul<QuantizedTile, S, tiles::MXFP4<S>, QuantizedRows>;
  return k;
}

}  // namespace tael
