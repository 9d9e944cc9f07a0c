// combine: gather and sum, in fixed order of k. Each token is written once and each row read once, which is all the
// traffic there must be; kInFlight rows are loaded before the first is added.
#include "combine.cuh"

#include "grouped_gemm.cuh"
#include "moe/combine.h"
#include "plan_view.cuh"

namespace moe::cuda {
namespace {

constexpr int kInFlight = 4;

template <typename T, int kCount>
__global__ void __launch_bounds__(Tiling::kThreads)
    combine_kernel(T* output, const T* rows, const Wide<T>* topk_weights, PlanView plan, int64_t width,
                   int64_t stride) {
  using Real = Wide<T>;
  after_previous_kernel();
  const int top_k = static_cast<int>(plan.top_k);
  for_tiles(plan.num_tokens, width / kCount, 1, [&](int64_t token, int64_t piece) {
    const int64_t first_slot = token * top_k, column = piece * kCount;
    Real sum[kCount] = {};
    for (int first = 0; first < top_k; first += kInFlight) {
      Bits<T, kCount> bits[kInFlight];
      Real weight[kInFlight];
      bool kept[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t slot = first_slot + first + i;
        const int64_t row = first + i < top_k ? row_of(plan, slot) : -1;
        kept[i] = row >= 0;
        weight[i] = kept[i] && topk_weights ? topk_weights[slot] : Real{1};
        if (kept[i]) bits[i] = load_once<kCount>(rows + row * stride + column);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (!kept[i]) continue;
        Real x[kCount];
        bits[i].unpack(x);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum[j] += weight[i] * x[j];
      }
    }
    store(output + token * width + column, sum);
  });
}

constexpr int kWarpsPerBlock = 8;

// A warp has a token: it loads the token's gradient once for kInFlight rows, writes their gradients and sums their
// dot products. A row counts as a token's only if row_to_slot says so too, so every row is written by one warp, here or
// in the next kernel, even for maps that are no inverses.
template <typename T, int kCount>
__global__ void __launch_bounds__(32 * kWarpsPerBlock, 2)
    combine_backward_kernel(T* grad_rows, Wide<T>* grad_topk_weights, const T* grad_output, const T* rows,
                            const Wide<T>* topk_weights, PlanView plan, int64_t width) {
  using Real = Wide<T>;
  const int lane = threadIdx.x % 32, top_k = static_cast<int>(plan.top_k);
  const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  if (token >= plan.num_tokens) return;
  for (int first = 0; first < top_k; first += kInFlight) {
    int64_t row[kInFlight];
    Real weight[kInFlight], dot[kInFlight] = {};
    bool owned[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t slot = token * top_k + first + i;
      row[i] = first + i < top_k ? row_of(plan, slot) : -1;
      owned[i] = row[i] >= 0 && plan.row_to_slot[row[i]] == slot;
      weight[i] = owned[i] ? topk_weights[slot] : Real{0};
    }
    for (int64_t column = lane * kCount; column < width; column += 32 * kCount) {
      Real grad[kCount];
      const auto grad_bits = load<kCount>(grad_output + token * width + column);
      Bits<T, kCount> bits[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (row[i] >= 0) bits[i] = load_once<kCount>(rows + row[i] * width + column);
      }
      grad_bits.unpack(grad);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (row[i] < 0) continue;
        Real x[kCount];
        bits[i].unpack(x);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          dot[i] += x[j] * grad[j];
          x[j] = weight[i] * grad[j];
        }
        if (owned[i]) store(grad_rows + row[i] * width + column, x);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const Real sum = warp_sum(dot[i]);
      if (lane == 0 && first + i < top_k) grad_topk_weights[token * top_k + first + i] = row[i] < 0 ? Real{0} : sum;
    }
  }
}

// The rows that no token has: zero without a slot, else as row_to_slot says.
template <typename T, int kCount>
__global__ void __launch_bounds__(Tiling::kThreads)
    combine_backward_rest_kernel(T* grad_rows, const T* grad_output, const Wide<T>* topk_weights, PlanView plan,
                                 int64_t width) {
  for_tiles(plan.num_rows, width / kCount, 1, [&](int64_t row, int64_t piece) {
    const int64_t slot = slot_of(plan, row);
    if (slot >= 0 && plan.slot_to_row[slot] == row) return;
    Wide<T> grad[kCount] = {};
    if (slot >= 0) {
      load<kCount>(grad_output + token_of(plan, slot) * width + piece * kCount).unpack(grad);
      const Wide<T> weight = topk_weights[slot];
#pragma unroll
      for (int j = 0; j < kCount; ++j) grad[j] *= weight;
    }
    store(grad_rows + row * width + piece * kCount, grad);
  });
}

template <typename T, int kCount>
Status combine_backward(const CombineBackwardArgs& args, const CudaContext& cuda) {
  const int64_t width = args.hidden_size;
  auto* grad_rows = static_cast<T*>(args.grad_rows);
  const auto* grad_output = static_cast<const T*>(args.grad_output);
  const auto* weights = static_cast<const Wide<T>*>(args.topk_weights);
  LAUNCH((combine_backward_kernel<T, kCount>), dim3(ceil_div(args.plan.num_tokens, kWarpsPerBlock)),
         dim3(32 * kWarpsPerBlock), 0, stream(cuda), grad_rows, static_cast<Wide<T>*>(args.grad_topk_weights),
         grad_output, static_cast<const T*>(args.rows), weights, args.plan, width);
  const Status status = launched("combine_backward", cuda);
  if (status != Status::kOk || width == 0 || args.plan.num_rows == 0) return status;
  // A thread of this kernel mostly finds nothing to do: one block's width per row costs the least.
  Tiling tiling(args.plan.num_rows, width / kCount);
  tiling.grid.y = 1;
  LAUNCH((combine_backward_rest_kernel<T, kCount>), tiling.grid, tiling.block, 0, stream(cuda), grad_rows, grad_output,
         weights, args.plan, width);
  return launched("combine_backward_rest", cuda);
}

// The expert e with offsets[e] <= row < offsets[e + 1], or -1.
__device__ __forceinline__ int64_t expert_of_row(const int32_t* offsets, int64_t num_experts, int64_t row) {
  if (row < offsets[0] || row >= offsets[num_experts]) return -1;
  int64_t low = 0, high = num_experts;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}

// A warp has a slot: its gradient is gathered, never scattered, so dropped slots need no pass of their own.
template <typename T>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) grad_weights_kernel(GradWeightsTask task) {
  using Real = Wide<T>;
  after_previous_kernel();
  const int lane = threadIdx.x % 32;
  const int64_t slot = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  if (slot >= num_slots(task.plan)) return;
  const int64_t row = row_of(task.plan, slot);
  const int64_t expert = row < 0 ? -1 : expert_of_row(task.schedule.offsets, task.plan.num_experts, row);
  Real sum = 0;
  if (expert >= 0) {
    const Real* partials = static_cast<const Real*>(task.partials) + row * task.num_partials;
    for (int64_t i = lane; i < task.num_partials; i += 32) sum += partials[i];
    if (task.down_bias) {
      const int64_t width = task.hidden_size;
      const T* grad = static_cast<const T*>(task.grad_output) + token_of(task.plan, slot) * width;
      const T* bias = static_cast<const T*>(task.down_bias) + expert * width;
#pragma unroll 4
      for (int64_t i = lane; i < width; i += 32) sum += widen(grad[i]) * widen(bias[i]);
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) static_cast<Real*>(task.grad_topk_weights)[slot] = sum;
}

}  // namespace

