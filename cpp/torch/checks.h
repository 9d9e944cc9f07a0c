// Checks of what a caller passes. One message format:
//   <op>: <argument> must <expectation>, got <what came> (<hint>)
// A failed check raises RuntimeError in Python, as torch's own operators do.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "moe/types.h"

namespace moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws unless the status is kOk. `failure` is what the device says of kOutOfMemory and kCudaError.
void check_status(std::string_view op, Status status, const std::string& failure);

ScalarType scalar_type(DType dtype);
// fp64 for fp64, else fp32: the type of topk_weights and of the router's bias.
ScalarType weight_type(DType dtype);

// A tensor argument and its checks, which chain. It holds the tensor made contiguous.
class Argument {
 public:
  Argument(std::string_view op, std::string_view name, const Tensor& tensor) : op_(op), name_(name), tensor_(tensor) {}

  // `legend` names the dimensions: "[num_tokens, hidden_size]".
  const Argument& rank(int64_t rank, std::string_view legend) const;
  const Argument& shape(std::initializer_list<int64_t> expected, std::string_view legend) const;
  const Argument& floating() const;
  const Argument& type(ScalarType expected) const;
  void* mutable_data() const { return tensor_.mutable_data_ptr(); }
  [[noreturn]] void fail(const std::string& expectation, const std::string& got, std::string_view hint = "") const;

  DType dtype() const;  // only after floating()
  int64_t size(int64_t dim) const { return tensor_.size(dim); }
  template <typename T = void>
  const T* data() const {
    return static_cast<const T*>(tensor_.const_data_ptr());
  }

 private:
  std::string_view op_, name_;
  Tensor tensor_;
};

// An operator's name and device: all its tensors have to be where the first is.
class Op {
 public:
  Op(std::string_view name, const Tensor& first) : name_(name), first_(first) {}

  Argument argument(std::string_view name, const Tensor& tensor) const;
  Argument output(std::string_view name, const Tensor& tensor) const;  // to be written to: not made contiguous
  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const;
  // The same, of a floating type, for what lives from step to step, gradients above all: a large one on the CPU is a
  // kept block (moe/memory.h). Its storage cannot be resized.
  Tensor empty_kept(std::initializer_list<int64_t> shape, ScalarType type) const;
  [[noreturn]] void fail(std::string_view argument, const std::string& expectation, const std::string& got,
                         std::string_view hint = "") const;
  void at_least(std::string_view argument, int64_t value, int64_t least) const;
  // Runs the kernel on the tensors' device: cpu.cpp and cuda.cpp have the two devices.
  template <typename Device, typename Args>
  void run(const Args& args) const {
    Device device(first_);
    check_status(name_, device.run(args), device.failure());
  }

  // The choice that `value` names.
  template <typename Enum>
  Enum parse(std::string_view argument, const std::string& value,
             std::initializer_list<std::pair<std::string_view, Enum>> choices) const {
    for (const auto& [text, choice] : choices) {
      if (text == value) return choice;
    }
    std::string allowed;
    for (const auto& [text, choice] : choices) {
      allowed += (allowed.empty() ? "'" : ", '") + std::string(text) + "'";
    }
    fail(argument, "be one of " + allowed, "'" + value + "'");
  }

 private:
  std::string_view name_;
  const Tensor& first_;
};

}  // namespace moe
