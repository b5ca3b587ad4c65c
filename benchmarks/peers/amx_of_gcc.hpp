// Included before every file of llama.cpp. GCC before 14 does not know that these two read memory and drops the
// stores before them: llama.cpp built by it dies of an illegal instruction where the CPU has AMX.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 14
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)) : "memory")
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) _tile_loadd_of(tile, base, stride)
#define _tile_loadd_of(tile, base, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void*)(base)), "r"((long)(stride)) : "memory")
#endif
