// What happens to a finished tile of a GEMM, for the kernels that stage it in shared memory: bias, activation, its
// backward, accumulation; 16 bytes of columns per thread. Not inlined: the accumulators are dead by then, and one copy
// of the code serves every tile shape.
#pragma once

#include "activation.cuh"
#include "tiles.cuh"

namespace moe::cuda {

constexpr int kGemmThreads = 256;  // of a block, where a kernel does not say otherwise
constexpr int kSlabRows = 64;      // a tile is finished in slabs of this many rows
template <typename T>
constexpr int kUnit = kPiece<T>;  // columns of a thread

// The columns of C of a tile: local column c is first + c, or, when the tile is two runs of `half` columns (a gate part
// and an up part), second + c - half for the upper half. Of each run, `count` columns exist.
struct ColumnTile {
  int64_t first, second, count;
  int half;

  __device__ __forceinline__ int64_t column(int c) const { return c < half ? first + c : second + c - half; }
  // Columns that exist from local column c on, to the end of its run; may be negative.
  __device__ __forceinline__ int64_t left(int c) const { return count - (c < half ? c : c - half); }
};

template <typename T>
struct EpilogueArgs {
  T *output, *pre_activation, *grad_pre_activation;
  Wide<T>* partials;
  const T *bias, *saved;
  const Wide<T>* row_weights;
  RowMap rows;
  Epilogue kind;
  Gate<T> gate;
  bool paired;                                // a tile is a gate part and an up part
  bool accumulate;                            // kStore: added to what is there
  bool whole;                                 // every row and part of a row starts at a multiple of 16 bytes
  int64_t n, width, pre_width, num_partials;  // columns of C, of the output, of the pre-activation

  EpilogueArgs() = default;
  explicit EpilogueArgs(const GemmTask& task)
      : output(static_cast<T*>(task.output)),
        pre_activation(static_cast<T*>(task.pre_activation)),
        grad_pre_activation(static_cast<T*>(task.grad_pre_activation)),
        partials(static_cast<Wide<T>*>(task.partial_grad_weights)),
        bias(static_cast<const T*>(task.bias)),
        saved(static_cast<const T*>(task.saved_pre_activation)),
        row_weights(static_cast<const Wide<T>*>(task.row_weights)),
        rows(task.gather),
        kind(task.epilogue),
        gate(task.activation),
        paired(kind == Epilogue::kActivation && gate.gated && !gate.interleaved),
        accumulate(false),
        n(task.n),
        width(kind == Epilogue::kActivation && gate.gated ? task.n / 2 : task.n),
        pre_width(kind == Epilogue::kActivationBackward && gate.gated ? 2 * task.n : task.n),
        num_partials(gemm_partials(task.n)) {
    whole =
        fits_pieces(width * static_cast<int64_t>(sizeof(T)), output, pre_activation, grad_pre_activation, bias, saved);
  }
  explicit EpilogueArgs(const WgradTask& task) : EpilogueArgs() {
    output = static_cast<T*>(task.output);
    kind = Epilogue::kStore;
    accumulate = task.accumulate;
    n = width = task.n;
    whole = fits_pieces(n * static_cast<int64_t>(sizeof(T)), output);
  }

