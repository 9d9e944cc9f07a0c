#include "experts.h"
#include "gate_up.h"
#include "gemm/bgrad.h"
#include "gemm/wgrad.h"
#include "moe/experts.h"
#include "reduce_to_tokens.h"

namespace moe {
namespace {

// P = W2^T dO, and from it and H, in one pass: dH = d act(s P, H), A' = s act(H), and the parts of ds = <P, act(H)>.
template <typename Storage>
struct DownBackward {
  using Real = Wide<Storage>;
  Storage* grad_pre_activation;     // [R, P], or null
  Storage* scaled_activated;        // [R, I], or null
  Real* weight_parts;               // [blocks, R], or null: ds over one block of columns each, to be added in order
  const Storage* pre_activation;    // [R, P]
  const Storage* const* grad_rows;  // [R] rows of dO
};

template <typename Storage>
class DownBackwardWorker {
  using Real = Wide<Storage>;

 public:
  static constexpr int64_t kColumnsPerUnit = 192;  // a multiple of every tile's rows and of the widest panel

  static size_t scratch_bytes(const Experts<Storage>& experts, int64_t max_rows) {
    return BlockGemm<Storage>::scratch_bytes(experts.table, max_rows, experts.hidden, kColumnsPerUnit) +
           Arena::size_of_block<Real>(max_rows * kColumnsPerUnit) +
           Arena::size_of_block<Real>(kBuffers * kColumnsPerUnit);
  }

  DownBackwardWorker(const Experts<Storage>& experts, const DownBackward<Storage>& args, const std::vector<Unit>& units,
                     int64_t max_rows, Arena& arena)
      : experts_(experts),
        args_(args),
        units_(units),
        gemm_(experts.table, arena, max_rows, experts.hidden, kColumnsPerUnit) {
    c_ = arena.take<Real>(max_rows * kColumnsPerUnit);
    buffers_ = arena.take<Real>(kBuffers * kColumnsPerUnit);
  }

  void run(int64_t index, int64_t upcoming) {
    const auto& [rows, block, begin, count] = units_[index];
    const Weight<Storage> weight = transposed(experts_.down_proj(rows.expert));
    if (loaded_ != rows.first) {
      gemm_.load_rows(args_.grad_rows + rows.first, rows.rows, experts_.hidden, weight.layout,
                      experts_.layer.row_invariant);
      loaded_ = rows.first;
    }
    gemm_.multiply(weight, Columns{{begin, 0}, count, 1}, c_, kColumnsPerUnit,
                   upcoming < 0 ? nullptr : first_column(units_[upcoming]));
    for (int64_t i = 0; i < rows.rows; ++i) finish_row(rows.first + i, block, begin, count, c_ + i * kColumnsPerUnit);
  }

 private:
  static constexpr int64_t kBuffers = 7;

  // The column of the weight with which a unit begins.
  const Storage* first_column(const Unit& unit) const {
    return transposed(experts_.down_proj(unit.rows.expert)).column(unit.begin);
  }

  void finish_row(int64_t r, int64_t block, int64_t begin, int64_t count, Real* p) {
    const auto buffer = [&](int64_t i) { return buffers_ + i * kColumnsPerUnit; };
    Real *gate = buffer(0), *up = buffer(1), *activated = buffer(2), *grad_gate = buffer(3), *grad_up = buffer(4);
    Real* spare = buffer(5);  // two buffers long
    const Storage* saved = args_.pre_activation + r * experts_.pre_activation;
    experts_.layout.read(saved, begin, count, gate, up, spare);
    experts_.table.activate(experts_.layer.activation, gate, up, count, activated);
    if (args_.weight_parts != nullptr) {
      args_.weight_parts[block * experts_.rows + r] = experts_.table.dot_row(p, activated, count);
    }
    const Real s = experts_.weight_of_row[r];
    if (args_.grad_pre_activation != nullptr) {
      experts_.table.scale(s, count, p);
      experts_.table.activate_backward(experts_.layer.activation, p, gate, up, count, grad_gate, grad_up);
      Storage* grad = args_.grad_pre_activation + r * experts_.pre_activation;
      experts_.layout.write(grad_gate, grad_up, begin, count, grad, spare);
    }
    if (args_.scaled_activated != nullptr) {
      experts_.table.scale(s, count, activated);
      experts_.table.narrow_row(activated, count, args_.scaled_activated + r * experts_.intermediate + begin);
    }
  }

