// Makes a function an operator of torch's stable ABI:
//   m.impl("name", Operator<&function>::run)
// As TORCH_BOX does, but with the Tensor of torch_tensor.h; results are given away instead of copied.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_tensor.h"

namespace kdq::bindings {

// As what a type comes on the stack, and the value made of that. Handles are given away there: own() takes them over.
template <class T>
struct Passed {
  using As = T;
  static T own(const As& value) { return value; }
};

template <>
struct Passed<Tensor> {
  using As = AtenTensorHandle;
  static Tensor own(As handle) { return Tensor(handle); }
};

// torch's own conversion (2.10 to 2.13) loses a string of the heap.
template <>
struct Passed<std::string> {
  using As = StringHandle;
  static std::string own(As handle) {
    size_t length = 0;
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    const std::string value(text, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return value;
  }
};

template <class T>
struct Passed<std::optional<T>> {
  using As = std::optional<typename Passed<T>::As>;
  static std::optional<T> own(const As& value) {
    return value ? std::optional<T>(Passed<T>::own(*value)) : std::nullopt;
  }
};

template <class T>
struct Passed<std::vector<T>> {
  using As = std::vector<typename Passed<T>::As>;
  static std::vector<T> own(const As& values) {
    std::vector<T> result;
    result.reserve(values.size());
    for (const auto& value : values) result.push_back(Passed<T>::own(value));
    return result;
  }
};

template <class T>
T taken(StableIValue value) {
  return Passed<T>::own(torch::stable::detail::to<typename Passed<T>::As>(value));
}

template <auto kFunction>
struct Operator;

template <class Result, class... Args, Result (*kFunction)(Args...)>
struct Operator<kFunction> {
  static void run(StableIValue* stack, uint64_t arguments, uint64_t results) {
    if (arguments != sizeof...(Args) || results != kResults) {
      throw std::logic_error("kdq: an operator's schema has other arguments or results than its function");
    }
    run(stack, std::index_sequence_for<Args...>());
  }

 private:
  template <class T>
  struct Count : std::integral_constant<size_t, 1> {};
  template <class... Each>
  struct Count<std::tuple<Each...>> : std::integral_constant<size_t, sizeof...(Each)> {};
  static constexpr size_t kResults = std::is_void_v<Result> ? 0 : Count<Result>::value;

  template <size_t... kIndex>
  static void run(StableIValue* stack, std::index_sequence<kIndex...>) {
    const std::tuple<std::decay_t<Args>...> args{taken<std::decay_t<Args>>(stack[kIndex])...};
    try {
      if constexpr (std::is_void_v<Result>) {
        kFunction(std::get<kIndex>(args)...);
      } else {
        put(kFunction(std::get<kIndex>(args)...), stack);
      }
    } catch (const std::runtime_error&) {  // of torch's interface, which None may be the reason of
      (expect_tensor(std::get<kIndex>(args)), ...);
      throw;
    }
  }

  template <class T>
  static void expect_tensor(const T&) {}
  static void expect_tensor(const Tensor& tensor) {
    bool is_defined = false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(tensor.get(), &is_defined));
    if (!is_defined) throw std::invalid_argument("expected a tensor, got None for an argument that is not optional");
  }

  static StableIValue given(Tensor&& t) { return torch::stable::detail::from(t.release()); }
  static StableIValue given(int64_t number) { return torch::stable::detail::from(number); }

  template <class T>
  static void put(T&& result, StableIValue* stack) {
    stack[0] = given(std::forward<T>(result));
  }
  template <class... Each>
  static void put(std::tuple<Each...>&& results, StableIValue* stack) {
    std::apply([stack](Each&... each) mutable { ((*stack++ = given(std::move(each))), ...); }, results);
  }
};

}  // namespace kdq::bindings