  // Columns of the output that a tile of `columns` columns of C makes.
  int64_t output_columns(int64_t columns) const { return paired ? columns / 2 : columns; }
  int64_t column_tiles(int64_t columns) const { return ceil_div(paired ? width : n, output_columns(columns)); }
  template <int kColumns>
  __device__ __forceinline__ ColumnTile columns(int64_t tile) const {
    const int half = paired ? kColumns / 2 : kColumns;
    const int64_t first = tile * half, exist = (paired ? width : n) - first;
    return {first, paired ? width + first : 0, exist < half ? exist : half, half};
  }
};

// Local column c of a row of a slab; blocks of 8 columns change places, so that neither the accumulators' stores nor
// the reads of whole rows meet in a bank.
template <typename Real, int kColumns>
__device__ __forceinline__ Real* slab_place(Real* slab, int row, int c) {
  return slab + row * kColumns + (c ^ ((row & 3) * 8));
}

template <typename T, int kColumns>
__device__ __forceinline__ void read_slab(const Wide<T>* slab, int row, int c, Wide<T> (&x)[kUnit<T>]) {
  const Wide<T>* at = slab_place<const Wide<T>, kColumns>(slab, row, c);
#pragma unroll
  for (int i = 0; i < kUnit<T>; i += kPiece<Wide<T>>) {
    struct alignas(kPieceBytes) Piece {
      Wide<T> x[kPiece<Wide<T>>];
    };
    const Piece piece = *reinterpret_cast<const Piece*>(at + i);
#pragma unroll
    for (int j = 0; j < kPiece<Wide<T>>; ++j) x[i + j] = piece.x[j];
  }
}

// The first `count` of a unit in global memory; `whole` promises that the address is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_unit(const T* p, int64_t count, bool whole, Wide<T> (&x)[kUnit<T>]) {
  if (whole && count >= kUnit<T>) return load<kUnit<T>>(p).unpack(x);
#pragma unroll
  for (int i = 0; i < kUnit<T>; ++i) x[i] = i < count ? widen(p[i]) : Wide<T>{0};
}
template <typename T>
__device__ __forceinline__ void store_unit(T* p, int64_t count, bool whole, const Wide<T> (&x)[kUnit<T>]) {
  if (whole && count >= kUnit<T>) return store<T>(p, x);
#pragma unroll
  for (int i = 0; i < kUnit<T>; ++i) {
    if (i < count) p[i] = narrow<T>(x[i]);
  }
}

// A unit of gates and one of ups, from column i of the activation on, of one row of a pre-activation. NOTE: in place of
// `saved`, each element is written by the thread that read it.
template <typename T>
struct GateUpRow {
  const EpilogueArgs<T>& args;
  int64_t row, i, count;

  template <typename Row, typename Fn>
  __device__ __forceinline__ void visit(Row* matrix, const Fn& fn) const {
    Row* at = matrix + row * args.pre_width;
    if (!args.gate.gated) return fn(at + i, count, 0);
    if (!args.gate.interleaved) {
      fn(at + i, count, 0);
      return fn(at + args.width + i, count, 1);
    }
    fn(at + 2 * i, 2 * count, 0);
    fn(at + 2 * i + kUnit<T>, 2 * count - kUnit<T>, 1);
  }
  __device__ __forceinline__ void load(const T* matrix, Wide<T> (&gate)[kUnit<T>], Wide<T> (&up)[kUnit<T>]) const {
    Wide<T> parts[2][kUnit<T>] = {};
    visit(matrix, [&](const T* p, int64_t n, int part) { load_unit(p, n, args.whole, parts[part]); });
    split(parts, gate, up);
  }
  __device__ __forceinline__ void split(const Wide<T> (&parts)[2][kUnit<T>], Wide<T> (&gate)[kUnit<T>],
                                        Wide<T> (&up)[kUnit<T>]) const {
#pragma unroll
    for (int j = 0; j < kUnit<T>; ++j) {
      gate[j] = args.gate.interleaved ? parts[2 * j / kUnit<T>][2 * j % kUnit<T>] : parts[0][j];
      up[j] = args.gate.interleaved ? parts[2 * j / kUnit<T>][2 * j % kUnit<T> + 1] : parts[1][j];
    }
  }
  __device__ __forceinline__ void store(T* matrix, const Wide<T> (&gate)[kUnit<T>],
                                        const Wide<T> (&up)[kUnit<T>]) const {
    Wide<T> parts[2][kUnit<T>];
#pragma unroll
    for (int j = 0; j < kUnit<T>; ++j) {
      if (args.gate.interleaved) {
        parts[2 * j / kUnit<T>][2 * j % kUnit<T>] = gate[j];
        parts[2 * j / kUnit<T>][2 * j % kUnit<T> + 1] = up[j];
      } else {
        parts[0][j] = gate[j];
        parts[1][j] = up[j];
      }
    }
    visit(matrix, [&](T* p, int64_t n, int part) { store_unit(p, n, args.whole, parts[part]); });
  }
};

template <typename T>
__device__ __forceinline__ void add_bias(const EpilogueArgs<T>& args, int32_t expert, int64_t column, int64_t count,
                                         Wide<T> (&x)[kUnit<T>]) {
  if (args.bias == nullptr) return;
  Wide<T> bias[kUnit<T>];
  load_unit(args.bias + expert * args.n + column, count, args.whole, bias);
#pragma unroll
  for (int j = 0; j < kUnit<T>; ++j) x[j] += bias[j];
}

