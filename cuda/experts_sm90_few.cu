// The layer's forward for few slots, as in decoding, on sm_90a: two launches of one kernel instead of the five of plan,
// schedule, two products and combine.
//
// 1. A = act(W1 X + b1), X gathered.   2. O = sum over a token's rows of s (W2 A + b2).
// Every block makes the plan for itself. Launch 2 leaves fp32 parts of Y in scratch; the block whose part is the last
// of a token, for its columns, adds them, always in the order of the token's slots and of the parts. It starts while
// launch 1 ends, and loads weights until A is there.
//
// Reading the weights once is the work, and the rest is latency. Prediction for an H200 and E128 I704 H2816 K8, bf16,
// at 1, 8 and 32 tokens (8, 52 and 112 experts): 23, 147 and 317 us at 4.2 TB/s, and 7 for the launch, the plan, the
// first loads, A's way from launch 1 to 2 and the last sums: 30, 154 and 324 us. The five kernels: 46, 165 and 335.
#include "experts_sm90_few.cuh"

namespace moe::cuda {
namespace sm90 {
namespace {

struct SlotShared : FewShared {
  SlotPlan plan;
  bool completes[FewTile::kTokens];  // by row of a tile: its part is the last of the row's token
};
static_assert(sizeof(SlotShared) <= 227 * 1024, "more shared memory than a block can have");

template <typename T>
struct SlotArgs {
  EpilogueArgs<T> epilogue;  // of launch 1
  SplitK split;              // arrivals: by token and tile of columns, counts the parts of its rows
  const int32_t* topk_ids;
  const T* rows;
  int num_slots, num_experts, top_k, column_tiles;
  int64_t n, k;
  bool in_out, concat;
  // Launch 2. Null output: launch 1, which has `arrivals` of launch 2 to set to zero.
  T* output;
  const T* bias;
  const float* topk_weights;
  int64_t num_arrivals;
};

// Adds the rows of a token for the units of columns of a thread.
template <typename T>
__device__ __forceinline__ void sum_token(const SlotPlan& plan, const SlotArgs<T>& args, int token, int64_t column) {
  constexpr int kCount = kUnit<T>, kInFlight = 4;
  float sum[kCount] = {};
  for (int first = 0; first < args.top_k; first += kInFlight) {
    float y[kInFlight][kCount] = {};
    for (int part = 0; part < args.split.parts; ++part) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int row = first + i < args.top_k ? plan.row_of_slot[token * args.top_k + first + i] : -1;
        if (row < 0) continue;
        const int from = MOE_BUG(experts_sm90_few, 13) ? static_cast<int>(part + blockIdx.x) % args.split.parts : part;
        const float* sums = args.split.sums + (from * args.split.num_rows + row) * args.split.width + column;
#pragma unroll
        for (int j = 0; j < kCount; j += 4) {
          const float4 x = *reinterpret_cast<const float4*>(sums + j);
          y[i][j] += x.x, y[i][j + 1] += x.y, y[i][j + 2] += x.z, y[i][j + 3] += x.w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int slot = token * args.top_k + first + i;
      if (first + i >= args.top_k || plan.row_of_slot[slot] < 0) continue;
      if (args.bias != nullptr) {
        float bias[kCount];
        load_unit(args.bias + plan.expert_of_slot[slot] * args.n + column, kCount, true, bias);
#pragma unroll
        for (int j = 0; j < kCount; ++j) y[i][j] += bias[j];
      }
      const float weight = __ldg(args.topk_weights + slot);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] += weight * y[i][j];
    }
  }
  store_unit(args.output + token * args.n + column, kCount, true, sum);
}

// Of launch 2, by the math warpgroup, whose part of a tile is in the slab.
template <typename T>
__device__ __attribute__((noinline)) void add_to_tokens(SlotShared& shared, const SlotArgs<T>& args, const PartAt& at) {
  constexpr int kPerRow = FewTile::kColumns / kUnit<T>;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int64_t first_column = int64_t{at.column_tile} * FewTile::kColumns;
  const auto token_of = [&](int row) { return shared.plan.slot_of_row[at.first_row + row] / args.top_k; };
  leave_part(shared, args.split, at.part, at.first_row, at.rows, first_column);
  if (!MOE_BUG(experts_sm90_few, 6)) ptx::bar_sync(1, kGroupThreads);  // all of the part is written
  if (thread < at.rows) {
    const int token = token_of(thread);
    const int awaited =
        (MOE_BUG(experts_sm90_few, 7) ? args.top_k : kept_slots(shared.plan, token, args.top_k)) * args.split.parts;
    int32_t* arrivals = args.split.arrivals + token * args.column_tiles + at.column_tile;
    shared.completes[thread] = ptx::atom_acq_rel_add(arrivals, 1) == awaited - 1;
  }
  if (!MOE_BUG(experts_sm90_few, 8)) ptx::bar_sync(1, kGroupThreads);
  for (int i = thread; i < at.rows * kPerRow; i += kGroupThreads) {
    const int row = i / kPerRow;
    const int64_t column = first_column + i % kPerRow * kUnit<T>;
    if (shared.completes[row] && column < args.n) sum_token(shared.plan, args, token_of(row), column);
  }
}

// The tokens of which no slot has a row.
template <typename T>
__device__ __forceinline__ void zero_tokens(const SlotPlan& plan, const SlotArgs<T>& args) {
  if (MOE_BUG(experts_sm90_few, 9)) return;
  for (int token = blockIdx.x; token * args.top_k < args.num_slots; token += gridDim.x) {
    if (kept_slots(plan, token, args.top_k) > 0) continue;
    for (int64_t i = threadIdx.x % kGroupThreads; i < args.n; i += kGroupThreads) {
      args.output[token * args.n + i] = narrow<T>(0.0f);
    }
  }
}

// How many stages, which are the ring's first, thread 0 could load the weights of.
template <typename T>
__device__ __forceinline__ int load_columns_ahead(FewShared& shared, const CUtensorMap& weight, const SlotArgs<T>& args,
                                                  SlotWalk walk) {
  Filler<FewTile> filler(shared);
  PartAt at;
  int stages = 0;
  while (walk.next(at)) {
    for (int step = at.first_step; step < at.first_step + at.steps; ++step, ++stages) {
      if (stages == FewTile::kStages) return stages;
      load_columns(filler, weight, args, at, step);
      filler.advance();
    }
  }
  return stages;
}

template <typename T>
__global__ void __launch_bounds__(FewTile::kThreads, 1)
    few_rows_of_slots_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ SlotArgs<T> args) {
  SMEM_DYN(SlotShared, shared);
  const bool sums_tokens = args.output != nullptr;
  if (threadIdx.x == 0) {
    initialise_stages<FewTile>(*shared, Filler<FewTile>::arrivals(true));
    ptx::fence_mbar_init();
    ptx::prefetch_tmap(&weight);
  }
  // What came before launch 1 was done when launch 1 let launch 2 come. So launch 2 has the ids before it waits, and
  // weights; only A and the counters come from launch 1.
  if (!sums_tokens) after_previous_kernel();
  make_plan(shared->plan, *reinterpret_cast<SlotPlanScratch*>(shared->slab), args.topk_ids, args.num_slots,
            args.num_experts);
  const SlotWalk walk(shared->plan, args.column_tiles, args.k, args.split);
  int ahead = 0;
  if (sums_tokens) {
    if (threadIdx.x == 0) ahead = load_columns_ahead(*shared, weight, args, walk);
    if (MOE_BUG(experts_sm90_few, 10)) ahead = 0;
    if (!MOE_BUG(experts_sm90_few, 11)) after_previous_kernel();
  } else if (!MOE_BUG(experts_sm90_few, 12)) {
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.num_arrivals;
         i += int64_t{gridDim.x} * blockDim.x) {
      args.split.arrivals[i] = 0;
    }
  }
  if (threadIdx.x < kGroupThreads) {
    const auto source_of = [&](int row) { return sums_tokens ? row : shared->plan.slot_of_row[row] / args.top_k; };
    return produce_parts<T>(*shared, weight, args, walk, source_of, ahead);
  }
  if (sums_tokens) zero_tokens(shared->plan, args);
  consume_parts<T>(*shared, args.in_out, walk, [&](const PartAt& at) {
    if (sums_tokens)
      add_to_tokens(*shared, args, at);
    else
      finish_slab<T, FewTile::kColumns, kGroupThreads>(&args.epilogue, shared->slab, at.first_row, at.rows, at.expert,
                                                       at.column_tile);
  });
}

