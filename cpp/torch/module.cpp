// The Python module torch_moe._C.
//
// Operators are not bound here: importing this module loads the shared library, whose static initialisers register
// every schema and kernel with torch's dispatcher (library.cpp, cpu*.cpp); they are called as torch.ops.moe.*.
// pybind11 is for what an operator cannot be, because it takes and returns no tensor: facts about the build, and the
// placement of experts, which is solved on the host for tables of the host whatever device the experts are on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "moe/floor.h"
#include "moe/huge_pages.h"
#include "moe/isa.h"
#include "moe/placement.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MOE_VERSION;
  info["compiler"] = MOE_COMPILER;
  info["build_type"] = MOE_BUILD_TYPE;
  info["processor"] = MOE_PROCESSOR;
  info["oldest_torch"] = "2.10";  // TORCH_TARGET_VERSION
#ifdef MOE_CUDA_VERSION
  info["cuda"] = MOE_CUDA_VERSION;
  info["cuda_architectures"] = MOE_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
#endif
  return info;
}

void set_isa(const std::string& name) {
  if (moe::set_isa(name)) return;
  std::string available;
  for (const std::string_view isa : moe::available_isas()) available.append(available.empty() ? "" : ", ").append(isa);
  throw py::value_error("set_isa: name must be one of " + available + ", got '" + name + "'");
}

moe::WeightLayout parse_weight_layout(const std::string& name) {
  if (name == "out_in") return moe::WeightLayout::kOutIn;
  if (name == "in_out") return moe::WeightLayout::kInOut;
  throw py::value_error("kernel: weight_layout must be out_in or in_out, got '" + name + "'");
}

moe::DType parse_dtype(const std::string& name) {
  if (name == "float32") return moe::DType::kFloat32;
  if (name == "bfloat16") return moe::DType::kBFloat16;
  if (name == "float16") return moe::DType::kFloat16;
  if (name == "float64") return moe::DType::kFloat64;
  throw py::value_error("kernel: dtype must be float32, bfloat16, float16 or float64, got '" + name + "'");
}

