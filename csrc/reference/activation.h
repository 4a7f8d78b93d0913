// The activation functions of the reference kernels' linear layers.
#pragma once

#include <cmath>

#include "kdq/types.h"

namespace kdq::reference {

inline float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return y;
    case Activation::kRelu:
      return y < 0.0F ? 0.0F : y;
    case Activation::kGelu:
      return static_cast<float>(0.5 * y * std::erfc(-y * M_SQRT1_2));
    case Activation::kSilu:
      return static_cast<float>(y / (1.0 + std::exp(-static_cast<double>(y))));
  }
  return y;
}

}  // namespace kdq::reference
