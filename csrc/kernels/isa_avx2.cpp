#include "kernels/table.hpp"
#include "simd/avx2.hpp"

namespace tael {

Kernels kernels_avx2() { return make_kernels<Avx2>(); }

}  // namespace tael
