#include "checks.h"

#include <algorithm>
#include <span>
#include <stdexcept>
#include <vector>

#include "moe/memory.h"

#if defined(__linux__)
// A tensor of memory that is not torch's, with what to do when it is done with. Of the stable functions since
// torch 2.11: weak, so that it is null in an older one.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* deleter_context);
#endif

namespace moe {
namespace {

struct TypeName {
  ScalarType type;
  const char* name;        // as torch prints it, without "torch."
  const char* conversion;  // how to get there
};
constexpr TypeName kTypeNames[] = {
    {ScalarType::Float, "float32", "call .float()"},
    {ScalarType::Double, "float64", "call .double()"},
    {ScalarType::Half, "float16", "call .half()"},
    {ScalarType::BFloat16, "bfloat16", "call .bfloat16()"},
    {ScalarType::Int, "int32", "call .int()"},
    {ScalarType::Long, "int64", "call .long()"},
    {ScalarType::Short, "int16", ""},
    {ScalarType::Char, "int8", ""},
    {ScalarType::Byte, "uint8", ""},
    {ScalarType::Bool, "bool", ""},
    {ScalarType::ComplexFloat, "complex64", ""},
    {ScalarType::ComplexDouble, "complex128", ""},
};

TypeName type_name(ScalarType type) {
  const auto* found = std::ranges::find(kTypeNames, type, &TypeName::type);
  return found != std::end(kTypeNames) ? *found : TypeName{type, torch::headeronly::toString(type), ""};
}

std::span<const int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.data(), sizes.size()};
}

std::string to_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

bool on_same_device(const Tensor& a, const Tensor& b) {
  return device_type(a) == device_type(b) && a.get_device_index() == b.get_device_index();
}

std::vector<int64_t> contiguous_strides(std::initializer_list<int64_t> shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i > 1; --i)
    strides[i - 2] = strides[i - 1] * std::max<int64_t>(shape.begin()[i - 1], 1);
  return strides;
}

int32_t shim_type(ScalarType type) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)); }

std::string message(std::string_view op, std::string_view argument, const std::string& expectation,
                    const std::string& got, std::string_view hint) {
  std::string text = std::string(op) + ": " + std::string(argument) + " must " + expectation + ", got " + got;
  if (!hint.empty()) text += " (" + std::string(hint) + ")";
  return text;
}

}  // namespace

void check_status(std::string_view op, Status status, const std::string& failure) {
  switch (status) {
    case Status::kOk:
      return;
    case Status::kNonFiniteLogits:
      throw std::runtime_error(message(op, "router_logits", "be finite", "NaN or infinity",
                                       "check_finite=False routes such a token like any other"));
    case Status::kOutOfMemory:
      throw std::runtime_error(std::string(op) + ": not enough memory for scratch space" +
                               (failure.empty() ? "" : ": " + failure));
    case Status::kImpossible:
      throw std::runtime_error(std::string(op) + ": sizes or values that contradict each other");
    case Status::kCudaError:
      throw std::runtime_error(std::string(op) + ": " + failure);
  }
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kFloat32:
      break;
  }
  return ScalarType::Float;
}

ScalarType weight_type(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

void Argument::fail(const std::string& expectation, const std::string& got, std::string_view hint) const {
  throw std::runtime_error(message(op_, name_, expectation, got, hint));
}

const Argument& Argument::rank(int64_t rank, std::string_view legend) const {
  if (tensor_.dim() == rank) return *this;
  fail("have " + std::to_string(rank) + " dimensions " + std::string(legend), "shape " + to_text(shape_of(tensor_)));
}

const Argument& Argument::shape(std::initializer_list<int64_t> expected, std::string_view legend) const {
  const auto got = shape_of(tensor_);
  if (std::ranges::equal(got, expected)) return *this;
  fail("have shape " + to_text({expected.begin(), expected.size()}) + " = " + std::string(legend), to_text(got));
}

const Argument& Argument::floating() const {
  switch (tensor_.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return *this;
    default:
      fail("be float32, bfloat16, float16 or float64", type_name(tensor_.scalar_type()).name, "call .float()");
  }
}

const Argument& Argument::type(ScalarType expected) const {
  if (tensor_.scalar_type() == expected) return *this;
  const TypeName name = type_name(expected);
  fail(std::string("be ") + name.name, type_name(tensor_.scalar_type()).name, name.conversion);
}

DType Argument::dtype() const {
  switch (tensor_.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

Argument Op::argument(std::string_view name, const Tensor& tensor) const {
  if (!on_same_device(tensor, first_)) {
    const std::string expected = device_name(first_);
    fail(name, "be on " + expected + " like the other tensors", device_name(tensor), "call .to('" + expected + "')");
  }
  return {name_, name, tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor)};
}

Argument Op::output(std::string_view name, const Tensor& tensor) const {
  if (!tensor.is_contiguous()) fail(name, "be contiguous", "a strided tensor", "it is written in place");
  return argument(name, tensor);
}

Tensor Op::empty(std::initializer_list<int64_t> shape, ScalarType type) const {
  // NOTE: not new_empty, which finds its operator by name: of a call for one token, a tenth of the time.
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(),
                                                  contiguous_strides(shape).data(), shim_type(type),
                                                  device_type(first_), first_.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor Op::empty_kept(std::initializer_list<int64_t> shape, ScalarType type) const {
#if defined(__linux__)
  size_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  if (bytes >= kLargeBlock && first_.is_cpu() && torch_from_blob != nullptr) {
    const Block block = take_block(bytes);
    if (block.data == nullptr) check_status(name_, Status::kOutOfMemory, "");
    const auto give = [](void* data, void* size) { give_block({data, reinterpret_cast<size_t>(size)}); };
    AtenTensorHandle handle = nullptr;
    if (torch_from_blob(block.data, static_cast<int64_t>(shape.size()), shape.begin(), contiguous_strides(shape).data(),
                        0, shim_type(type), aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                        nullptr, 0, give, reinterpret_cast<void*>(block.bytes)) == AOTI_TORCH_SUCCESS) {
      return Tensor(handle);
    }
    give_block(block);
  }
#endif
  return empty(shape, type);
}

void Op::fail(std::string_view argument, const std::string& expectation, const std::string& got,
              std::string_view hint) const {
  throw std::runtime_error(message(name_, argument, expectation, got, hint));
}

void Op::at_least(std::string_view argument, int64_t value, int64_t least) const {
  if (value < least) fail(argument, "be at least " + std::to_string(least), std::to_string(value));
}

}  // namespace moe
