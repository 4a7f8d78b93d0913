// Floats in error messages: as short as they can be told apart, 1e-45 as "1e-45".
#pragma once

#include <cstdio>
#include <string>

namespace kdq {

inline std::string format(float value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", static_cast<double>(value));
  return text;
}

}  // namespace kdq
