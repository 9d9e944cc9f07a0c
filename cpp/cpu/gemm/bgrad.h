// The gradient of every expert's bias: output[e] = sum over the rows r of e of weight[r] * rows[r], [N].
#pragma once

#include "gemm/kernels.h"
#include "units.h"

namespace moe {

template <typename Storage>
struct Bgrad {
  Storage* output;                   // [E, N]
  const Storage* const* rows;        // [R] rows of N
  const Wide<Storage>* row_weights;  // [R], or null: all ones
  const int64_t* expert_offsets;     // [E + 1], sanitised
  int64_t num_experts, n;
};

// A unit is one expert: its rows are added in order.
template <typename Storage>
struct BgradWorker {
  using Real = Wide<Storage>;
  const Kernels<Storage>& kernels;
  const Bgrad<Storage>& args;
  Real *sum, *row;

  void run(int64_t expert) {
    std::fill_n(sum, args.n, Real(0));
    for (int64_t r = args.expert_offsets[expert]; r < args.expert_offsets[expert + 1]; ++r) {
      kernels.widen_row(args.rows[r], args.n, row);
      kernels.axpy(args.row_weights ? args.row_weights[r] : Real(1), row, args.n, sum);
    }
    kernels.narrow_row(sum, args.n, args.output + expert * args.n);
  }
};

template <typename Storage>
bool run_bgrad(const Bgrad<Storage>& args, const ThreadPool& pool) {
  using Real = Wide<Storage>;
  const Kernels<Storage>& table = kernels<Storage>();
  return run_units(pool, args.num_experts, 2 * Arena::size_of_block<Real>(args.n), [&](Arena& arena) {
    return BgradWorker<Storage>{table, args, arena.take<Real>(args.n), arena.take<Real>(args.n)};
  });
}

}  // namespace moe
