#include "kernels/table.hpp"
#include "simd/portable.hpp"

namespace tael {

Kernels kernels_portable() { return make_kernels<Portable>(); }

}  // namespace tael
