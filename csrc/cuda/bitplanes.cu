// The public functions of bit planes on a GPU.
#include "cuda/bitplanes.h"

#include "cuda/launch.h"

namespace kdq::cuda {

Status pack_bitplanes(const void* q, int64_t rows, int64_t k, int bits, PlaneForm form, uint64_t* planes,
                      Stream stream) {
  return launch_pack_bitplanes(StreamLauncher(stream), q, rows, k, bits, form, planes);
}

Status unpack_bitplanes(const uint64_t* planes, int64_t rows, int64_t k, int bits, PlaneForm form, void* q,
                        Stream stream) {
  return launch_unpack_bitplanes(StreamLauncher(stream), planes, rows, k, bits, form, q);
}

size_t bitplane_matmul_workspace(int64_t m, int64_t n) { return plane_matmul_workspace_bytes(m, n); }

Status bitplane_matmul(const PlaneMatrix& a, const PlaneMatrix& b, int64_t k, int32_t* out, void* workspace,
                       Stream stream) {
  return launch_bitplane_matmul(StreamLauncher(stream), a, b, k, out, workspace);
}

size_t bitplane_linear_workspace(int64_t m, int64_t k, int32_t input_quant_max) {
  return plane_linear_workspace_bytes(m, k, planes_of(input_quant_max));
}

Status bitplane_linear(const BitplaneLinear& args, Stream stream) {
  return launch_bitplane_linear(StreamLauncher(stream), args);
}

}  // namespace kdq::cuda
