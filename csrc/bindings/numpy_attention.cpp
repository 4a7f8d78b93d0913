// kdq_kernels._C: attention on NumPy arrays. See numpy.cpp.
#include "numpy_attention.h"

#include <pybind11/stl.h>

#include "kdq/attention.h"
#include "numpy_common.h"

namespace kdq::bindings {
namespace {

// Of a C-contiguous array [batch, heads, rows, columns].
AttentionStrides strides_of(const py::array& a) {
  return {a.shape(1) * a.shape(2) * a.shape(3), a.shape(2) * a.shape(3), a.shape(3)};
}

py::array expect_heads(const char* name, const py::array& a, const py::dtype& dtype, const Sizes& sizes) {
  if (!a.dtype().equal(dtype) || sizes_of(a) != sizes) {
    invalid(std::string(name) + ": expected dtype " + std::string(py::str(py::object(dtype))) + " and shape " +
            to_string(sizes) + ", got " + dtype_name(a) + " " + to_string(sizes_of(a)));
  }
  return dense(a);
}

int64_t axis_of(const char* name, const py::array& a, int axis) {
  if (a.ndim() != 4) invalid(std::string(name) + ": expected 4 axes, got shape " + to_string(sizes_of(a)));
  return a.shape(axis);
}

py::array attention_array(const py::array& q_in, const py::array& k_in, const py::array& v_in,
                          const std::optional<py::array>& mask_in, bool is_causal, float scale) {
  Attention args;
  args.dtype = float_dtype("query", q_in);
  args.batch = axis_of("query", q_in, 0);
  args.heads = q_in.shape(1);
  args.queries = q_in.shape(2);
  args.head_size = q_in.shape(3);
  args.kv_heads = axis_of("key", k_in, 1);
  args.keys = k_in.shape(2);
  args.value_size = axis_of("value", v_in, 3);
  const py::array q = dense(q_in);
  const py::array k = expect_heads("key", k_in, q.dtype(), {args.batch, args.kv_heads, args.keys, args.head_size});
  const py::array v = expect_heads("value", v_in, q.dtype(), {args.batch, args.kv_heads, args.keys, args.value_size});
  py::array mask;
  if (mask_in) {
    const bool is_bool = has_dtype<bool>(*mask_in);
    if (!is_bool && !has_dtype<float>(*mask_in)) {
      invalid("attn_mask: expected dtype bool or float32, got " + dtype_name(*mask_in));
    }
    mask = expect_heads("attn_mask", *mask_in, mask_in->dtype(), {args.batch, args.heads, args.queries, args.keys});
    args.mask_kind = is_bool ? MaskKind::kBool : MaskKind::kFloat32;
    args.mask = mask.data();
    args.mask_strides = strides_of(mask);
  }
  args.causal = is_causal;
  args.scale = scale;
  py::array y = empty(q.dtype(), {args.batch, args.heads, args.queries, args.value_size});
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.y = y.mutable_data();
  args.q_strides = strides_of(q);
  args.k_strides = strides_of(k);
  args.v_strides = strides_of(v);
  args.y_strides = strides_of(y);
  run([&] { return scaled_dot_product_attention(args, default_executor()); });
  return y;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("scaled_dot_product_attention", &attention_array, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("attn_mask"), py::arg("is_causal"), py::arg("scale"));
}

}  // namespace kdq::bindings
