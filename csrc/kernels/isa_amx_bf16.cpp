#include "kernels/table.hpp"
#include "simd/amx_bf16.hpp"

namespace tael {

// All but attention is the same as with AVX-512.
void set_attention_amx_bf16(Kernels& kernels) { set_attention<AmxBF16>(kernels); }

}  // namespace tael
