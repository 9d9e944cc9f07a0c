// The grouped GEMM of sm_90a for few rows per expert: persistent, memory-bound, every epilogue.
#include "grouped_gemm_sm90_few.cuh"

#include "grouped_gemm_sm90_split.cuh"
#include "grouped_gemm_sm90_walk.cuh"

namespace moe::cuda {
namespace sm90 {
namespace {

template <typename T>
struct FewArgs {
  EpilogueArgs<T> epilogue;
  TileSchedule schedule;
  Gather gather;
  SplitK split;
  const T* rows;
  int64_t n, k, num_rows, num_experts;
  int column_tiles;
  bool in_out, concat;
};

// Parts of one tile are neighbours, and experts without rows have no tiles.
template <typename T>
class PartWalk {
 public:
  __device__ explicit PartWalk(const FewArgs<T>& args)
      : args_(args),
        walk_(args.schedule, static_cast<int>(args.num_experts), args.column_tiles * args.split.parts),
        steps_(static_cast<int>((args.k + kDepth - 1) / kDepth)) {}

  __device__ bool next(PartAt& at) {
    if (!walk_.next(at)) return false;
    at.part = at.column_tile % args_.split.parts;
    at.column_tile /= args_.split.parts;
    at.first_step = args_.split.first_step(steps_, at.part);
    at.steps = args_.split.first_step(steps_, at.part + 1) - at.first_step;
    return true;
  }

 private:
  const FewArgs<T>& args_;
  TileWalk<1> walk_;
  const int steps_;
};

template <typename T>
__global__ void __launch_bounds__(FewTile::kThreads, 1)
    few_rows_sm90_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ FewArgs<T> args) {
  SMEM_DYN(FewShared, shared);
  if (threadIdx.x == 0) {
    initialise_stages<FewTile>(*shared, Filler<FewTile>::arrivals(true));
    ptx::fence_mbar_init();
    ptx::prefetch_tmap(&weight);
  }
  __syncthreads();
  after_previous_kernel();
  zero_unowned_rows(&args.epilogue, &args.schedule, args.num_rows, args.num_experts);
  const PartWalk<T> walk(args);
  if (threadIdx.x < kGroupThreads) {
    return produce_parts<T>(*shared, weight, args, walk, [&](int r) { return source_row(args.gather, r); });
  }
  consume_parts<T>(*shared, args.in_out, walk, [&](const PartAt& at) {
    const int tile = at.row_tile * args.column_tiles + at.column_tile;
    if (args.split.parts == 1 || add_parts(*shared, args.split, at.part, tile, at.first_row, at.rows,
                                           int64_t{at.column_tile} * FewTile::kColumns)) {
      finish_slab<T, FewTile::kColumns, kGroupThreads>(&args.epilogue, shared->slab, at.first_row, at.rows, at.expert,
                                                       at.column_tile);
    }
  });
}

template <typename T>
Status run_few(const GemmTask& task, const CudaContext& cuda) {
  constexpr const char* kName = "few_rows_sm90";
  FewArgs<T> args{
      .epilogue = EpilogueArgs<T>(task),
      .schedule = task.schedule,
      .gather = task.gather,
      .split = {},
      .rows = static_cast<const T*>(task.rows),
      .n = task.n,
      .k = task.k,
      .num_rows = task.num_rows,
      .num_experts = task.num_experts,
      .column_tiles = 0,
      .in_out = task.weight_layout == WeightLayout::kInOut,
      .concat = false,
  };
  args.concat = args.epilogue.paired;
  args.column_tiles = static_cast<int>(args.epilogue.column_tiles(FewTile::kColumns));
  CUtensorMap weight{};
  Status status = encode_weight<T>(&weight, task, cuda);
  const int64_t tiles = most_row_tiles(task.schedule, task.num_rows, task.num_experts) * args.column_tiles;
  int sms = 0;
  if (status == Status::kOk) status = device_attribute(sms, cudaDevAttrMultiProcessorCount, cuda);
  if (status != Status::kOk) return status;
  args.split = {.parts = static_cast<int>(count_parts(tiles, ceil_div(task.k, kDepth), sms)),
                .sums = nullptr,
                .arrivals = task.schedule.arrivals,
                .num_rows = task.num_rows,
                .width = int64_t{args.column_tiles} * FewTile::kColumns};
  if (args.split.parts > 1) {
    args.split.sums = allocate<float>(args.split.parts * task.num_rows * args.split.width, cuda);
    if (args.split.sums == nullptr) return Status::kOutOfMemory;
  }
  const auto kernel = few_rows_sm90_kernel<T>;
  constexpr int64_t kBytes = sizeof(FewShared);
  status = allow_shared_memory(kernel, kBytes, kName, cuda);
  if (status != Status::kOk) return status;
  const dim3 grid(static_cast<unsigned>(at_most(tiles * args.split.parts, sms)));
  LAUNCH_EX(kernel, overlapping(grid, dim3(FewTile::kThreads), kBytes, cuda), weight, args);
  return launched(kName, cuda);
}

}  // namespace
}  // namespace sm90

// The blocks that share a tile: those that make the product of `steps` stages end first, by counting stages and, for
// each tile, four more for what comes after the last, or for writing the parts. By sizes alone.
int64_t count_parts(int64_t tiles, int64_t steps, int64_t sms, int64_t steps_to_add) {
  constexpr int64_t kMostParts = 8, kOverhead = 4;
  if (tiles >= sms || tiles > kMostSplitTiles) return 1;
  int64_t best = 1, best_time = steps + kOverhead;
  for (int64_t parts = 2; parts <= at_most(steps, kMostParts); ++parts) {
    const int64_t time = ceil_div(tiles * parts, sms) * (ceil_div(steps, parts) + kOverhead + parts * steps_to_add);
    if (time < best_time) best = parts, best_time = time;
  }
  return best;
}

Status gemm_sm90_few(const GemmTask& task, const CudaContext& cuda) {
  if (task.num_rows == 0 || task.n == 0) return Status::kOk;
  if (task.k == 0) return gemm_sm80(task, cuda);  // TMA has no empty tensors
  return task.dtype == DType::kFloat16 ? sm90::run_few<__half>(task, cuda) : sm90::run_few<__nv_bfloat16>(task, cuda);
}

}  // namespace moe::cuda
