// Which instruction set is in use: asked of the processor once, forced by MOE_ISA, inspectable.
#include <atomic>
#include <cstdlib>
#if defined(MOE_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemm/block.h"
#include "gemm/kernels.h"
#include "moe/isa.h"

namespace moe {

#define MOE_KERNELS(name, supported)                          \
  namespace name {                                            \
  template <typename Storage>                                 \
  const Kernels<Storage>& table();                            \
  extern template const Kernels<float>& table<float>();       \
  extern template const Kernels<BFloat16>& table<BFloat16>(); \
  extern template const Kernels<Float16>& table<Float16>();   \
  extern template const Kernels<double>& table<double>();     \
  }
#include "gemm/kernels.inc"
#undef MOE_KERNELS

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels<float>& (*fp32)();
  const Kernels<BFloat16>& (*bf16)();
  const Kernels<Float16>& (*fp16)();
  const Kernels<double>& (*fp64)();
};

#if defined(MOE_HAVE_AMX)
// The processor's word is not enough: Linux enables the tiles' registers for those who ask.
bool has_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bw") &&
                                syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

constexpr Isa kIsas[] = {
#define MOE_KERNELS(name, condition)               \
  Isa{#name,                                       \
      [] { return static_cast<bool>(condition); }, \
      name::table<float>,                          \
      name::table<BFloat16>,                       \
      name::table<Float16>,                        \
      name::table<double>},
#include "gemm/kernels.inc"
#undef MOE_KERNELS
};

const Isa* find(std::string_view name) {
  for (const Isa& isa : kIsas) {
    if (isa.supported() && (name.empty() || name == isa.name)) return &isa;
  }
  return nullptr;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa = [] {
    const char* forced = std::getenv("MOE_ISA");
    const Isa* wanted = forced ? find(forced) : nullptr;
    return wanted ? wanted : find("");  // a MOE_ISA that this machine lacks is reported by torch_moe.explain()
  }();
  return isa;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return current().load(std::memory_order_relaxed)->fp32();
}
template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return current().load(std::memory_order_relaxed)->bf16();
}
template <>
const Kernels<Float16>& kernels<Float16>() {
  return current().load(std::memory_order_relaxed)->fp16();
}
template <>
const Kernels<double>& kernels<double>() {
  return current().load(std::memory_order_relaxed)->fp64();
}

std::string_view isa_name() { return current().load(std::memory_order_relaxed)->name; }

std::vector<std::string_view> available_isas() {
  std::vector<std::string_view> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

bool set_isa(std::string_view name) {
  const Isa* isa = name.empty() ? nullptr : find(name);
  if (isa == nullptr) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

std::string_view gemm_kernel_name(WeightLayout layout, int64_t rows, DType dtype) {
  const GemmKernel kernel = dispatch(dtype, [&]<typename Storage>(std::type_identity<Storage>) {
    const Kernels<Storage>& table = kernels<Storage>();
    return choose_gemm(table, layout, rows, table.outer_pairs != nullptr, table.matrix_units != nullptr);
  });
  switch (kernel) {
    case GemmKernel::kDot:
      return "dot";
    case GemmKernel::kFours:
      return "dot_fours";
    case GemmKernel::kTokensInLanes:
      return "tokens_in_lanes";
    case GemmKernel::kColumnsInLanes:
      return "columns_in_lanes";
    case GemmKernel::kTiles:
      return "tiles";
  }
  return "";
}

}  // namespace moe
