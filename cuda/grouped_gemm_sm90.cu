// The grouped GEMM of sm_90a: TMA, mbarriers and wgmma, one persistent block per SM.
#include "grouped_gemm_sm90_backward.cuh"
#include "grouped_gemm_sm90_epilogue.cuh"
#include "grouped_gemm_sm90_maps.h"
#include "grouped_gemm_sm90_math.cuh"
#include "grouped_gemm_sm90_walk.cuh"
#include "tiles.cuh"

namespace moe::cuda {
namespace sm90 {
namespace {

template <typename Tile, typename T>
__device__ __forceinline__ void produce(Shared<Tile>& shared, const GemmMaps& maps, const GemmArgs<T>& args) {
  Filler<Tile> filler(shared);
  TileWalk<Tile::kBlocks> walk(args.schedule, args.num_experts, args.column_tiles);
  TileAt at;
  if (!Tile::kGathers || args.gather.row_to_slot == nullptr) {
    if (threadIdx.x >= 32) return;
    while (walk.next(at)) {
      if (threadIdx.x != 0) continue;
      for (int k = 0; k < args.k; k += kDepth, filler.advance()) {
        filler.acquire();
        filler.expect(at.rows > 0 ? Tile::kStageBytes : 0);
        if (at.rows == 0) continue;
        ptx::tma_load_3d(filler.rows(), &maps.rows, filler.barrier(), k, 0, at.first_row);
        load_weight(filler, maps.weight, args, at, k);
      }
    }
    return;
  }
  if constexpr (Tile::kGathers) {
    RowCopier<T, kTileRows> copier(args.rows, args.k);
    while (walk.next(at)) {
      copier.set_rows([&](int r) { return source_row(args.gather, r); }, at.first_row, at.rows);
      for (int k = 0; k < args.k; k += kDepth) {
        filler.acquire();
        if (threadIdx.x == 0) {
          filler.expect(at.rows > 0 ? Tile::kColumnBytes : 0);
          if (at.rows > 0) load_weight(filler, maps.weight, args, at, k);
        }
        copier.copy(filler.rows(), k);
        filler.commit_copies();
      }
    }
    filler.finish_copies();
  }
}

// Bias and stores, with an activation between them or not, of 64 rows of a tile of which `rows` exist.
template <typename Tile, typename T, Epilogue kEpilogue>
__device__ __forceinline__ void finish(float (&sums)[Tile::kSums], Slabs<Tile>& slabs, const GemmMaps& maps,
                                       const GemmArgs<T>& args, const TileAt& at, int row, int rows) {
  const int64_t parts = args.concat ? 2 : 1;
  const int64_t output_columns = kEpilogue == Epilogue::kActivation && args.gate.gated ? args.n / 2 : args.n;
  const Destination<T> output{&maps.output, args.output, output_columns, output_columns};
  add_bias<Tile>(sums, args, at.expert, at.column_tile);
  if constexpr (kEpilogue == Epilogue::kStore) {
    store_columns<Tile, T>(sums, slabs, output, false, at.column_tile, row, rows);
  } else {
    const Destination<T> pre_activation{&maps.pre_activation, args.pre_activation, args.n, args.n / parts};
    if (args.pre_activation != nullptr) {
      store_columns<Tile, T>(sums, slabs, pre_activation, args.concat, at.column_tile, row, rows);
    }
    if (args.output != nullptr) {
      with_sums(args.gate.kind, sums, [&]<int kUnroll>(auto act, auto& all, std::integral_constant<int, kUnroll>) {
        activate_each<kUnroll, T>(act, all, args.gate);
      });
      store_activations<Tile, T>(sums, slabs, output, args.gate, at.column_tile, row, rows);
    }
  }
}

template <typename Tile, typename T, Epilogue kEpilogue>
__device__ __forceinline__ void consume(Shared<Tile>& shared, const GemmMaps& maps, const GemmArgs<T>& args) {
  constexpr bool kBackward = kEpilogue == Epilogue::kActivationBackward;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1, first_part = Tile::kTurns ? 0 : group;
  const int steps = static_cast<int>((args.k + kDepth - 1) / kDepth);
  Slabs<Tile> slabs(shared, group);
  Ring<Tile::kStages> ring;
  TileWalk<Tile::kBlocks> walk(args.schedule, args.num_experts, args.column_tiles);
  TileAt at;
  SavedRows<Tile, T> saved(shared, maps, args, group);
  const Turns<Tile> turns(shared, group);
  while (walk.next(at)) {
    const int count = walk.before();
    if (!turns.has(count)) continue;
    if (Tile::kTurns) ring = Ring<Tile::kStages>::after(static_cast<uint32_t>(count) * static_cast<uint32_t>(steps));
    const int row = at.first_row + first_part * kGroupRows, rows = at.rows - first_part * kGroupRows;
    if (rows <= 0) {
      turns.wait(count);
      skip<Tile>(shared, ring, steps);
      turns.pass();
      continue;
    }
    if constexpr (kBackward) saved.load(row, at.column_tile);
    // An accumulator that is not defined on entry makes ptxas serialise the wgmmas.
    float sums[Tile::kParts][Tile::kSums] = {};
    turns.wait(count);
    const auto issued = [&] { turns.pass(); };
    if (args.in_out)
      multiply<Tile, T, false, true>(sums, shared, ring, steps, first_part, issued);
    else
      multiply<Tile, T, false, false>(sums, shared, ring, steps, first_part, issued);
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const int skipped = part * kGroupRows;
      if (rows <= skipped) break;
      if constexpr (kBackward) {
        if (part > 0) saved.load(row + skipped, at.column_tile);
        saved.finish(sums[part], row + skipped, rows - skipped, at.column_tile);
      } else {
        finish<Tile, T, kEpilogue>(sums[part], slabs, maps, args, at, row + skipped, rows - skipped);
      }
    }
  }
  if (is_group_leader()) ptx::tma_store_wait<0>();
}

template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void zero_rows_outside(const GemmArgs<T>& args) {
  const int first = __ldg(args.schedule.offsets), last = __ldg(args.schedule.offsets + args.num_experts);
  const bool halved = kEpilogue == Epilogue::kActivation && args.gate.gated;
  const int64_t output_bytes = (halved ? args.n / 2 : args.n) * sizeof(T);
  const int64_t pre_columns = kEpilogue == Epilogue::kActivationBackward && args.gate.gated ? 2 * args.n : args.n;
  zero_rows(args.output, output_bytes, 0, first);
  zero_rows(args.output, output_bytes, last, args.num_rows);
  zero_rows(args.pre_activation, pre_columns * sizeof(T), 0, first);
  zero_rows(args.pre_activation, pre_columns * sizeof(T), last, args.num_rows);
}

template <typename T, Epilogue kEpilogue, typename Tile>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmMaps maps, const __grid_constant__ GemmArgs<T> args) {
  SMEM_DYN(Shared<Tile>, shared);
  initialise(*shared, Filler<Tile>::arrivals(Tile::kGathers && args.gather.row_to_slot != nullptr));
  after_previous_kernel();
  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<Tile::kProducerRegisters>();
    produce(*shared, maps, args);
  } else {
    ptx::setmaxnreg_inc<Tile::kMathRegisters>();
    zero_rows_outside<T, kEpilogue>(args);
    consume<Tile, T, kEpilogue>(*shared, maps, args);
  }
  finalise<Tile>();
}

