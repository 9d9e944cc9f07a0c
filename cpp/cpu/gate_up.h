// The first half of the fused path: H = W1 X (+ b1), and A = act(H), either of which may be left out.
#pragma once

#include "experts.h"
#include "units.h"

namespace moe {

template <typename Storage>
struct GateUp {
  Storage* pre_activation;            // [R, P], or null
  Storage* activated;                 // [R, I], or null
  const Storage* const* hidden_rows;  // [R] rows of H
};

template <typename Storage>
class GateUpWorker {
  using Real = Wide<Storage>;

 public:
  // Columns of A in a unit: a multiple of every tile's rows. Where units are few, half as many, or a thread would wait
  // long for the last one.
  static int64_t columns_per_unit(int64_t blocks, int64_t intermediate, int64_t threads) {
    const bool few = blocks * ceil_div(intermediate, kMostColumns) < kUnitsPerThread * threads;
    return few ? kMostColumns / 2 : kMostColumns;
  }

  static size_t scratch_bytes(const Experts<Storage>& experts, int64_t max_rows) {
    return BlockGemm<Storage>::scratch_bytes(experts.table, max_rows, experts.hidden, kWidth) +
           Arena::size_of_block<Real>(max_rows * kWidth) + 2 * Arena::size_of_block<Real>(kWidth);
  }

  GateUpWorker(const Experts<Storage>& experts, const GateUp<Storage>& args, const std::vector<Unit>& units,
               int64_t max_rows, Arena& arena)
      : experts_(experts), args_(args), units_(units), gemm_(experts.table, arena, max_rows, experts.hidden, kWidth) {
    c_ = arena.take<Real>(max_rows * kWidth);
    bias_ = arena.take<Real>(kWidth);
    spare_ = arena.take<Real>(kWidth);
  }

  void run(int64_t index, int64_t upcoming) {
    const auto& [rows, block, begin, count] = units_[index];
    const Weight<Storage> weight = experts_.gate_up_proj(rows.expert);
    if (loaded_ != rows.first) {
      gemm_.load_rows(args_.hidden_rows + rows.first, rows.rows, experts_.hidden, weight.layout,
                      experts_.layer.row_invariant);
      loaded_ = rows.first;
    }
    const Columns columns = experts_.layout.columns(begin, count);
    gemm_.multiply(weight, columns, c_, kWidth, upcoming < 0 ? nullptr : first_column(units_[upcoming]));
    for (int run = 0; run < columns.runs; ++run) add_bias(rows, columns, run);
    for (int64_t i = 0; i < rows.rows; ++i) finish_row(rows.first + i, begin, count, c_ + i * kWidth);
  }

 private:
  static constexpr int64_t kMostColumns = 192, kUnitsPerThread = 32, kWidth = 2 * kMostColumns;

  // The column of the weight with which a unit begins.
  const Storage* first_column(const Unit& unit) const {
    return experts_.gate_up_proj(unit.rows.expert).column(experts_.layout.columns(unit.begin, unit.count).begin[0]);
  }

  void add_bias(const RowBlock& rows, const Columns& columns, int run) {
    if (experts_.layer.gate_up_bias == nullptr) return;
    const Storage* bias = static_cast<const Storage*>(experts_.layer.gate_up_bias);
    experts_.table.widen_row(bias + rows.expert * experts_.pre_activation + columns.begin[run], columns.count, bias_);
    for (int64_t i = 0; i < rows.rows; ++i) {
      experts_.table.axpy(Real(1), bias_, columns.count, c_ + i * kWidth + columns.offset(run));
    }
  }

  void finish_row(int64_t r, int64_t begin, int64_t count, Real* c) {
    const Real *gate, *up;
    experts_.layout.split(c, count, spare_, gate, up);
    if (args_.pre_activation != nullptr) {
      Storage* row = args_.pre_activation + r * experts_.pre_activation;
      experts_.layout.write(gate, up, begin, count, row, c == gate ? spare_ : c);
    }
    if (args_.activated != nullptr) {
      experts_.table.activate(experts_.layer.activation, gate, up, count, c);
      experts_.table.narrow_row(c, count, args_.activated + r * experts_.intermediate + begin);
    }
  }

  const Experts<Storage>& experts_;
  const GateUp<Storage>& args_;
  const std::vector<Unit>& units_;
  BlockGemm<Storage> gemm_;
  Real *c_, *bias_, *spare_;
  int64_t loaded_ = -1;  // first row of the block that gemm_ holds
};

template <typename Storage>
bool gate_up(const Experts<Storage>& experts, const GateUp<Storage>& args, const ThreadPool& pool) {
  const int64_t max_rows = BlockGemm<Storage>::max_rows(experts.table, experts.hidden);
  auto blocks = row_blocks(experts.offsets.data(), experts.layer.plan.num_experts, max_rows);
  const int64_t columns = GateUpWorker<Storage>::columns_per_unit(static_cast<int64_t>(blocks.size()),
                                                                  experts.intermediate, pool.num_threads());
  const auto units = units_of(std::move(blocks), experts.intermediate, columns);
  return run_units(
      pool, static_cast<int64_t>(units.size()), GateUpWorker<Storage>::scratch_bytes(experts, max_rows),
      [&](Arena& arena) { return GateUpWorker<Storage>(experts, args, units, max_rows, arena); },
      UnitOrder::kFromBothEnds);
}

}  // namespace moe
