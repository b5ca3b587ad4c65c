// What the machine can do at most: the lines that speeds are compared with.
#pragma once

#include <cstdint>
#include <optional>

namespace tael {

// Bytes a second of threads that each read their share of num_bytes in order. num_bytes must be
// many times the last level of cache.
double read_bytes_per_s(int num_threads, int64_t num_bytes);

// Operations (two for each multiply-add) a second of the products of int8 and of bf16 on registers, in tiles where
// the CPU has these; nothing where the CPU has no such instruction.
std::optional<double> int8_ops_per_s(int num_threads);
std::optional<double> bf16_flops_per_s(int num_threads);

}  // namespace tael