Status sum_rows(const SumTask& task, const CudaContext& cuda) {
  if (task.plan.num_tokens == 0 || task.width == 0) return Status::kOk;
  return with_type(task.dtype, [&]<typename T>(std::type_identity<T>) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
    const bool whole = fits_pieces((task.width | task.stride) * kBytes, task.output, task.rows);
    return with_piece<T>(whole, [&](auto count) {
      const Tiling tiling(task.plan.num_tokens, task.width / count);
      LAUNCH_EX((combine_kernel<T, count>), overlapping(tiling.grid, tiling.block, 0, cuda),
                static_cast<T*>(task.output), static_cast<const T*>(task.rows),
                static_cast<const Wide<T>*>(task.topk_weights), task.plan, task.width, task.stride);
      return launched("combine", cuda);
    });
  });
}

Status reduce_grad_weights(const GradWeightsTask& task, const CudaContext& cuda) {
  if (num_slots(task.plan) == 0) return Status::kOk;
  return with_type(task.dtype, [&]<typename T>(std::type_identity<T>) {
    const dim3 grid(static_cast<unsigned>(ceil_div(num_slots(task.plan), kWarpsPerBlock)));
    LAUNCH_EX(grad_weights_kernel<T>, overlapping(grid, dim3(32 * kWarpsPerBlock), 0, cuda), task);
    return launched("grad_weights", cuda);
  });
}

}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status combine_cuda(const CombineArgs& args, const CudaContext& cuda) {
  return sum_rows({.output = args.output,
                   .rows = args.rows,
                   .topk_weights = args.topk_weights,
                   .plan = args.plan,
                   .width = args.hidden_size,
                   .stride = args.hidden_size,
                   .dtype = args.dtype},
                  cuda);
}

Status combine_backward_cuda(const CombineBackwardArgs& args, const CudaContext& cuda) {
  if (num_slots(args.plan) == 0) return Status::kOk;
  return with_type(args.dtype, [&]<typename T>(std::type_identity<T>) {
    const bool whole =
        fits_pieces(args.hidden_size * static_cast<int64_t>(sizeof(T)), args.grad_rows, args.grad_output, args.rows);
    return with_piece<T>(whole, [&](auto count) { return combine_backward<T, count>(args, cuda); });
  });
}

}  // namespace moe
