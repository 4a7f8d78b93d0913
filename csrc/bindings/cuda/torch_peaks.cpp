// torch.ops.kdq_peaks: work that measures a GPU, for Python to time. Not in torch.ops.kdq, as it is of no other use.
#include "cuda/torch_cuda.h"

namespace kdq::bindings {
namespace {

// out: float32 [blocks, kPeakThreads]. Returns how many operations that is.
int64_t arithmetic_op(const Tensor& out, int64_t loop, int64_t steps) {
  const Cuda on("out", out);
  const int64_t threads = cuda::kPeakThreads;
  const Tensor sums = expect(on, "out", out, ScalarType::Float, 2);
  if (sums.size(1) != threads) {
    invalid("out: expected " + std::to_string(threads) + " columns, got shape " + to_string(sizes_of(out)));
  }
  int64_t operations = 0;
  check(cuda::arithmetic_peak(static_cast<cuda::PeakLoop>(loop), sums.size(0), steps, mutable_data<float>(sums),
                              &operations, on.stream()));
  return operations;
}

// source: int32. Returns the xor of its elements, spread over int32 [blocks, kPeakThreads].
Tensor read_op(const Tensor& source, int64_t blocks) {
  const Cuda on("source", source);
  const Tensor words = expect(on, "source", source, ScalarType::Int);
  const Tensor out = empty(on, {blocks, cuda::kPeakThreads}, ScalarType::Int);
  check(cuda::read_peak(words.const_data_ptr(), 4 * words.numel(), blocks, mutable_data<uint32_t>(out), on.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(kdq_peaks, m) {
  m.def("arithmetic(Tensor(a!) out, int loop, int steps) -> int");
  m.def("read(Tensor source, int blocks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdq_peaks, CUDA, m) {
  m.impl("arithmetic", Operator<&arithmetic_op>::run);
  m.impl("read", Operator<&read_op>::run);
}

}  // namespace kdq::bindings
