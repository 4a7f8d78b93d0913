// Where an operator runs: on the CPU. Results on large pages, kernels on torch's thread pool.
#pragma once

#include "kdq/attention.h"
#include "kdq/binary_gemm.h"
#include "kdq/codebook.h"
#include "kdq/conv2d.h"
#include "kdq/distillation.h"
#include "kdq/fake_quant.h"
#include "kdq/parallel.h"
#include "torch_common.h"

namespace kdq::bindings {

// torch's own pool: torch.set_num_threads holds, and nothing is oversubscribed.
inline const ParallelFor& torch_executor() {
  static const ParallelFor executor = {[](void*, int64_t n, int64_t grain, ParallelFor::Body body, void* arg) {
                                         torch::stable::parallel_for(
                                             0, n, grain, [&](int64_t begin, int64_t end) { body(arg, begin, end); });
                                       },
                                       nullptr};
  return executor;
}

// True: *handle is an uninitialised CPU tensor of that many bytes, on 2 MiB pages. With pages of 4 KiB, the page faults
// of a fresh result take several times as long as computing it: 1.3 ms for 4 MiB on a virtual machine, against 0.1 ms.
// Up to 256 MiB of freed results are kept for the next ones, which then fault not at all. False: it is too small for
// that to pay, or torch (2.10) has no way to do it. In torch_memory.cpp.
bool allocate_large(const Sizes& sizes, const Sizes& strides, int32_t dtype, size_t bytes, AtenTensorHandle* handle);

class Cpu {
 public:
  // The dispatcher has seen to it that all tensors are on the CPU.
  Cpu(const char* name, const Tensor&) : name_(name) {}

  static bool has(const Tensor& t) { return t.is_cpu(); }
  std::string kind() const { return std::string("a CPU tensor, like ") + name_; }

  // Through the C shim, which torch::stable::empty does not use: it looks the operator up by name, which costs as much
  // as a small layer's kernel.
  static Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType type) {
    AtenTensorHandle handle = nullptr;
    const size_t bytes = static_cast<size_t>(product(sizes, 0, sizes.size())) * element_size(type);
    if (allocate_large(sizes, strides, shim_dtype(type), bytes, &handle)) return Tensor(handle);
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    shim_dtype(type), aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

  template <class... Args>
  static Status fake_quantize(const Args&... args) {
    return kdq::fake_quantize(args..., torch_executor());
  }
  template <class... Args>
  static Status fake_quantize_backward(const Args&... args) {
    return kdq::fake_quantize_backward(args..., torch_executor());
  }
  template <class... Args>
  static Status quantize(const Args&... args) {
    return kdq::quantize(args..., torch_executor());
  }
  template <class... Args>
  static Status dequantize(const Args&... args) {
    return kdq::dequantize(args..., torch_executor());
  }
  template <class... Args>
  static Status quantize_rows(const Args&... args) {
    return kdq::quantize_rows(args..., torch_executor());
  }
  template <class... Args>
  static Status fake_quantize_rows(const Args&... args) {
    return kdq::fake_quantize_rows(args..., torch_executor());
  }
  template <class... Args>
  static Status binarize_rows(const Args&... args) {
    return kdq::binarize_rows(args..., torch_executor());
  }
  template <class... Args>
  static Status binarize_rows_backward(const Args&... args) {
    return kdq::binarize_rows_backward(args..., torch_executor());
  }
  template <class... Args>
  static Status scaled_signs_backward(const Args&... args) {
    return kdq::scaled_signs_backward(args..., torch_executor());
  }

  template <class... Args>
  static Status pack_signs(const Args&... args) {
    return kdq::pack_signs(args..., torch_executor());
  }
  template <class... Args>
  static Status unpack_signs(const Args&... args) {
    return kdq::unpack_signs(args..., torch_executor());
  }
  template <class... Args>
  static Status binary_matmul(const Args&... args) {
    return kdq::binary_matmul(args..., torch_executor());
  }
  static Status binary_linear(const BinaryLinear& args) { return kdq::binary_linear(args, torch_executor()); }
  static Status binary_threshold(const BinaryThreshold& args) { return kdq::binary_threshold(args, torch_executor()); }
  template <class... Args>
  static Status transpose_images(const Args&... args) {
    return kdq::transpose_images(args..., torch_executor());
  }
  static Status binary_conv2d(const BinaryConv2d& args) { return kdq::binary_conv2d(args, torch_executor()); }

  template <class... Args>
  static Status pack_indices(const Args&... args) {
    return kdq::pack_indices(args..., torch_executor());
  }
  template <class... Args>
  static Status unpack_indices(const Args&... args) {
    return kdq::unpack_indices(args..., torch_executor());
  }
  static Status codebook_linear(const CodebookLinear& args) { return kdq::codebook_linear(args, torch_executor()); }

  static Status scaled_dot_product_attention(const Attention& args) {
    return kdq::scaled_dot_product_attention(args, torch_executor());
  }

  static Status distillation_loss(const DistillationLoss& args, DistillationRow* statistics, float* loss) {
    return kdq::distillation_loss(args, statistics, loss, torch_executor());
  }
  // grad_loss: one element.
  static Status distillation_loss_backward(const DistillationLoss& args, const DistillationRow* statistics,
                                           const float* grad_loss, void* grad_student) {
    return kdq::distillation_loss_backward(args, statistics, *grad_loss, grad_student, torch_executor());
  }

 private:
  const char* name_;
};

}  // namespace kdq::bindings
