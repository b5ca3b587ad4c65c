#include "kernels/table.hpp"
#include "simd/amx.hpp"

namespace tael {

// All but products is the same as with AVX-512 BF16.
void set_products_amx(Kernels& kernels) {
  kernels.name = Amx::kName;
  kernels.wide_pack = Amx::kWidePack;
  kernels.attention_partition = AttentionKernel<Amx>::partition;
  kernels.score_bounds = score_bounds<Amx>;
  set_quantized_matmul<Amx>(kernels);
}

}  // namespace tael
