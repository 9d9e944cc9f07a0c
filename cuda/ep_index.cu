// ep_index: a warp takes a received row apart; then the ids are sorted as plan sorts those of tokens.
#include "moe/ep_index.h"

#include "plan.cuh"
#include "wire.cuh"

namespace moe::cuda {
namespace {

struct IndexTask {
  EpIndexArgs args;
  RowLayout row;
  int32_t* ids;  // [R, K]
};

__device__ __forceinline__ void read_rest(const IndexTask& task, const uint8_t* in, int64_t r) {
  const RowLayout& row = task.row;
  copy_by_warp<uint32_t>(task.ids + r * row.top_k, in + row.ids_at, 4 * row.top_k);
  const int64_t weight_bytes = row.top_k * row.weight_bytes;
  copy_by_warp<uint32_t>(static_cast<uint8_t*>(task.args.topk_weights) + r * weight_bytes, in + row.weights_at,
                         weight_bytes);
}

template <typename Piece>
__global__ void __launch_bounds__(32 * kRowsPerBlock, kBlocksPerSM) ep_index_copy_kernel(IndexTask task) {
  const int64_t r = row_of_warp();
  if (r >= task.args.num_rows) return;
  const uint8_t* in = task.args.rows + r * task.row.bytes;
  copy_by_warp<Piece>(static_cast<uint8_t*>(task.args.hidden_states) + r * task.row.hidden_bytes, in,
                      task.row.hidden_bytes);
  read_rest(task, in, r);
}

template <typename T, int N>
__global__ void __launch_bounds__(32 * kRowsPerBlock, kBlocksPerSM) ep_index_dequantise_kernel(IndexTask task) {
  const int64_t r = row_of_warp();
  if (r >= task.args.num_rows) return;
  const uint8_t* in = task.args.rows + r * task.row.bytes;
  dequantise_by_warp<T, N>(static_cast<T*>(task.args.hidden_states) + r * task.row.hidden_size, in, task.row);
  read_rest(task, in, r);
}

Status read_rows(const IndexTask& task, const CudaContext& cuda) {
  const dim3 grid = blocks_of_rows(task.args.num_rows), block(32 * kRowsPerBlock);
  if (!task.row.quantised) {
    const auto launch = [&]<typename Piece>(Piece) {
      LAUNCH(ep_index_copy_kernel<Piece>, grid, block, 0, stream(cuda), task);
      return launched("ep_index", cuda);
    };
    return with_copy_piece(task.args.row.dtype, task.row.hidden_bytes, launch, task.args.hidden_states);
  }
  return with_type(task.args.row.dtype, [&]<typename T>(std::type_identity<T>) {
    return with_quad<T>(task.row.hidden_size, task.args.hidden_states, [&](auto count) {
      LAUNCH((ep_index_dequantise_kernel<T, count>), grid, block, 0, stream(cuda), task);
      return launched("ep_index", cuda);
    });
  });
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status ep_index_cuda(const EpIndexArgs& args, const CudaContext& cuda) {
  IndexTask task{args, RowLayout(args.row), allocate<int32_t>(args.num_rows * args.row.top_k, cuda)};
  if (!task.ids) return Status::kOutOfMemory;
  Status status = align_rows(&task.args.rows, args.num_rows * task.row.bytes, cuda);
  if (status == Status::kOk && args.num_rows > 0) status = read_rows(task, cuda);
  if (status != Status::kOk) return status;
  return plan_rows({.expert_offsets = args.expert_offsets,
                    .row_to_slot = args.row_to_slot,
                    .slot_to_row = args.slot_to_row,
                    .topk_ids = task.ids,
                    .num_tokens = args.num_rows,
                    .num_experts = args.num_experts,
                    .top_k = args.row.top_k,
                    .capacity = -1},
                   args.num_pairs, cuda);
}

}  // namespace moe
