#include "kernels/dispatch.hpp"

#include <stdexcept>

#include "common/amx.hpp"

namespace tael {

Kernels kernels_portable();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
void set_attention_avx512_bf16(Kernels& kernels);
void set_products_amx(Kernels& kernels);
#endif

namespace {

// Each set is gated on every extension that its object file is compiled with.
std::vector<Kernels> detect() {
  std::vector<Kernels> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    if (__builtin_cpu_supports("avx512bf16") && has_tiles()) {
      found.push_back(kernels_avx512());
      set_attention_avx512_bf16(found.back());
      set_products_amx(found.back());
    }
    if (__builtin_cpu_supports("avx512bf16")) {
      found.push_back(kernels_avx512());
      set_attention_avx512_bf16(found.back());
    }
    found.push_back(kernels_avx512());
  }
  if (avx2) found.push_back(kernels_avx2());
#endif
  found.push_back(kernels_portable());
  return found;
}

const std::vector<Kernels>& tables() {
  static const std::vector<Kernels> found = detect();
  return found;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels& k : tables()) names.emplace_back(k.name);
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  for (const Kernels& k : tables())
    if (isa == k.name) return k;
  throw std::invalid_argument("no kernels for instruction set " + isa);
}

}  // namespace tael
