// Where an operator runs: on the GPU of the tensor it is made from. Results come from torch's allocator, kernels go on
// the stream that torch has as current for that GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "kdq/cuda.h"
#include "torch_common.h"

// Of libtorch_cuda's C shim, whose header shows it only to those who compile against the CUDA toolkit.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace kdq::bindings {

class Cuda {
 public:
  // The dispatcher comes here if any tensor is on a GPU.
  Cuda(const char* name, const Tensor& t) : name_(name), device_(device_of(name, t)), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cuda::Stream>(stream);
  }

  bool has(const Tensor& t) const { return t.is_cuda() && t.get_device_index() == device_; }
  std::string kind() const { return "a tensor on cuda:" + std::to_string(device_) + ", like " + name_; }

  Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType type) const {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    shim_dtype(type), aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }

  // Lives until the operator returns: what the kernels still do with it comes before whatever gets its memory next, as
  // that is on the same stream.
  Tensor workspace(size_t bytes) const { return empty(*this, {static_cast<int64_t>(bytes)}, ScalarType::Byte); }
  cuda::Stream stream() const { return stream_; }

  template <class... Args>
  Status fake_quantize(const Args&... args) const {
    return cuda::fake_quantize(args..., stream_);
  }
  Status fake_quantize_backward(DType dtype, const void* grad_y, const void* x, void* grad_x, float* grad_scale,
                                float* grad_zero_point, const QuantShape& shape, const QuantGrid& grid) const {
    const Tensor scratch = workspace(cuda::fake_quantize_backward_workspace(shape));
    return cuda::fake_quantize_backward(dtype, grad_y, x, grad_x, grad_scale, grad_zero_point, shape, grid,
                                        scratch.mutable_data_ptr(), stream_);
  }
  template <class... Args>
  Status quantize(const Args&... args) const {
    return cuda::quantize(args..., stream_);
  }
  template <class... Args>
  Status dequantize(const Args&... args) const {
    return cuda::dequantize(args..., stream_);
  }
  template <class... Args>
  Status quantize_rows(const Args&... args) const {
    return cuda::quantize_rows(args..., stream_);
  }
  template <class... Args>
  Status fake_quantize_rows(const Args&... args) const {
    return cuda::fake_quantize_rows(args..., stream_);
  }
  template <class... Args>
  Status binarize_rows(const Args&... args) const {
    return cuda::binarize_rows(args..., stream_);
  }
  template <class... Args>
  Status binarize_rows_backward(const Args&... args) const {
    return cuda::binarize_rows_backward(args..., stream_);
  }
  template <class... Args>
  Status scaled_signs_backward(const Args&... args) const {
    return cuda::scaled_signs_backward(args..., stream_);
  }

  template <class... Args>
  Status pack_signs(const Args&... args) const {
    return cuda::pack_signs(args..., stream_);
  }
  template <class... Args>
  Status unpack_signs(const Args&... args) const {
    return cuda::unpack_signs(args..., stream_);
  }
  template <class... Args>
  Status binary_matmul(const Args&... args) const {
    return cuda::binary_matmul(args..., stream_);
  }
  Status binary_linear(const BinaryLinear& args) const {
    const Tensor scratch = workspace(args.x_bits == nullptr ? cuda::binary_layer_workspace(args.m, args.k) : 0);
    return cuda::binary_linear(args, scratch.mutable_data_ptr(), stream_);
  }
  Status binary_threshold(const BinaryThreshold& args) const {
    const Tensor scratch = workspace(args.x_bits == nullptr ? cuda::binary_layer_workspace(args.m, args.k) : 0);
    return cuda::binary_threshold(args, scratch.mutable_data_ptr(), stream_);
  }

  template <class... Args>
  Status transpose_images(const Args&... args) const {
    return cuda::transpose_images(args..., stream_);
  }
  Status binary_conv2d(const BinaryConv2d& args) const {
    const Tensor scratch = workspace(cuda::binary_conv2d_workspace(args.shape, args.layer.n));
    return cuda::binary_conv2d(args, scratch.mutable_data_ptr(), stream_);
  }

  template <class... Args>
  Status pack_indices(const Args&... args) const {
    return cuda::pack_indices(args..., stream_);
  }
  template <class... Args>
  Status unpack_indices(const Args&... args) const {
    return cuda::unpack_indices(args..., stream_);
  }
  Status codebook_linear(const CodebookLinear& args) const { return cuda::codebook_linear(args, stream_); }

  Status distillation_loss(const DistillationLoss& args, DistillationRow* statistics, float* loss) const {
    const Tensor row_losses = workspace(static_cast<size_t>(args.rows) * sizeof(double));
    const Tensor kept = workspace(sizeof(float));
    return cuda::distillation_loss(args, statistics, mutable_data<double>(row_losses), loss, mutable_data<float>(kept),
                                   stream_);
  }
  // grad_loss: one element.
  Status distillation_loss_backward(const DistillationLoss& args, const DistillationRow* statistics,
                                    const float* grad_loss, void* grad_student) const {
    const Tensor kept = workspace(sizeof(float));
    const Status status = cuda::distillation_kept(args.target, args.rows, mutable_data<float>(kept), stream_);
    if (!status.ok()) return status;
    return cuda::distillation_loss_backward(args, statistics, data<float>(kept), grad_loss, grad_student, stream_);
  }

 private:
  static int32_t device_of(const char* name, const Tensor& t) {
    if (!t.is_cuda()) {
      invalid(std::string(name) + ": expected all tensors on one GPU, but it is on none");
    }
    return t.get_device_index();
  }

  const char* name_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace kdq::bindings
