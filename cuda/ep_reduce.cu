// ep_reduce: combine with the ranks as choices, over rows that carry more than a token; and what returns per choice.
#include "moe/ep_reduce.h"

#include "combine.cuh"
#include "wire.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Real>
__global__ void __launch_bounds__(kThreads) ep_reduce_weights_kernel(EpReduceArgs args, RowLayout row) {
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (slot >= args.num_tokens * row.top_k) return;
  const int64_t token = slot / row.top_k, physical = args.physical_ids[slot];
  const int64_t rank = physical < 0 ? args.ep_size : physical / args.num_local_experts;
  const int64_t r = rank < args.ep_size ? args.slot_to_row[token * args.ep_size + rank] : -1;
  Real weight = 0;
  if (r >= 0 && (r < args.num_rows || MOE_BUG(ep, 5))) {
    weight = reinterpret_cast<const Real*>(args.rows + r * row.bytes + row.weights_at)[slot - token * row.top_k];
  }
  static_cast<Real*>(args.weights)[slot] = weight;
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status ep_reduce_cuda(const EpReduceArgs& original, const CudaContext& cuda) {
  EpReduceArgs args = original;
  const RowLayout row(args.row);
  Status status = align_rows(&args.rows, args.num_rows * row.bytes, cuda);
  if (status != Status::kOk) return status;
  status = sum_rows({.output = args.output,
                     .rows = args.rows,
                     .topk_weights = nullptr,
                     .plan = {.expert_offsets = nullptr,
                              .row_to_slot = nullptr,
                              .slot_to_row = args.slot_to_row,
                              .num_tokens = args.num_tokens,
                              .num_experts = 0,
                              .top_k = args.ep_size,
                              .num_rows = args.num_rows},
                     .width = row.hidden_size,
                     .stride = row.bytes / static_cast<int64_t>(size_of(args.row.dtype)),
                     .dtype = args.row.dtype},
                    cuda);
  const int64_t slots = args.num_tokens * row.top_k;
  if (status != Status::kOk || !row.has_weights || slots == 0) return status;
  const dim3 grid(static_cast<unsigned>(ceil_div(slots, kThreads)));
  if (row.weight_bytes == sizeof(double))
    LAUNCH(ep_reduce_weights_kernel<double>, grid, dim3(kThreads), 0, stream(cuda), args, row);
  else
    LAUNCH(ep_reduce_weights_kernel<float>, grid, dim3(kThreads), 0, stream(cuda), args, row);
  return launched("ep_reduce_weights", cuda);
}

}  // namespace moe
