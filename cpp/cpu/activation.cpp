#include "moe/activation.h"

#include "experts.h"
#include "units.h"

namespace moe {
namespace {

// Rows are cut into pieces of this many activations, which fit the first-level cache.
constexpr int64_t kPiece = 512;

// Calls fn(row, begin, count, layout, buffers) for each piece of each row; `buffers` has seven runs of kPiece numbers.
template <typename Storage, typename Args, typename Fn>
bool for_pieces(const Args& args, const ThreadPool& pool, const Fn& fn) {
  using Real = Wide<Storage>;
  struct Worker {
    const Args& args;
    const Fn& fn;
    GateLayoutView<Storage> layout;
    Real* buffers;
    int64_t rows_per_unit;

    void run(int64_t unit) const {
      const int64_t last = std::min(args.num_rows, (unit + 1) * rows_per_unit);
      for (int64_t r = unit * rows_per_unit; r < last; ++r) {
        for (int64_t i = 0; i < args.intermediate_size; i += kPiece) {
          fn(r, i, std::min(kPiece, args.intermediate_size - i), layout, buffers);
        }
      }
    }
  };
  const int64_t rows_per_unit = std::max<int64_t>(1, 16 * kPiece / std::max<int64_t>(args.intermediate_size, 1));
  return run_units(pool, ceil_div(args.num_rows, rows_per_unit), Arena::size_of_block<Real>(7 * kPiece),
                   [&](Arena& arena) {
                     const GateLayoutView<Storage> layout(kernels<Storage>(), args.options, args.intermediate_size);
                     return Worker{args, fn, layout, arena.take<Real>(7 * kPiece), rows_per_unit};
                   });
}

template <typename Storage>
bool forward(const ActivationArgs& args, const ThreadPool& pool) {
  using Real = Wide<Storage>;
  const auto& table = kernels<Storage>();
  const int64_t width = pre_activation_size(args.options.activation, args.intermediate_size);
  return for_pieces<Storage>(args, pool, [&](int64_t r, int64_t begin, int64_t count, const auto& layout, Real* at) {
    Real *gate = at, *up = at + kPiece, *spare = at + 2 * kPiece;
    layout.read(static_cast<const Storage*>(args.pre_activation) + r * width, begin, count, gate, up, spare);
    table.activate(args.options, gate, up, count, gate);
    table.narrow_row(gate, count, static_cast<Storage*>(args.output) + r * args.intermediate_size + begin);
  });
}

template <typename Storage>
bool backward(const ActivationBackwardArgs& args, const ThreadPool& pool) {
  using Real = Wide<Storage>;
  const auto& table = kernels<Storage>();
  const int64_t width = pre_activation_size(args.options.activation, args.intermediate_size);
  return for_pieces<Storage>(args, pool, [&](int64_t r, int64_t begin, int64_t count, const auto& layout, Real* at) {
    Real *gate = at, *up = at + kPiece, *grad = at + 2 * kPiece, *spare = at + 3 * kPiece;
    Real *grad_gate = at + 5 * kPiece, *grad_up = at + 6 * kPiece;
    layout.read(static_cast<const Storage*>(args.pre_activation) + r * width, begin, count, gate, up, spare);
    table.widen_row(static_cast<const Storage*>(args.grad_output) + r * args.intermediate_size + begin, count, grad);
    table.activate_backward(args.options, grad, gate, up, count, grad_gate, grad_up);
    Storage* out = static_cast<Storage*>(args.grad_pre_activation) + r * width;
    layout.write(grad_gate, grad_up, begin, count, out, spare);
  });
}

}  // namespace

Status activation_cpu(const ActivationArgs& args, const ThreadPool& pool) {
  const bool ok =
      dispatch(args.dtype, [&]<typename Storage>(std::type_identity<Storage>) { return forward<Storage>(args, pool); });
  return ok ? Status::kOk : Status::kOutOfMemory;
}

Status activation_backward_cpu(const ActivationBackwardArgs& args, const ThreadPool& pool) {
  const bool ok = dispatch(
      args.dtype, [&]<typename Storage>(std::type_identity<Storage>) { return backward<Storage>(args, pool); });
  return ok ? Status::kOk : Status::kOutOfMemory;
}

}  // namespace moe