// Calls fn(act, units, unroll) for units of values; unroll is how often its loop over their elements is unrolled. The
// usual activation has them in registers. Any other one loops over a copy in local memory: unrolled,
// those would be nine tenths of a kernel's code, and of the time to compile it.
template <typename Real, int kUnits, int kCount, typename Fn>
__device__ __forceinline__ void with_units(Activation kind, Real (&units)[kUnits][kCount], const Fn& fn) {
  if (kind == Activation::kSwiGLU || kind == Activation::kSiLU) {
    return fn(SiLU{}, units, std::integral_constant<int, kCount>{});
  }
  Real copy[kUnits][kCount];
#pragma unroll
  for (int i = 0; i < kUnits * kCount; ++i) copy[i / kCount][i % kCount] = units[i / kCount][i % kCount];
  with_activation(kind, [&](auto act) { fn(act, copy, std::integral_constant<int, 1>{}); });
#pragma unroll
  for (int i = 0; i < kUnits * kCount; ++i) units[i / kCount][i % kCount] = copy[i / kCount][i % kCount];
}

// Calls fn(row, c) for the thread's units of a slab, c every `step` columns up to `columns`; the threads of the slab
// are kThreads consecutive ones, a multiple of it from 0 on. All threads of a warp make the same number of calls.
template <int kThreads, typename Fn>
__device__ __forceinline__ void for_units(int columns, int step, const Fn& fn) {
  const int per_row = columns / step;
  for (int unit = static_cast<int>(threadIdx.x) % kThreads; unit < kSlabRows * per_row; unit += kThreads) {
    fn(unit / per_row, unit % per_row * step);
  }
}

template <typename T, int kColumns, int kThreads>
__device__ __forceinline__ void finish_store(const EpilogueArgs<T>& args, const Wide<T>* slab, int64_t first_row,
                                             int64_t rows, int32_t expert, const ColumnTile& columns) {
  for_units<kThreads>(kColumns, kUnit<T>, [&](int row, int c) {
    const int64_t count = columns.left(c);
    if (row >= rows || count <= 0) return;
    Wide<T> x[kUnit<T>];
    read_slab<T, kColumns>(slab, row, c, x);
    add_bias(args, expert, columns.column(c), count, x);
    T* at = args.output + (first_row + row) * args.n + columns.column(c);
    if (args.accumulate) {
      Wide<T> old[kUnit<T>];
      load_unit<T>(at, count, args.whole, old);
#pragma unroll
      for (int j = 0; j < kUnit<T>; ++j) x[j] += old[j];
    }
    store_unit(at, count, args.whole, x);
  });
}

template <typename T, int kColumns, int kThreads>
__device__ __forceinline__ void finish_activation(const EpilogueArgs<T>& args, const Wide<T>* slab, int64_t first_row,
                                                  int64_t rows, int32_t expert, const ColumnTile& columns) {
  const bool interleaved = args.gate.interleaved;
  for_units<kThreads>(columns.half, interleaved ? 2 * kUnit<T> : kUnit<T>, [&](int row, int c) {
    const int c_up = c + (interleaved ? kUnit<T> : columns.half);
    // `i` counts columns of the activation; interleaved, they are half as many as those of C.
    const int64_t column = columns.column(c), count = interleaved ? columns.left(c) / 2 : columns.left(c);
    if (row >= rows || count <= 0) return;
    const GateUpRow<T> at{args, first_row + row, interleaved ? column / 2 : column, count};
    Wide<T> parts[2][kUnit<T>] = {}, units[2][kUnit<T>];
    read_slab<T, kColumns>(slab, row, c, parts[0]);
    add_bias(args, expert, column, columns.left(c), parts[0]);
    if (args.gate.gated) {
      read_slab<T, kColumns>(slab, row, c_up, parts[1]);
      add_bias(args, expert, columns.column(c_up), columns.left(c_up), parts[1]);
    }
    at.split(parts, units[0], units[1]);
    if (args.pre_activation != nullptr) at.store(args.pre_activation, units[0], units[1]);
    if (args.output == nullptr) return;
    with_units(args.gate.kind, units, [&]<int kUnroll>(auto act, auto& x, std::integral_constant<int, kUnroll>) {
#pragma unroll kUnroll
      for (int j = 0; j < kUnit<T>; ++j) x[0][j] = activate<T>(act, args.gate, x[0][j], x[1][j]);
    });
    store_unit(args.output + at.row * args.width + at.i, count, args.whole, units[0]);
  });
}