template <typename T>
Status encode_maps(const GemmTask& task, const GemmArgs<T>& args, int64_t columns, GemmMaps* maps,
                   const CudaContext& cuda) {
  const int64_t e = task.num_experts, n = task.n, k = task.k, rows = task.num_rows;
  const bool halved = task.epilogue == Epilogue::kActivation && args.gate.gated;
  const int64_t saved_parts = args.gate.gated && !args.gate.interleaved ? 2 : 1;
  const int64_t saved_width = args.gate.gated && args.gate.interleaved ? 2 * n : n;
  const MapShape weight =
      args.in_out ? experts_shape(e, k, n, kDepth) : experts_shape(e, n, k, static_cast<int>(columns / 2));
  Status status = encode_map(&maps->weight, static_cast<const T*>(task.weight), weight, cuda);
  const auto encode = [&](CUtensorMap* map, const void* data, const MapShape& shape) {
    if (status == Status::kOk && data != nullptr) status = encode_map(map, static_cast<const T*>(data), shape, cuda);
  };
  if (task.gather.row_to_slot == nullptr) encode(&maps->rows, task.rows, rows_shape(rows, k, kTileRows));
  encode(&maps->output, task.output, parts_shape(rows, 1, halved ? n / 2 : n));
  if (task.epilogue == Epilogue::kActivation) {
    encode(&maps->pre_activation, task.pre_activation, parts_shape(rows, args.concat ? 2 : 1, args.concat ? n / 2 : n));
  }
  if (task.epilogue == Epilogue::kActivationBackward) {
    encode(&maps->pre_activation, task.grad_pre_activation, parts_shape(rows, saved_parts, saved_width));
    encode(&maps->saved, task.saved_pre_activation, parts_shape(rows, saved_parts, saved_width));
  }
  return status;
}