  const Experts<Storage>& experts_;
  const DownBackward<Storage>& args_;
  const std::vector<Unit>& units_;
  BlockGemm<Storage> gemm_;
  Real *c_, *buffers_;
  int64_t loaded_ = -1;  // first row of the block that gemm_ holds
};

template <typename Storage>
bool down_backward(const Experts<Storage>& experts, const DownBackward<Storage>& args, const ThreadPool& pool) {
  const int64_t max_rows = BlockGemm<Storage>::max_rows(experts.table, experts.hidden);
  const auto units = units_of(row_blocks(experts.offsets.data(), experts.layer.plan.num_experts, max_rows),
                              experts.intermediate, DownBackwardWorker<Storage>::kColumnsPerUnit);
  return run_units(
      pool, static_cast<int64_t>(units.size()), DownBackwardWorker<Storage>::scratch_bytes(experts, max_rows),
      [&](Arena& arena) { return DownBackwardWorker<Storage>(experts, args, units, max_rows, arena); },
      UnitOrder::kFromBothEnds);
}

// ds[t, k] = its parts, added in order (+ <dO_t, b2_e>); 0 for a slot without a row.
template <typename Storage>
bool reduce_weight_parts(const Experts<Storage>& experts, const Wide<Storage>* parts, const Storage* const* grad_rows,
                         Wide<Storage>* grad_topk_weights, const ThreadPool& pool) {
  using Real = Wide<Storage>;
  const PlanView& plan = experts.layer.plan;
  const int64_t blocks = ceil_div(experts.intermediate, DownBackwardWorker<Storage>::kColumnsPerUnit);
  const Storage* bias = static_cast<const Storage*>(experts.layer.down_bias);
  struct Worker {
    const Experts<Storage>& experts;
    const Storage* const* grad_rows;
    const Storage* bias;
    Real *sums, *grad, *bias_row;

    void run(int64_t expert) {
      if (bias == nullptr) return;
      experts.table.widen_row(bias + expert * experts.hidden, experts.hidden, bias_row);
      for (int64_t r = experts.offsets[expert]; r < experts.offsets[expert + 1]; ++r) {
        experts.table.widen_row(grad_rows[r], experts.hidden, grad);
        sums[r] += experts.table.dot_row(grad, bias_row, experts.hidden);
      }
    }
  };
  std::vector<Real> sums(static_cast<size_t>(experts.rows));
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t r = experts.offsets.front(); r < experts.offsets.back(); ++r) sums[r] += parts[b * experts.rows + r];
  }
  if (!run_units(pool, plan.num_experts, 2 * Arena::size_of_block<Real>(experts.hidden), [&](Arena& arena) {
        Real* grad = arena.take<Real>(experts.hidden);
        return Worker{experts, grad_rows, bias, sums.data(), grad, arena.take<Real>(experts.hidden)};
      })) {
    return false;
  }
  for (int64_t slot = 0; slot < num_slots(plan); ++slot) {
    const int64_t row = row_of(plan, slot);
    grad_topk_weights[slot] = row < 0 ? Real(0) : sums[row];
  }
  return true;
}

