// Chooses the kernels for the CPU at hand.
#pragma once

#include <string>
#include <vector>

#include "kernels/types.hpp"

namespace tael {

// Names of the instruction sets that this build has and this CPU runs, best first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument for a name that is not in supported_isas().
const Kernels& kernels_for(const std::string& isa);

}  // namespace tael
