#include "kernels/table.hpp"
#include "simd/avx512_bf16.hpp"

namespace tael {

// All but attention is the same as without bf16.
void set_attention_avx512_bf16(Kernels& kernels) { set_attention<Avx512BF16>(kernels); }

}  // namespace tael
