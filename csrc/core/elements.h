// bfloat16 and float16 in memory: 16 bits with a type, so that overloads and templates can tell them apart.
#pragma once

#include <cstdint>

namespace kdq {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace kdq
