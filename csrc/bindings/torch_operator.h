// Makes a function an operator of torch's stable ABI:
//   m.impl("name", Operator<&function>::run)
// As TORCH_BOX does, but for the Tensor of torch_tensor.h, whose results are given away instead of copied.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_tensor.h"

namespace kdq::bindings {

// From what is on the stack, which gives its handles away.
template <class T>
struct Argument {
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};

template <>
struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(Argument<AtenTensorHandle>::take(value)); }
};

template <>
struct Argument<OptionalTensor> {
  static OptionalTensor take(StableIValue value) {
    const auto handle = Argument<std::optional<AtenTensorHandle>>::take(value);
    return handle ? OptionalTensor(*handle) : std::nullopt;
  }
};

template <>
struct Argument<std::vector<Tensor>> {
  static std::vector<Tensor> take(StableIValue value) {
    const auto handles = Argument<std::vector<AtenTensorHandle>>::take(value);
    return {handles.begin(), handles.end()};
  }
};

template <>
struct Argument<std::vector<OptionalTensor>> {
  static std::vector<OptionalTensor> take(StableIValue value) {
    std::vector<OptionalTensor> tensors;
    for (const auto& handle : Argument<std::vector<std::optional<AtenTensorHandle>>>::take(value)) {
      tensors.push_back(handle ? OptionalTensor(*handle) : std::nullopt);
    }
    return tensors;
  }
};

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
    const std::tuple<std::decay_t<Args>...> args{Argument<std::decay_t<Args>>::take(stack[kIndex])...};
    if constexpr (std::is_void_v<Result>) {
      kFunction(std::get<kIndex>(args)...);
    } else {
      put(kFunction(std::get<kIndex>(args)...), stack);
    }
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