template <typename T>
Status launch(const GemmTask& task, const SlotArgs<T>& args, int64_t most_tiles, int sms, const CudaContext& cuda) {
  constexpr const char* kName = "few_rows_of_slots";
  constexpr int64_t kBytes = sizeof(SlotShared);
  const auto kernel = few_rows_of_slots_kernel<T>;
  CUtensorMap weight{};
  Status status = encode_weight<T>(&weight, task, cuda);
  if (status == Status::kOk) status = allow_shared_memory(kernel, kBytes, kName, cuda);
  if (status != Status::kOk) return status;
  const dim3 grid(static_cast<unsigned>(at_most(most_tiles * args.column_tiles * args.split.parts, sms)));
  LAUNCH_EX(kernel, overlapping(grid, dim3(FewTile::kThreads), kBytes, cuda), weight, args);
  return launched(kName, cuda);
}

GemmTask gemm_task(const ExpertsLayer& layer, const void* weight, int64_t n, int64_t k) {
  GemmTask task{};
  task.weight = weight;
  task.weight_layout = layer.weight_layout;
  task.n = n;
  task.k = k;
  task.num_rows = layer.plan.num_tokens * layer.plan.top_k;
  task.num_experts = layer.plan.num_experts;
  task.dtype = layer.dtype;
  task.activation = layer.activation;
  return task;
}