template <typename Storage>
bool backward(const ExpertsBackwardArgs& args, const ThreadPool& pool) {
  using Real = Wide<Storage>;
  const Experts<Storage> experts(args.layer);
  const bool in_out = args.layer.weight_layout == WeightLayout::kInOut;
  const int64_t num_experts = args.layer.plan.num_experts, width = experts.pre_activation;
  const std::vector<Storage> zeros(static_cast<size_t>(experts.hidden));
  const auto hidden_rows = experts.gather(args.layer.hidden_states, zeros.data());
  const auto grad_rows = experts.gather(args.grad_output, zeros.data());

  // 1. H, again if it was not saved.
  const Storage* pre_activation = static_cast<const Storage*>(args.pre_activation);
  const Scratch<Storage> recomputed(pre_activation == nullptr ? experts.rows * width : 0);
  if (!recomputed) return false;
  if (pre_activation == nullptr) {
    if (!gate_up<Storage>(experts, {recomputed.get(), nullptr, hidden_rows.data()}, pool)) return false;
    pre_activation = recomputed.get();
  }

  // 2. dH, A' and the parts of ds.
  const bool needs_dh = args.grad_hidden_states || args.grad_gate_up_proj || args.grad_gate_up_bias;
  const int64_t blocks = ceil_div(experts.intermediate, DownBackwardWorker<Storage>::kColumnsPerUnit);
  const Scratch<Storage> dh(needs_dh ? experts.rows * width : 0);
  Scratch<Storage> scaled(args.grad_down_proj ? experts.rows * experts.intermediate : 0);
  const Scratch<Real> parts(args.grad_topk_weights ? blocks * experts.rows : 0);
  if (!dh || !scaled || !parts) return false;
  const auto wanted = [](auto* scratch, bool want) { return want ? scratch : nullptr; };
  if (needs_dh || args.grad_down_proj || args.grad_topk_weights) {
    const DownBackward<Storage> down{wanted(dh.get(), needs_dh), wanted(scaled.get(), args.grad_down_proj != nullptr),
                                     wanted(parts.get(), args.grad_topk_weights != nullptr), pre_activation,
                                     grad_rows.data()};
    if (!down_backward(experts, down, pool)) return false;
  }
  if (args.grad_topk_weights != nullptr &&
      !reduce_weight_parts(experts, parts.get(), grad_rows.data(), static_cast<Real*>(args.grad_topk_weights), pool)) {
    return false;
  }

  // 3. dW2 = sum dO A'^T; in_out holds the transpose. Its operand is freed before the next step.
  const auto wgrad = [&](void* output, const auto& out_rows, int64_t out, const auto& in_rows, int64_t in) {
    const Storage *const *lhs = out_rows.data(), *const *rhs = in_rows.data();
    if (in_out) std::swap(lhs, rhs), std::swap(out, in);
    return run_wgrad<Storage>(
        {static_cast<Storage*>(output), lhs, rhs, experts.offsets.data(), num_experts, out, in, args.accumulate}, pool);
  };
  if (args.grad_down_proj != nullptr) {
    const auto scaled_rows = experts.consecutive(scaled.get(), experts.intermediate);
    if (!wgrad(args.grad_down_proj, grad_rows, experts.hidden, scaled_rows, experts.intermediate)) return false;
  }
  scaled = Scratch<Storage>(0);

  // 4. dX = sum over its rows of W1^T dH.
  const auto dh_rows = experts.consecutive(dh.get(), width);
  if (args.grad_hidden_states != nullptr &&
      !reduce_to_tokens<Storage>(experts,
                                 {static_cast<Storage*>(args.grad_hidden_states), dh_rows.data(),
                                  &Experts<Storage>::gate_up_proj, true, nullptr, false, width},
                                 pool)) {
    return false;
  }

  // 5. dW1 = sum dH X^T, and the bias gradients.
  if (args.grad_gate_up_proj != nullptr &&
      !wgrad(args.grad_gate_up_proj, dh_rows, width, hidden_rows, experts.hidden)) {
    return false;
  }
  const auto bgrad = [&](void* output, const auto& rows, const Real* row_weights, int64_t n) {
    return output == nullptr ||
           run_bgrad<Storage>(
               {static_cast<Storage*>(output), rows.data(), row_weights, experts.offsets.data(), num_experts, n}, pool);
  };
  return bgrad(args.grad_gate_up_bias, dh_rows, nullptr, width) &&
         bgrad(args.grad_down_bias, grad_rows, experts.weight_of_row.data(), experts.hidden);
}

}  // namespace

Status experts_backward_cpu(const ExpertsBackwardArgs& args, const ThreadPool& pool) {
  const bool ok = dispatch(
      args.layer.dtype, [&]<typename Storage>(std::type_identity<Storage>) { return backward<Storage>(args, pool); });
  return ok ? Status::kOk : Status::kOutOfMemory;
}

}  // namespace moe
