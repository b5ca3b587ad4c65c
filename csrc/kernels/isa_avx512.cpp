#include "kernels/table.hpp"
#include "simd/avx512.hpp"

namespace tael {

Kernels kernels_avx512() { return make_kernels<Avx512>(); }

}  // namespace tael