template <typename T, Epilogue kEpilogue, typename Tile>
Status run(const GemmTask& task, int sms, const CudaContext& cuda) {
  constexpr const char* kName = "gemm_sm90";
  constexpr bool kBackward = kEpilogue == Epilogue::kActivationBackward;
  const Gate<T> gate(task.activation);
  const GemmArgs<T> args{
      .output = static_cast<T*>(task.output),
      .pre_activation = static_cast<T*>(kBackward ? task.grad_pre_activation : task.pre_activation),
      .partials = static_cast<float*>(task.partial_grad_weights),
      .rows = static_cast<const T*>(task.rows),
      .bias = static_cast<const T*>(task.bias),
      .row_weights = static_cast<const float*>(task.row_weights),
      .gather = task.gather,
      .schedule = task.schedule,
      .gate = gate,
      .n = task.n,
      .k = task.k,
      .num_rows = static_cast<int>(task.num_rows),
      .num_experts = static_cast<int>(task.num_experts),
      .column_tiles = static_cast<int>(ceil_div(task.n, Tile::kColumns)),
      .num_partials = static_cast<int>(gemm_partials(task.n)),
      .in_out = task.weight_layout == WeightLayout::kInOut,
      .concat = kEpilogue == Epilogue::kActivation && gate.gated && !gate.interleaved,
  };
  GemmMaps maps{};
  if (const Status status = encode_maps(task, args, Tile::kColumns, &maps, cuda); status != Status::kOk) return status;
  const auto kernel = gemm_sm90_kernel<T, kEpilogue, Tile>;
  constexpr int64_t kBytes = sizeof(Shared<Tile>);
  if (const Status status = allow_shared_memory(kernel, kBytes, kName, cuda); status != Status::kOk) return status;
  const dim3 grid(static_cast<unsigned>(sms / Tile::kBlocks * Tile::kBlocks));
  ptx::Launch launch = overlapping(grid, dim3(kThreads), kBytes, cuda);
  launch.cluster = Tile::kBlocks;
  LAUNCH_EX(kernel, launch, maps, args);
  return launched(kName, cuda);
}

// Wide tiles, unless they are so few that SMs would have none: then the narrow ones read the weights with more SMs.
// Where the contracted width is so short that a main loop takes no longer than an epilogue, the math warpgroups take
// turns. From sizes alone, so that the choice needs nothing from the device and never changes from call to call.
template <typename T, Epilogue kEpilogue>
Status run_tiles(const GemmTask& task, const CudaContext& cuda) {
  constexpr int64_t kShort = 1024;
  int sms = 0;
  const Status status = device_attribute(sms, cudaDevAttrMultiProcessorCount, cuda);
  if (status != Status::kOk) return status;
  if constexpr (kEpilogue == Epilogue::kActivationBackward) {
    return run<T, kEpilogue, BackwardTile>(task, sms, cuda);
  } else {
    const int64_t row_tiles = most_row_tiles(task.schedule, task.num_rows, task.num_experts);
    const bool fill = row_tiles * ceil_div(task.n, WideTile::kColumns) >= sms;
    if constexpr (kEpilogue == Epilogue::kStore) {
      if (fill && task.k < kShort && task.gather.row_to_slot == nullptr) {
        return run<T, kEpilogue, ShortTile>(task, sms, cuda);
      }
    }
    return fill ? run<T, kEpilogue, WideTile>(task, sms, cuda) : run<T, kEpilogue, NarrowTile>(task, sms, cuda);
  }
}

}  // namespace
}  // namespace sm90

Status gemm_sm90(const GemmTask& task, const CudaContext& cuda) {
  if (task.num_rows == 0 || task.n == 0) return Status::kOk;
  if (task.k == 0) return gemm_sm80(task, cuda);  // TMA has no empty tensors
  const auto with = [&]<typename T>(std::type_identity<T>) {
    switch (task.epilogue) {
      case Epilogue::kActivation:
        return sm90::run_tiles<T, Epilogue::kActivation>(task, cuda);
      case Epilogue::kActivationBackward:
        return sm90::run_tiles<T, Epilogue::kActivationBackward>(task, cuda);
      default:
        return sm90::run_tiles<T, Epilogue::kStore>(task, cuda);
    }
  };
  return task.dtype == DType::kFloat16 ? with(std::type_identity<__half>{}) : with(std::type_identity<__nv_bfloat16>{});
}

}  // namespace moe::cuda
