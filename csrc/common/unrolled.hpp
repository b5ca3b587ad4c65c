// A loop whose index is a constant in each round.
#pragma once

#include <utility>

namespace tael {

template <class Fn, int... i> inline __attribute__((always_inline)) void unrolled(
    Fn fn, std::integer_sequence<int, i...>) {
  (fn(std::integral_constant<int, i>{}), ...);
}

}  // namespace tael