template <typename T>
Status run(const ExpertsArgs& call, const int32_t* topk_ids, const CudaContext& cuda) {
  const ExpertsLayer& layer = call.layer;
  const int64_t slots = layer.plan.num_tokens * layer.plan.top_k, experts = layer.plan.num_experts;
  const int64_t most_tiles = slots / FewTile::kTokens + at_most(slots, experts);
  const int64_t column_tiles = ceil_div(layer.hidden_size, FewTile::kColumns);
  const int64_t steps = ceil_div(layer.intermediate_size, kDepth), width = column_tiles * FewTile::kColumns;
  int sms = 0;
  if (const Status status = device_attribute(sms, cudaDevAttrMultiProcessorCount, cuda); status != Status::kOk) {
    return status;
  }
  const int64_t parts = count_parts(most_tiles * column_tiles, steps, sms);
  const int64_t num_arrivals = layer.plan.num_tokens * column_tiles;
  auto* activated = allocate<T>(slots * layer.intermediate_size, cuda);
  auto* sums = allocate<float>(parts * slots * width, cuda);
  auto* arrivals = allocate<int32_t>(num_arrivals, cuda);
  if (activated == nullptr || sums == nullptr || arrivals == nullptr) return Status::kOutOfMemory;

  SlotArgs<T> args{};
  args.topk_ids = topk_ids;
  args.num_slots = static_cast<int>(slots);
  args.num_experts = static_cast<int>(experts);
  args.top_k = static_cast<int>(layer.plan.top_k);
  args.in_out = layer.weight_layout == WeightLayout::kInOut;

  // A tile is never shared by blocks here: even 32 tiles, of 8 experts with 256 columns, have 4 MB of weights in
  // flight, which is what the bandwidth needs.
  const int64_t pre_activation = pre_activation_size(layer.activation.activation, layer.intermediate_size);
  GemmTask task = gemm_task(layer, layer.gate_up_proj, pre_activation, layer.hidden_size);
  task.output = activated;
  task.bias = layer.gate_up_bias;
  task.epilogue = Epilogue::kActivation;
  SlotArgs<T> up = args;
  up.epilogue = EpilogueArgs<T>(task);
  up.split = {.parts = 1, .sums = nullptr, .arrivals = arrivals, .num_rows = slots, .width = 0};
  up.rows = static_cast<const T*>(layer.hidden_states);
  up.n = task.n;
  up.k = task.k;
  up.concat = up.epilogue.paired;
  up.column_tiles = static_cast<int>(up.epilogue.column_tiles(FewTile::kColumns));
  up.num_arrivals = num_arrivals;
  const Status status = launch(task, up, most_tiles, sms, cuda);
  if (status != Status::kOk) return status;

  task = gemm_task(layer, layer.down_proj, layer.hidden_size, layer.intermediate_size);
  SlotArgs<T> down = args;
  down.split = {
      .parts = static_cast<int>(parts), .sums = sums, .arrivals = arrivals, .num_rows = slots, .width = width};
  down.rows = activated;
  down.n = task.n;
  down.k = task.k;
  down.column_tiles = static_cast<int>(column_tiles);
  down.output = static_cast<T*>(call.output);
  down.bias = static_cast<const T*>(layer.down_bias);
  down.topk_weights = static_cast<const float*>(layer.topk_weights);
  return launch(task, down, most_tiles, sms, cuda);
}

}  // namespace
}  // namespace sm90

Status experts_sm90_few(const ExpertsArgs& args, const int32_t* topk_ids, const CudaContext& cuda) {
  return args.layer.dtype == DType::kFloat16 ? sm90::run<__half>(args, topk_ids, cuda)
                                             : sm90::run<__nv_bfloat16>(args, topk_ids, cuda);
}

}  // namespace moe::cuda