template <typename T, int kColumns, int kThreads>
__device__ __forceinline__ void finish_backward(const EpilogueArgs<T>& args, const Wide<T>* slab, int64_t first_row,
                                                int64_t rows, const ColumnTile& columns) {
  constexpr int kLanes = kPartialColumns / kUnit<T>;  // neighbours, whose units make one partial sum
  static_assert(kLanes <= 32, "a partial sum is a shuffle within a warp");
  for_units<kThreads>(kColumns, kUnit<T>, [&](int row, int c) {
    const int64_t count = columns.left(c);
    Wide<T> sum = 0;
    if (row < rows && count > 0) {
      const int64_t slot = args.rows.slot(first_row + row);
      const Wide<T> s = slot < 0 ? Wide<T>{0} : args.row_weights[slot];
      const GateUpRow<T> at{args, first_row + row, columns.column(c), count};
      Wide<T> p[kUnit<T>], units[3][kUnit<T>];  // s p and then the activation, gate and up and then their gradients
      read_slab<T, kColumns>(slab, row, c, p);
      at.load(args.saved, units[1], units[2]);
#pragma unroll
      for (int j = 0; j < kUnit<T>; ++j) units[0][j] = s * p[j];
      with_units(args.gate.kind, units, [&]<int kUnroll>(auto act, auto& x, std::integral_constant<int, kUnroll>) {
#pragma unroll kUnroll
        for (int j = 0; j < kUnit<T>; ++j) {
          const ActivationGrad<T> grad = activate_backward<T>(act, args.gate, x[0][j], x[1][j], x[2][j]);
          x[0][j] = grad.value;
          x[1][j] = grad.grad_gate;
          x[2][j] = grad.grad_up;
        }
      });
#pragma unroll
      for (int j = 0; j < kUnit<T>; ++j) {
        if (j < count) sum += p[j] * units[0][j];
        units[0][j] *= s;
      }
      if (args.grad_pre_activation != nullptr) at.store(args.grad_pre_activation, units[1], units[2]);
      if (args.output != nullptr) store_unit(args.output + at.row * args.width + at.i, count, args.whole, units[0]);
    }
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (args.partials != nullptr && c % kPartialColumns == 0 && row < rows && count > 0) {
      args.partials[(first_row + row) * args.num_partials + columns.column(c) / kPartialColumns] = sum;
    }
  });
}

// Rows [first_row, first_row + rows) of a tile, rows <= kSlabRows; the first of them is row 0 of `slab`. kStores: as
// kStore, whatever the arguments say.
template <typename T, int kColumns, int kThreads = kGemmThreads, bool kStores = false>
__device__ __attribute__((noinline)) void finish_slab(const EpilogueArgs<T>* args, const Wide<T>* slab,
                                                      int64_t first_row, int64_t rows, int32_t expert,
                                                      int64_t column_tile) {
  const ColumnTile columns = args->template columns<kColumns>(column_tile);
  if (kStores || args->kind == Epilogue::kStore) {
    return finish_store<T, kColumns, kThreads>(*args, slab, first_row, rows, expert, columns);
  }
  if constexpr (!kStores) {
    if (args->kind == Epilogue::kActivation)
      finish_activation<T, kColumns, kThreads>(*args, slab, first_row, rows, expert, columns);
    else
      finish_backward<T, kColumns, kThreads>(*args, slab, first_row, rows, columns);
  }
}

// Zeros for the rows of no expert: before the first offset and after the last. By all blocks of the grid.
template <typename T>
__device__ __attribute__((noinline)) void zero_unowned_rows(const EpilogueArgs<T>* args, const TileSchedule* schedule,
                                                            int64_t num_rows, int64_t num_experts) {
  const int64_t before = schedule->offsets[0], after = schedule->offsets[num_experts];
  const auto zero = [&](T* matrix, int64_t width) {
    if (matrix == nullptr) return;
    const int64_t skipped = (after - before) * width, count = num_rows * width - skipped;
    for (int64_t i = int64_t{blockIdx.x} * kGemmThreads + threadIdx.x; i < count;
         i += int64_t{gridDim.x} * kGemmThreads) {
      matrix[i < before * width ? i : i + skipped] = narrow<T>(Wide<T>{0});
    }
  };
  zero(args->output, args->width);
  zero(args->pre_activation, args->pre_width);
  zero(args->grad_pre_activation, args->pre_width);
}

}  // namespace moe::cuda
