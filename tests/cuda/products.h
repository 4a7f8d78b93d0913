// What the tests of products share: sizes and operands.
#pragma once

#include "support.h"

namespace kdq::test {

struct Size {
  int64_t m;
  int64_t n;
  int64_t k;
};

inline std::string name(const Size& s) {
  return std::to_string(s.m) + " x " + std::to_string(s.n) + " x " + std::to_string(s.k);
}

inline size_t words(int64_t rows, int64_t k) { return static_cast<size_t>(rows * binary_words(k)); }

template <class T>
std::vector<uint64_t> packed(const std::vector<T>& x, int64_t rows, int64_t k) {
  std::vector<uint64_t> bits(words(rows, k));
  require(pack_signs(dtype_of<T>(), x.data(), rows, k, bits.data(), serial_executor()));
  return bits;
}

inline std::vector<int8_t> integers(int64_t n) {
  std::vector<int8_t> values(static_cast<size_t>(n));
  for (int8_t& value : values) value = static_cast<int8_t>(generator()());
  for (size_t i = 0; i < values.size(); i += 5) values[i] = -128;
  return values;
}

inline std::vector<char> packed_weight(const std::vector<int8_t>& w, int64_t n, int64_t k) {
  size_t bytes = 0;
  require(int8_packed_bytes(n, k, &bytes));
  std::vector<char> result(bytes);
  require(pack_int8_weight(w.data(), n, k, result.data(), bytes, serial_executor()));
  return result;
}

// Arguments of the CPU's linear layers, whose result the GPU's must have.
template <class T>
Int8Linear linear_on_cpu(const Size& s, const std::vector<T>& x, const std::vector<char>& weight,
                         const std::vector<float>& scale, std::vector<T>* y) {
  Int8Linear args;
  args.dtype = dtype_of<T>();
  args.x = x.data();
  args.y = y->data();
  args.m = s.m;
  args.k = s.k;
  args.packed = weight.data();
  args.packed_bytes = weight.size();
  args.weight_scale = scale.data();
  return args;
}

}  // namespace kdq::test
