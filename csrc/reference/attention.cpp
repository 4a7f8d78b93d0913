// The specification of attention, one element at a time, as include/kdq/attention.h writes it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/attention_kernels.h"
#include "reference/scalar.h"

namespace kdq {
namespace {

using reference::load;
using reference::store;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Loops {
  static int64_t scratch_floats(const Attention& args) { return args.keys; }

  template <class T>
  static void run(const HeadQueries& job, float* weights) {
    for (int64_t i = job.first; i < job.first + job.count; ++i) row<T>(job, i, weights);
  }

 private:
  template <class T>
  static void row(const HeadQueries& job, int64_t query, float* weights) {
    const Attention& args = *job.args;
    const int64_t keys = args.causal ? std::min(args.keys, query + 1) : args.keys;
    const T* q = static_cast<const T*>(job.q) + query * args.q_strides.row;
    float largest = -kInfinity;
    for (int64_t key = 0; key < keys; ++key) {
      const T* k = static_cast<const T*>(job.k) + key * args.k_strides.row;
      float score = 0.0F;
      for (int64_t d = 0; d < args.head_size; ++d) score += load(q + d) * args.scale * load(k + d);
      weights[key] = masked(job, query, key, score);
      largest = weights[key] > largest ? weights[key] : largest;
    }
    if (largest == -kInfinity) largest = 0.0F;  // no key takes part, all weights are 0
    float sum = 0.0F;
    for (int64_t key = 0; key < keys; ++key) {
      weights[key] = std::exp(weights[key] - largest);
      sum += weights[key];
    }
    T* y = static_cast<T*>(job.y) + query * args.y_strides.row;
    for (int64_t c = 0; c < args.value_size; ++c) {
      float total = 0.0F;
      for (int64_t key = 0; key < keys; ++key) {
        total += weights[key] * load(static_cast<const T*>(job.v) + key * args.v_strides.row + c);
      }
      store(y + c, sum == 0.0F ? 0.0F : total / sum);
    }
  }

  static float masked(const HeadQueries& job, int64_t query, int64_t key, float score) {
    const int64_t at = query * job.args->mask_strides.row + key;
    if (job.args->mask_kind == MaskKind::kFloat32) return score + static_cast<const float*>(job.mask)[at];
    if (job.args->mask_kind == MaskKind::kBool) return static_cast<const char*>(job.mask)[at] != 0 ? score : -kInfinity;
    return score;
  }
};

}  // namespace

const AttentionKernels kAttentionReference = make_attention_kernels<Loops>();

}  // namespace kdq
