#include "kernels/dispatch.hpp"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>

namespace tael {

Kernels kernels_portable();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
void set_attention_avx512_bf16(Kernels& kernels);
void set_products_amx(Kernels& kernels);
#endif

namespace {

#if defined(__x86_64__)
// Linux gives a process the state of the tiles when it asks (Documentation/arch/x86/xstate.rst), for all of its threads.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

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
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
        __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") && may_use_tiles()) {
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
