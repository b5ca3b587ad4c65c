// Which instruction sets have matrix products in tiles, of bf16 and of int8. See amx.hpp.
#pragma once

namespace tael {

template <class S>
concept HasTiles = requires { typename S::template Tiles<32>; };
template <class S>
concept HasByteTiles = requires { typename S::template ByteTiles<32>; };

}  // namespace tael
