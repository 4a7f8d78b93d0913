// A tensor of torch's stable ABI, for as long as an operator runs.
//
// torch::stable::Tensor allocates a count of those who share its handle, for each argument of each call, and counts
// atomically. Here they stand in a ring, linked through each other: a few locals of one thread. That takes a twelfth
// off the call of a small layer.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace kdq::bindings {

using torch::headeronly::ScalarType;

// As torch::stable::Tensor, for one thread. Copies are the same tensor; without a handle it is none.
class Tensor {
 public:
  Tensor() = default;
  // Takes the handle over.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(const Tensor& other) { join(other); }
  Tensor& operator=(const Tensor& other) {
    if (this == &other) return *this;
    leave();
    join(other);
    return *this;
  }
  ~Tensor() { leave(); }

  AtenTensorHandle get() const { return handle_; }

  AtenTensorHandle new_handle() const {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return handle;
  }

  // Gives the handle away, or, if others share it, a new one.
  AtenTensorHandle release() { return next_ == this ? std::exchange(handle_, nullptr) : new_handle(); }

  int64_t dim() const {
    int64_t dim = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim));
    return dim;
  }
  int64_t numel() const {
    int64_t numel = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle_, &numel));
    return numel;
  }
  int64_t size(int64_t axis) const {
    int64_t size = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(handle_, axis, &size));
    return size;
  }
  int64_t stride(int64_t axis) const {
    int64_t stride = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_stride(handle_, axis, &stride));
    return stride;
  }
  // dim() numbers, as long as the tensor lives.
  const int64_t* sizes() const {
    int64_t* sizes = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes));
    return sizes;
  }
  const int64_t* strides() const {
    int64_t* strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    return strides;
  }
  bool is_contiguous() const {
    bool is_contiguous = false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &is_contiguous));
    return is_contiguous;
  }

  int32_t shim_dtype() const {
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }
  // Asks torch for the number of one dtype after another: for results and errors.
  ScalarType scalar_type() const {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(shim_dtype()));
  }

  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type() == aoti_torch_device_type_cuda(); }
  int32_t get_device_index() const {
    int32_t index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &index));
    return index;
  }

  const void* const_data_ptr() const {
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }

 private:
  int32_t device_type() const {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &type));
    return type;
  }

  void join(const Tensor& other) {
    handle_ = other.handle_;
    next_ = std::exchange(other.next_, this);
  }
  void leave() {
    if (next_ == this) {
      if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);  // which has nothing to fail at
      return;
    }
    const Tensor* before = next_;
    while (before->next_ != this) before = before->next_;
    before->next_ = std::exchange(next_, this);
  }

  AtenTensorHandle handle_ = nullptr;
  mutable const Tensor* next_ = this;  // in the ring
};

using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// What torch's own operators take.
inline torch::stable::Tensor shared(const Tensor& t) { return torch::stable::Tensor(t.new_handle()); }

inline Tensor contiguous(const Tensor& t) {
  const torch::stable::Tensor result = torch::stable::contiguous(shared(t));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(result.get(), &handle));
  return Tensor(handle);
}

inline void copy(const Tensor& from, const Tensor& to) {
  torch::stable::Tensor target = shared(to);
  torch::stable::copy_(target, shared(from));
}

}  // namespace kdq::bindings
