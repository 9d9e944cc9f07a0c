// The weight gradient on sm_90a: dW_e (+)= sum over the rows of e of lhs_r rhs_r^T. The contracted width is the rows of
// an expert, so both operands lie MN-major in shared memory, 64 rows per stage.
//
// Whole stages of an operand that is not gathered come by TMA. Gathered operands and an expert's last rows are copied
// by threads, which write zeros past the expert's end in both operands: zero times the next expert's NaN would be NaN.
#include "grouped_gemm_sm90_maps.h"
#include "grouped_gemm_sm90_math.cuh"
#include "grouped_gemm_sm90_parts.cuh"
#include "grouped_gemm_sm90_producer.cuh"
#include "grouped_gemm_sm90_store.cuh"

namespace moe::cuda {
namespace sm90 {
namespace {

template <typename T>
struct WgradArgs {
  T* output;  // [E, M, N]
  const T *lhs, *rhs;
  Gather lhs_gather, rhs_gather;
  TileSchedule schedule;
  RegisterParts split;
  int64_t m, n;
  int num_experts, row_tiles, column_tiles;  // of the gradient
  bool accumulate;
};

struct WgradMaps {
  CUtensorMap lhs, rhs, output;
};

struct GradientTile {
  int64_t number;
  int expert, m, n;         // its first row and column
  int first_row, num_rows;  // of the expert, that are this part's
  int part, parts;          // 0 parts: another block has all of the tile
};

// Part `index` of the tiles, experts with the most rows first: the longest sums do not start last.
template <typename T>
__device__ __forceinline__ bool tile_at(const WgradArgs<T>& args, int64_t index, GradientTile& at) {
  const int64_t per_expert = int64_t{args.row_tiles} * args.column_tiles;
  at.number = index / args.split.count;
  at.part = static_cast<int>(index % args.split.count);
  if (at.number >= per_expert * args.num_experts) return false;
  const int inside = static_cast<int>(at.number % per_expert);
  at.expert = __ldg(args.schedule.order + at.number / per_expert);
  at.m = inside % args.row_tiles * kTileRows;
  at.n = inside / args.row_tiles * WgradTile::kColumns;
  at.first_row = __ldg(args.schedule.offsets + at.expert);
  at.num_rows = __ldg(args.schedule.offsets + at.expert + 1) - at.first_row;
  at.parts = 1;
  if (args.split.count == 1) return true;
  // As many parts as there are stages, and whole stages to each.
  const int steps = (at.num_rows + kDepth - 1) / kDepth;
  at.parts = max(min(args.split.count, steps), 1);
  const int end = min((at.part + 1) * steps / at.parts * kDepth, at.num_rows),
            begin = at.part * steps / at.parts * kDepth;
  if (at.part >= at.parts) at.parts = 0;
  at.first_row += begin;
  at.num_rows = at.parts == 0 ? 0 : end - begin;
  return true;
}

template <int kFeatures, typename T>
__device__ __forceinline__ void load_rows(uint32_t to, uint32_t barrier, bool by_tma, const CUtensorMap& map,
                                          const T* source, const Gather& gather, int64_t width, int feature,
                                          int first_row, int rows) {
  if (!by_tma) {
    copy_features<T, kFeatures>(to, source, width, gather, first_row, rows, feature);
  } else if (threadIdx.x == 0) {
#pragma unroll
    for (int chunk = 0; chunk < kFeatures / 64; ++chunk) {
      ptx::tma_load_3d(to + chunk * kSlabBytes, &map, barrier, feature + chunk * 64, 0, first_row);
    }
  }
}

template <typename T>
__device__ __forceinline__ void produce(Shared<WgradTile>& shared, const WgradMaps& maps, const WgradArgs<T>& args) {
  Filler<WgradTile> filler(shared);
  GradientTile at;
  for (int64_t index = blockIdx.x; tile_at(args, index, at); index += gridDim.x) {
    for (int done = 0; done < at.num_rows; done += kDepth) {
      const int rows = min(kDepth, at.num_rows - done), first = at.first_row + done;
      const bool whole = rows == kDepth || MOE_BUG(grouped_gemm_sm90, 25);
      const bool lhs_by_tma = whole && args.lhs_gather.row_to_slot == nullptr;
      const bool rhs_by_tma = whole && args.rhs_gather.row_to_slot == nullptr;
      filler.acquire();
      if (threadIdx.x == 0) {
        filler.expect((lhs_by_tma ? WgradTile::kRowBytes : 0) + (rhs_by_tma ? WgradTile::kColumnBytes : 0));
      }
      load_rows<kTileRows>(filler.rows(), filler.barrier(), lhs_by_tma, maps.lhs, args.lhs, args.lhs_gather, args.m,
                           at.m, first, rows);
      load_rows<WgradTile::kColumns>(filler.columns(), filler.barrier(), rhs_by_tma, maps.rhs, args.rhs,
                                     args.rhs_gather, args.n, at.n, first, rows);
      filler.commit_copies();
    }
  }
  filler.finish_copies();
}

// Adds what the gradient holds already.
template <typename T, int kSums>
__device__ __forceinline__ void add_output(float (&sums)[kSums], const WgradArgs<T>& args, const GradientTile& at,
                                           int row) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t m = row + sum_row(h);
    if (m >= args.m) continue;
    const T* output = args.output + (at.expert * args.m + m) * args.n;
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const int64_t n = at.n + sum_column(j);
      if (n >= args.n) continue;
      const float2 old = unpack<T>(*reinterpret_cast<const uint32_t*>(output + n));
      sums[4 * j + 2 * h] += old.x, sums[4 * j + 2 * h + 1] += old.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ void consume(Shared<WgradTile>& shared, const WgradMaps& maps, const WgradArgs<T>& args) {
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const Destination<T> output{&maps.output, args.output, args.n, args.n};
  Slabs<WgradTile> slabs(shared, group);
  Ring<WgradTile::kStages> ring;
  GradientTile at;
  for (int64_t index = blockIdx.x; tile_at(args, index, at); index += gridDim.x) {
    const int row = at.m + group * kGroupRows, steps = (at.num_rows + kDepth - 1) / kDepth;
    if (row >= args.m || at.parts == 0 || (steps == 0 && args.accumulate)) {
      skip(shared, ring, steps);
      continue;
    }
    float sums[1][WgradTile::kSums] = {};
    if (steps > 0) multiply<WgradTile, T, true, true>(sums, shared, ring, steps, group, [] {});
    if (at.parts > 1 && !add_parts(sums[0], shared, args.split, at.number, group, at.part, at.parts)) continue;
    if (args.accumulate) add_output(sums[0], args, at, row);
    const auto store = [&]<int kSlab>(std::integral_constant<int, kSlab>) {
      if (at.n + kSlab * 64 >= args.n) return;
      // The map cuts rows past M off: a slab is always whole here.
      slabs.store_at(output, at.n + kSlab * 64, row, at.expert,
                     [&](unsigned char* slab) { fill_slab<T, kSlab * 32>(slab, sums[0]); });
    };
    [&]<int... kSlab>(std::integer_sequence<int, kSlab...>) {
      (store(std::integral_constant<int, kSlab>{}), ...);
    }(std::make_integer_sequence<int, WgradTile::kColumns / 64>{});
  }
  if (is_group_leader()) ptx::tma_store_wait<0>();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    wgrad_sm90_kernel(const __grid_constant__ WgradMaps maps, const __grid_constant__ WgradArgs<T> args) {
  SMEM_DYN(Shared<WgradTile>, shared);
  initialise(*shared, Filler<WgradTile>::arrivals(true));
  after_previous_kernel();
  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<WgradTile::kProducerRegisters>();
    produce(*shared, maps, args);
  } else {
    ptx::setmaxnreg_inc<WgradTile::kMathRegisters>();
    consume(*shared, maps, args);
  }
}

template <typename T>
Status run_wgrad(const WgradTask& task, const CudaContext& cuda) {
  constexpr const char* kName = "wgrad_sm90";
  WgradArgs<T> args{
      .output = static_cast<T*>(task.output),
      .lhs = static_cast<const T*>(task.lhs),
      .rhs = static_cast<const T*>(task.rhs),
      .lhs_gather = task.lhs_gather,
      .rhs_gather = task.rhs_gather,
      .schedule = task.schedule,
      .split = {1, nullptr, task.schedule.arrivals},
      .m = task.m,
      .n = task.n,
      .num_experts = static_cast<int>(task.num_experts),
      .row_tiles = static_cast<int>(ceil_div(task.m, kTileRows)),
      .column_tiles = static_cast<int>(ceil_div(task.n, WgradTile::kColumns)),
      .accumulate = task.accumulate,
  };
  WgradMaps maps{};
  Status status = encode_map(&maps.output, args.output, experts_shape(task.num_experts, task.m, task.n, 64), cuda);
  const auto encode = [&](CUtensorMap* map, const T* rows, const Gather& gather, int64_t width) {
    if (status != Status::kOk || gather.row_to_slot != nullptr || task.num_rows == 0) return;
    status = encode_map(map, rows, rows_shape(task.num_rows, width, kDepth), cuda);
  };
  encode(&maps.lhs, args.lhs, args.lhs_gather, task.m);
  encode(&maps.rhs, args.rhs, args.rhs_gather, task.n);
  int sms = 0;
  if (status == Status::kOk) status = device_attribute(sms, cudaDevAttrMultiProcessorCount, cuda);
  const auto kernel = wgrad_sm90_kernel<T>;
  constexpr int64_t kBytes = sizeof(Shared<WgradTile>);
  if (status == Status::kOk) status = allow_shared_memory(kernel, kBytes, kName, cuda);
  if (status != Status::kOk) return status;
  // A part is written, and read again, at the L2 cache's pace: prediction for an H200, four stages of 512 clocks each.
  const int64_t tiles = task.num_experts * args.row_tiles * args.column_tiles;
  const int64_t mean_steps = ceil_div(ceil_div(task.num_rows, task.num_experts), kDepth);
  args.split.count =
      static_cast<int>(tiles * kMathGroups > kMostSplitTiles ? 1 : count_parts(tiles, mean_steps, sms, 4));
  if (args.split.count > 1) {
    constexpr int64_t kTileSums = int64_t{kMathGroups} * kGroupThreads * WgradTile::kSums;
    args.split.sums = allocate<float>(tiles * args.split.count * kTileSums, cuda);
    if (args.split.sums == nullptr) return Status::kOutOfMemory;
  }
  LAUNCH_EX(kernel, overlapping(dim3(sms), dim3(kThreads), kBytes, cuda), maps, args);
  return launched(kName, cuda);
}

}  // namespace
}  // namespace sm90

Status wgrad_sm90(const WgradTask& task, const CudaContext& cuda) {
  if (task.num_experts == 0 || task.m == 0 || task.n == 0) return Status::kOk;
  return task.dtype == DType::kFloat16 ? sm90::run_wgrad<__half>(task, cuda)
                                       : sm90::run_wgrad<__nv_bfloat16>(task, cuda);
}

}  // namespace moe::cuda
