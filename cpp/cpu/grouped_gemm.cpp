#include "moe/grouped_gemm.h"

#include <algorithm>

#include "gemm/bgrad.h"
#include "gemm/block.h"
#include "gemm/row_blocks.h"
#include "gemm/wgrad.h"
#include "plan_view.h"

namespace moe {
namespace {

constexpr int64_t kColumnsPerUnit = 192;  // a multiple of every tile's rows and of the widest panel

template <typename Storage>
std::vector<const Storage*> row_pointers(const void* rows, int64_t num_rows, int64_t width) {
  std::vector<const Storage*> pointers(static_cast<size_t>(num_rows));
  for (int64_t r = 0; r < num_rows; ++r) pointers[r] = static_cast<const Storage*>(rows) + r * width;
  return pointers;
}

std::vector<int64_t> sanitized(const int32_t* expert_offsets, int64_t num_experts, int64_t num_rows) {
  std::vector<int64_t> offsets(static_cast<size_t>(num_experts) + 1);
  sanitize_offsets(expert_offsets, num_experts, num_rows, offsets.data());
  return offsets;
}

template <typename Storage>
class Worker {
  using Real = Wide<Storage>;

 public:
  static size_t scratch_bytes(const Kernels<Storage>& kernels, int64_t rows, int64_t k) {
    return BlockGemm<Storage>::scratch_bytes(kernels, rows, k, kColumnsPerUnit) +
           Arena::size_of_block<Real>(rows * kColumnsPerUnit) + Arena::size_of_block<Real>(kColumnsPerUnit);
  }

  Worker(const Kernels<Storage>& kernels, const GroupedGemmArgs& args, const Storage* const* rows,
         const std::vector<Unit>& units, int64_t max_rows, Arena& arena)
      : kernels_(kernels),
        args_(args),
        rows_(rows),
        units_(units),
        gemm_(kernels, arena, max_rows, args.k, kColumnsPerUnit) {
    c_ = arena.take<Real>(max_rows * kColumnsPerUnit);
    bias_ = arena.take<Real>(kColumnsPerUnit);
  }

  void run(int64_t index) {
    const auto& [rows, block, begin, count] = units_[index];
    if (loaded_ != rows.first) {
      gemm_.load_rows(rows_ + rows.first, rows.rows, args_.k, args_.weight_layout);
      loaded_ = rows.first;
    }
    const Columns columns{{begin, 0}, count, 1};
    const Storage* weight = static_cast<const Storage*>(args_.weight) + rows.expert * args_.n * args_.k;
    gemm_.multiply({weight, args_.n, args_.k, args_.weight_layout}, columns, c_, kColumnsPerUnit);
    if (args_.bias != nullptr) {
      kernels_.widen_row(static_cast<const Storage*>(args_.bias) + rows.expert * args_.n + begin, count, bias_);
    }
    for (int64_t i = 0; i < rows.rows; ++i) {
      Real* row = c_ + i * kColumnsPerUnit;
      if (args_.bias != nullptr) kernels_.axpy(Real(1), bias_, count, row);
      kernels_.narrow_row(row, count, static_cast<Storage*>(args_.output) + (rows.first + i) * args_.n + begin);
    }
  }

 private:
  const Kernels<Storage>& kernels_;
  const GroupedGemmArgs& args_;
  const Storage* const* rows_;
  const std::vector<Unit>& units_;
  BlockGemm<Storage> gemm_;
  Real *c_, *bias_;
  int64_t loaded_ = -1;  // first row of the block that gemm_ holds
};

template <typename Storage>
bool grouped_gemm(const GroupedGemmArgs& args, const ThreadPool& pool) {
  const Kernels<Storage>& table = kernels<Storage>();
  const auto offsets = sanitized(args.expert_offsets, args.num_experts, args.num_rows);
  const auto rows = row_pointers<Storage>(args.rows, args.num_rows, args.k);
  Storage* output = static_cast<Storage*>(args.output);
  const auto zero_rows = [&](int64_t begin, int64_t end) {
    std::fill_n(output + begin * args.n, (end - begin) * args.n, Storage{});
  };
  zero_rows(0, offsets.front());
  zero_rows(offsets.back(), args.num_rows);
  const int64_t max_rows = BlockGemm<Storage>::max_rows(table, args.k);
  const auto units = units_of(row_blocks(offsets.data(), args.num_experts, max_rows), args.n, kColumnsPerUnit);
  return run_units(pool, static_cast<int64_t>(units.size()), Worker<Storage>::scratch_bytes(table, max_rows, args.k),
                   [&](Arena& arena) { return Worker<Storage>(table, args, rows.data(), units, max_rows, arena); });
}

template <typename Storage>
bool wgrad(const GroupedGemmWgradArgs& args, const ThreadPool& pool) {
  const auto offsets = sanitized(args.expert_offsets, args.num_experts, args.num_rows);
  const auto lhs = row_pointers<Storage>(args.lhs, args.num_rows, args.m);
  const auto rhs = row_pointers<Storage>(args.rhs, args.num_rows, args.n);
  return run_wgrad<Storage>({static_cast<Storage*>(args.output), lhs.data(), rhs.data(), offsets.data(),
                             args.num_experts, args.m, args.n, args.accumulate},
                            pool);
}

template <typename Storage>
bool bgrad(const GroupedGemmBgradArgs& args, const ThreadPool& pool) {
  const auto offsets = sanitized(args.expert_offsets, args.num_experts, args.num_rows);
  const auto rows = row_pointers<Storage>(args.grad_output, args.num_rows, args.n);
  return run_bgrad<Storage>(
      {static_cast<Storage*>(args.output), rows.data(), nullptr, offsets.data(), args.num_experts, args.n}, pool);
}

}  // namespace

Status grouped_gemm_cpu(const GroupedGemmArgs& args, const ThreadPool& pool) {
  const bool ok = dispatch(
      args.dtype, [&]<typename Storage>(std::type_identity<Storage>) { return grouped_gemm<Storage>(args, pool); });
  return ok ? Status::kOk : Status::kOutOfMemory;
}

Status grouped_gemm_wgrad_cpu(const GroupedGemmWgradArgs& args, const ThreadPool& pool) {
  const bool ok =
      dispatch(args.dtype, [&]<typename Storage>(std::type_identity<Storage>) { return wgrad<Storage>(args, pool); });
  return ok ? Status::kOk : Status::kOutOfMemory;
}

Status grouped_gemm_bgrad_cpu(const GroupedGemmBgradArgs& args, const ThreadPool& pool) {
  const bool ok =
      dispatch(args.dtype, [&]<typename Storage>(std::type_identity<Storage>) { return bgrad<Storage>(args, pool); });
  return ok ? Status::kOk : Status::kOutOfMemory;
}

}  // namespace moe
