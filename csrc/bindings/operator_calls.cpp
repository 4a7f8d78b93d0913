// kdq_kernels._calls: a short way from Python into torch's dispatcher, for operators whose kernel may take less time
// than the call.
//
// torch.ops.kdq.*.default(...) goes through TorchScript's general front: every call looks up Python attributes, copies
// the schema's types and matches arguments against them. bind() reads a schema once instead; a call of what it returns
// puts arguments of the exact types on the stack and hands it to the dispatcher, which autograd, functorch, dispatch
// modes, tracing and the profiler hook into as ever. Whatever is not plain goes to the operator's own front: subclasses
// of Tensor, __torch_function__ modes, symbolic numbers, too few or wrong arguments. So there is nothing that this can
// do otherwise, only faster.
//
// torch's stable ABI has no Python objects, so this one file is compiled against the torch that is installed;
// kdq_kernels/_torch_library/calls.py loads it only into that version, KDQ_TORCH_CALLS_VERSION.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using c10::IValue;
using c10::TypeKind;

// The type of an argument, as far as values of it are read here.
struct ArgumentType {
  explicit ArgumentType(c10::TypePtr type) {
    if (const auto optional = type->cast<c10::OptionalType>()) {
      takes_none = true;
      type = optional->getElementType();
    }
    kind = type->kind();
    if (const auto list = type->cast<c10::ListType>()) {
      element_type = list->getElementType();
      element.emplace_back(element_type);
    }
  }

  TypeKind kind;
  bool takes_none = false;
  c10::TypePtr element_type;          // of a list
  std::vector<ArgumentType> element;  // one, of a list
};

struct Argument {
  ArgumentType type;
  std::optional<IValue> default_value;
};

struct Operator {
  c10::OperatorHandle handle;
  pybind11::object overload;  // torch's own front
  std::vector<Argument> arguments;
};

bool read(PyObject* value, const ArgumentType& type, IValue* result);

bool read_list(PyObject* value, const ArgumentType& type, IValue* result) {
  if (!PyList_CheckExact(value) && !PyTuple_CheckExact(value)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
  PyObject** items = PySequence_Fast_ITEMS(value);
  c10::impl::GenericList list(type.element_type);
  list.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    IValue item;
    if (!read(items[i], type.element.front(), &item)) return false;
    list.push_back(std::move(item));
  }
  *result = std::move(list);
  return true;
}

// False for a value that torch's own front has to look at.
bool read(PyObject* value, const ArgumentType& type, IValue* result) {
  if (type.takes_none && value == Py_None) {
    *result = IValue();
    return true;
  }
  switch (type.kind) {
    case TypeKind::TensorType:
      if (!THPVariable_CheckExact(value)) return false;
      *result = THPVariable_Unpack(value);
      return true;
    case TypeKind::IntType: {
      if (!PyLong_CheckExact(value)) return false;
      int overflow = 0;
      const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
      *result = static_cast<int64_t>(number);
      return overflow == 0;
    }
    case TypeKind::FloatType:
      if (!PyFloat_CheckExact(value)) return false;
      *result = PyFloat_AS_DOUBLE(value);
      return true;
    case TypeKind::BoolType:
      if (!PyBool_Check(value)) return false;
      *result = value == Py_True;
      return true;
    case TypeKind::StringType: {
      if (!PyUnicode_CheckExact(value)) return false;
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(value, &size);
      if (text == nullptr) {
        PyErr_Clear();
        return false;
      }
      *result = std::string(text, static_cast<size_t>(size));
      return true;
    }
    case TypeKind::ListType:
      return read_list(value, type, result);
    default:
      return false;
  }
}

// False where the arguments are not plain; the stack is then in any state.
bool read_arguments(const Operator& op, PyObject* const* values, size_t count, torch::jit::Stack* stack) {
  if (count > op.arguments.size()) return false;
  stack->reserve(op.arguments.size());
  for (size_t i = 0; i < op.arguments.size(); ++i) {
    const Argument& argument = op.arguments[i];
    if (i < count) {
      if (!read(values[i], argument.type, &stack->emplace_back())) return false;
    } else {
      if (!argument.default_value) return false;
      stack->push_back(*argument.default_value);
    }
  }
  return true;
}

// The kernel drops the arguments from the stack. A copy of them, made and gone while Python's lock is held, saves
// taking that lock for each, as the last reference from C++ to a tensor that Python has does.
void run(const Operator& op, torch::jit::Stack* stack) {
  const c10::SmallVector<IValue, 16> arguments(stack->begin(), stack->end());
  const pybind11::gil_scoped_release no_gil;
  op.handle.callBoxed(stack);
}

// In a handler: sets Python's error as torch's own front does, a function of pybind11 that knows torch's exceptions
// too.
void translate_exception() {
  const auto error = std::current_exception();
  try {
    throw;
  } catch (const c10::Error&) {
    torch::translate_exception_to_python(error);
  } catch (const torch::PyTorchError&) {
    torch::translate_exception_to_python(error);
  } catch (const python_error&) {
    torch::translate_exception_to_python(error);
  } catch (...) {
    pybind11::detail::translate_exception(error);
  }
}

Operator* operator_of(PyObject* capsule) { return static_cast<Operator*>(PyCapsule_GetPointer(capsule, nullptr)); }

PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  const Operator& op = *operator_of(self);
  try {
    torch::jit::Stack stack;
    if (!at::impl::torch_function_mode_enabled() && read_arguments(op, values, static_cast<size_t>(count), &stack)) {
      run(op, &stack);
      return THPVariable_Wrap(std::move(stack.back()).toTensor());
    }
  } catch (...) {
    translate_exception();
    return nullptr;
  }
  return PyObject_Vectorcall(op.overload.ptr(), values, static_cast<size_t>(count), nullptr);
}

PyMethodDef call_definition = {"operator", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                               METH_FASTCALL, "Calls an operator; by position only."};

Argument argument_of(const c10::Argument& argument) {
  TORCH_CHECK(!argument.kwarg_only(), argument.name(), ": expected no argument by keyword alone");
  return {ArgumentType(argument.type()), argument.default_value()};
}

PyObject* bind(PyObject*, PyObject* given) {
  PyObject* overload = nullptr;
  const char* name = nullptr;
  if (!PyArg_ParseTuple(given, "Os", &overload, &name)) return nullptr;
  try {
    const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    const c10::FunctionSchema& schema = handle.schema();
    TORCH_CHECK(schema.returns().size() == 1 && schema.returns()[0].type()->kind() == TypeKind::TensorType, name,
                ": expected one tensor as result, got ", schema);
    auto op =
        std::make_unique<Operator>(Operator{handle, pybind11::reinterpret_borrow<pybind11::object>(overload), {}});
    for (const c10::Argument& argument : schema.arguments()) op->arguments.push_back(argument_of(argument));
    const auto destroy = [](PyObject* capsule) { delete operator_of(capsule); };
    const auto capsule = pybind11::reinterpret_steal<pybind11::object>(PyCapsule_New(op.get(), nullptr, destroy));
    if (!capsule) return nullptr;
    op.release();
    return PyCFunction_New(&call_definition, capsule.ptr());
  } catch (...) {
    translate_exception();
    return nullptr;
  }
}

PyMethodDef functions[] = {
    {"bind", bind, METH_VARARGS,
     "bind(overload, name): a function that calls operator `name`, whose front in torch.ops is `overload`."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_calls", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__calls() { return PyModule_Create(&definition); }
