// The Python module torch_moe._C.
//
// Operators are not bound here: importing this module loads the shared library, whose static initialisers register
// every schema and kernel with torch's dispatcher (library.cpp, cpu*.cpp); they are called as torch.ops.moe.*.
// pybind11 is for what an operator cannot be, because it takes and returns no tensor: facts about the build.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/ops.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MOE_VERSION;
  info["compiler"] = MOE_COMPILER;
  info["build_type"] = MOE_BUILD_TYPE;
  info["processor"] = MOE_PROCESSOR;
  info["oldest_torch"] = "2.10";  // TORCH_TARGET_VERSION
  info["cuda"] = false;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads the operators torch.ops.moe.* and tells how they were built.";
  m.def("build_info", &build_info, "Facts about this build: version, compiler, build type, processor, oldest torch.");
  m.def("num_threads", &torch::stable::get_num_threads, "Threads that an operator uses: torch.get_num_threads().");
}
