// The arithmetic of bit planes that does not look at the bits: see kdq/bitplanes.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "core/checks.h"
#include "kdq/bitplanes.h"

namespace kdq {

// Integers are factor * code + offset, codes 0 ... top.
struct PlaneCodes {
  int top;
  int factor;
  int offset;

  PlaneCodes(int bits, PlaneForm form)
      : top((1 << bits) - 1),
        factor(form == PlaneForm::kOdd ? -2 : 1),
        offset(form == PlaneForm::kOdd      ? top
               : form == PlaneForm::kSigned ? -(1 << (bits - 1))
                                            : 0) {}

  int integer(int code) const { return factor * code + offset; }
  int64_t largest() const { return std::max(std::abs(integer(0)), std::abs(integer(top))); }
  int64_t sum_factor() const { return factor * top + 2 * offset; }  // e of the header
};

// The factors of twice a product of K integers; what wraps modulo 2^32 is meant to.
struct PlaneFactors {
  int32_t row_sum;
  int32_t column_sum;
  int32_t count;
  int32_t constant;

  PlaneFactors(const PlaneCodes& a, const PlaneCodes& b, int64_t k)
      : row_sum(static_cast<int32_t>(b.sum_factor())),
        column_sum(static_cast<int32_t>(a.sum_factor())),
        count(a.factor * b.factor),
        constant(static_cast<int32_t>(static_cast<uint32_t>(
            -k * (b.sum_factor() * a.offset + a.sum_factor() * b.offset - 2 * int64_t{a.offset} * b.offset)))) {}

  int32_t row_term(int64_t sum) const {
    return static_cast<int32_t>(static_cast<uint32_t>(row_sum * sum) + static_cast<uint32_t>(constant));
  }
};

// The planes of unsigned integers up to quant_max.
inline int planes_of(int32_t quant_max) {
  int bits = 1;
  while (quant_max >> bits != 0) ++bits;
  return bits;
}

inline Status check_plane_count(const char* name, int64_t bits, PlaneForm form) {
  const int64_t most = form == PlaneForm::kOdd ? kMostOddBits : kMostPlaneBits;
  if (bits >= 1 && bits <= most) return {};
  return Status::invalid(std::string(name) + ": expected 1 to " + std::to_string(most) + " bits" +
                         (form == PlaneForm::kOdd ? " of odd integers" : "") + ", got " + std::to_string(bits));
}

// Twice a product of k integers each fits int32.
inline Status check_plane_sums(const PlaneCodes& a, const PlaneCodes& b, int64_t k) {
  const int64_t most = INT32_MAX / (2 * a.largest() * b.largest());
  if (k <= most) return {};
  return Status::invalid("k: " + std::to_string(k) + " would overflow int32 sums of integers up to " +
                         std::to_string(a.largest()) + " and " + std::to_string(b.largest()) + "; expected at most " +
                         std::to_string(most));
}

}  // namespace kdq
