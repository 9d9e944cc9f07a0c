// A grouped GEMM whose rows are summed back to their tokens:  output[t] = sum over the rows r of t of s_r (W_e a_r +
// b_e).
//
// A unit is a run of output columns, for all experts and all tokens: its thread is the only writer of those columns and
// adds the experts in ascending order, so no atomics are needed, nothing of size R x H is stored, and the sum's order
// is fixed. Where a token has one expert there is nothing to order: every other unit then begins with the fewest rows,
// so that one thread multiplies many rows while another waits for the weights of few.
#pragma once

#include <algorithm>

#include "experts.h"
#include "units.h"

namespace moe {

template <typename Storage>
struct TokenReduction {
  using Real = Wide<Storage>;
  Storage* output;                                                    // [T, H]
  const Storage* const* rows;                                         // [R] rows of width k
  Weight<Storage> (Experts<Storage>::*weight)(int64_t expert) const;  // n = H
  bool transpose_weight;                                              // dgrad
  const Storage* bias;                                                // [E, H], or null
  bool weighted;                                                      // by the routing weight of the row; else s_r = 1
  int64_t k;
};

template <typename Storage>
class TokenReducer {
  using Real = Wide<Storage>;

 public:
  // Columns of a unit: as many units as feed every thread evenly, few enough that packing a row is worth it, and a sum
  // for all tokens that stays in kSumBytes.
  static int64_t columns_per_unit(const Experts<Storage>& experts, int threads) {
    const int64_t hidden = std::max<int64_t>(experts.hidden, 1);
    const int64_t units = ceil_div(ceil_div(hidden, kMostColumns), threads) * threads;
    const int64_t tokens = std::max<int64_t>(experts.layer.plan.num_tokens, 1);
    const int64_t fit = kSumBytes / (tokens * static_cast<int64_t>(sizeof(Real))) / kGrain * kGrain;
    return std::clamp(ceil_div(ceil_div(hidden, units), kGrain) * kGrain, kGrain, std::max(fit, kGrain));
  }

  static size_t scratch_bytes(const Experts<Storage>& experts, int64_t columns, int64_t max_rows, int64_t k) {
    return BlockGemm<Storage>::scratch_bytes(experts.table, max_rows, k, columns) +
           Arena::size_of_block<Real>(max_rows * columns) + Arena::size_of_block<Real>(columns) +
           Arena::size_of_block<Real>(experts.layer.plan.num_tokens * columns);
  }

  TokenReducer(const Experts<Storage>& experts, const TokenReduction<Storage>& args,
               const std::vector<RowBlock>& blocks, int64_t columns, int64_t max_rows, Arena& arena)
      : experts_(experts),
        args_(args),
        blocks_(blocks),
        columns_(columns),
        gemm_(experts.table, arena, max_rows, args.k, columns) {
    c_ = arena.take<Real>(max_rows * columns);
    bias_ = arena.take<Real>(columns);
    sum_ = arena.take<Real>(experts.layer.plan.num_tokens * columns);
  }

  void run(int64_t unit) {
    const int64_t begin = unit * columns_, count = std::min(columns_, experts_.hidden - begin);
    const int64_t tokens = experts_.layer.plan.num_tokens;
    std::fill_n(sum_, tokens * columns_, Real(0));
    const bool from_back = experts_.layer.plan.top_k == 1 && unit % 2 != 0;
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    const auto block = [&](int64_t i) { return from_back ? blocks_[blocks - 1 - i] : blocks_[i]; };
    for (int64_t i = 0; i < blocks; ++i) {
      add_rows(block(i), begin, count, i + 1 < blocks ? weight(block(i + 1).expert).column(begin) : nullptr);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      experts_.table.narrow_row(sum_ + t * columns_, count, args_.output + t * experts_.hidden + begin);
    }
  }

 private:
  static constexpr int64_t kMostColumns = 384, kGrain = Columns::kPadding;
  static constexpr int64_t kSumBytes = 4 << 20;

  Weight<Storage> weight(int64_t expert) const {
    const Weight<Storage> weight = (experts_.*args_.weight)(expert);
    return args_.transpose_weight ? transposed(weight) : weight;
  }

  // `next` is the column of the weight that is read afterwards.
  void add_rows(const RowBlock& block, int64_t begin, int64_t count, const Storage* next) {
    const auto [expert, first, rows] = block;
    const Weight<Storage> factor = weight(expert);
    gemm_.load_rows(args_.rows + first, rows, args_.k, factor.layout, experts_.layer.row_invariant);
    gemm_.multiply(factor, Columns{{begin, 0}, count, 1}, c_, columns_, next);
    if (args_.bias != nullptr) {
      experts_.table.widen_row(args_.bias + expert * experts_.hidden + begin, count, bias_);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = experts_.token_of_row[first + i];
      if (token < 0) continue;
      Real* row = c_ + i * columns_;
      if (args_.bias != nullptr) experts_.table.axpy(Real(1), bias_, count, row);
      const Real s = args_.weighted ? experts_.weight_of_row[first + i] : Real(1);
      experts_.table.axpy(s, row, count, sum_ + token * columns_);
    }
  }

  const Experts<Storage>& experts_;
  const TokenReduction<Storage>& args_;
  const std::vector<RowBlock>& blocks_;
  int64_t columns_;
  BlockGemm<Storage> gemm_;
  Real *c_, *bias_, *sum_;
};

template <typename Storage>
bool reduce_to_tokens(const Experts<Storage>& experts, const TokenReduction<Storage>& args, const ThreadPool& pool) {
  const int64_t columns = TokenReducer<Storage>::columns_per_unit(experts, std::max(pool.num_threads(), 1));
  const int64_t max_rows = BlockGemm<Storage>::max_rows(experts.table, args.k);
  auto blocks = row_blocks(experts.offsets.data(), experts.layer.plan.num_experts, max_rows);
  if (experts.layer.plan.top_k == 1) blocks = costliest_first(std::move(blocks));
  return run_units(
      pool, ceil_div(experts.hidden, columns), TokenReducer<Storage>::scratch_bytes(experts, columns, max_rows, args.k),
      [&](Arena& arena) { return TokenReducer<Storage>(experts, args, blocks, columns, max_rows, arena); });
}

}  // namespace moe
