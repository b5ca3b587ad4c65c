// A complete block of one KV head from bf16 to the format that it stays in.
#pragma once

#include "kernels/types.hpp"

namespace tael {

// `head` is K, then V, in bf16. Plain C++, so that every instruction set stores the same bytes: it runs
// once for 32 tokens. A channel or token with a NaN or an infinity comes back as NaN.
void pack_head(KVFormat format, const uint16_t* head, int head_dim, uint8_t* out);

}  // namespace tael