// The sizes are checked by the Python caller, torch_moe.distributed.solve_placement; here only what memory safety
// needs.
std::vector<int32_t> solve_placement(const std::vector<double>& loads, const std::vector<int32_t>& current,
                                     int64_t num_layers, int64_t num_experts, int64_t ep_size, int64_t places_per_rank,
                                     int64_t num_physical, int64_t nodes, int64_t num_groups, double slack,
                                     int64_t max_moves) {
  if (num_layers < 0 || ep_size < 0 || places_per_rank < 0) {
    throw py::value_error("solve_placement: sizes must not be negative");
  }
  std::vector<int32_t> placed(num_layers * ep_size * places_per_rank);
  if (static_cast<int64_t>(loads.size()) != num_layers * num_experts ||
      (!current.empty() && current.size() != placed.size())) {
    throw py::value_error("solve_placement: loads and current must have the sizes given");
  }
  const moe::Status status = moe::placement_cpu({.physical_to_logical = placed.data(),
                                                 .loads = loads.data(),
                                                 .current = current.empty() ? nullptr : current.data(),
                                                 .num_layers = num_layers,
                                                 .num_experts = num_experts,
                                                 .ep_size = ep_size,
                                                 .places_per_rank = places_per_rank,
                                                 .num_physical = num_physical,
                                                 .nodes = nodes,
                                                 .num_groups = num_groups,
                                                 .slack = slack,
                                                 .max_moves = max_moves},
                                                moe::kTorchPool);
  if (status == moe::Status::kImpossible) {
    throw py::value_error("solve_placement: sizes, loads or slack are impossible: see moe/placement.h");
  }
  if (status != moe::Status::kOk) throw std::bad_alloc();
  return placed;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads the operators torch.ops.moe.* and tells how they were built.";
  m.def("build_info", &build_info, "Facts about this build: version, compiler, build type, processor, oldest torch.");
  m.def("num_threads", &torch::stable::get_num_threads, "Threads that an operator uses: torch.get_num_threads().");
  m.def("isa", &moe::isa_name, "The instruction set in use: MOE_ISA, or the best that the processor has.");
  m.def("available_isas", &moe::available_isas,
        "The instruction sets that this build and this processor have, best first.");
  m.def("set_isa", &set_isa, py::arg("name"), "Uses another instruction set from now on: for tests.");
  m.def(
      "kernel",
      [](int64_t rows, const std::string& weight_layout, const std::string& dtype) {
        return moe::gemm_kernel_name(parse_weight_layout(weight_layout), rows, parse_dtype(dtype));
      },
      py::arg("rows"), py::arg("weight_layout"), py::arg("dtype") = "float32",
      "The GEMM kernel that an expert with this many rows takes, when the contracted width is a multiple of 32.");
  m.def(
      "cuda_kernel",
      [](int architecture, const std::string& dtype, int64_t rows, int64_t n, int64_t k, bool allow_tf32) {
#ifdef MOE_CUDA_VERSION
        return moe::gemm_kernel_name_cuda(architecture, parse_dtype(dtype), rows, n, k, allow_tf32);
#else
        parse_dtype(dtype);
        static_cast<void>(architecture + rows + n + k + allow_tf32);
        return std::string_view();
#endif
      },
      py::arg("architecture"), py::arg("dtype"), py::arg("rows"), py::arg("n"), py::arg("k"),
      py::arg("allow_tf32") = false,
      "The GEMM kernel of a GPU (90 is compute capability 9.0) for these widths and rows per expert; empty when there "
      "is none.");
  m.def(
      "cuda_few_slots",
      [](int architecture, const std::string& dtype) -> int64_t {
#ifdef MOE_CUDA_VERSION
        return moe::most_few_slots_cuda(architecture, parse_dtype(dtype));
#else
        parse_dtype(dtype);
        static_cast<void>(architecture);
        return 0;
#endif
      },
      py::arg("architecture"), py::arg("dtype"),
      "Of how many slots at most a GPU computes routed_experts in two kernels; 0 when it never does.");
  m.def(
      "fma_rate",
      [](bool fp64, double seconds) {
        return moe::fma_rate_cpu(fp64 ? moe::DType::kFloat64 : moe::DType::kFloat32, seconds, moe::kTorchPool) / 1e9;
      },
      py::arg("fp64") = false, py::arg("seconds") = 0.2, py::call_guard<py::gil_scoped_release>(),
      "GFLOP/s of fused multiply-adds on registers, on all threads.");
  m.def(
      "tile_rate", [](double seconds) { return moe::tile_rate_cpu(seconds, moe::kTorchPool) / 1e9; },
      py::arg("seconds") = 0.2, py::call_guard<py::gil_scoped_release>(),
      "GFLOP/s of a GEMM's tile whose operands are in the first-level cache, fp32, on all threads.");
  py::class_<moe::MemoryReader>(m, "MemoryReader", "Memory to read, eight streams per thread, on all threads.")
      .def(py::init(
               [](int64_t mebibytes) { return std::make_unique<moe::MemoryReader>(mebibytes << 20, moe::kTorchPool); }),
           py::arg("mebibytes"), py::call_guard<py::gil_scoped_release>())
      .def(
          "read", [](moe::MemoryReader& memory) { return memory.read() / 1e9; },
          py::call_guard<py::gil_scoped_release>(), "GB/s of reading the next quarter of it once.")
      .def(
          "best", [](moe::MemoryReader& memory, double seconds) { return memory.best(seconds) / 1e9; },
          py::arg("seconds") = 0.5, py::call_guard<py::gil_scoped_release>(),
          "GB/s, the best of the quarters read in `seconds`.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { moe::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"),
      "Asks for 2 MiB pages under memory that nothing has touched yet; a hint, which nothing depends on.");
  m.def("solve_placement", &solve_placement, py::arg("loads"), py::arg("current"), py::kw_only(), py::arg("num_layers"),
        py::arg("num_experts"), py::arg("ep_size"), py::arg("places_per_rank"), py::arg("num_physical"),
        py::arg("nodes"), py::arg("num_groups"), py::arg("slack"), py::arg("max_moves"),
        py::call_guard<py::gil_scoped_release>(),
        "The expert of each place, [num_layers, ep_size, places_per_rank] flattened; see moe/placement.h.");
}
