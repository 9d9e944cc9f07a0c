// ep_pack: a warp has a row, and writes the token, then in words the scale, the ids, the weights and what pads them:
// what is sent has to be the same from run to run.
#include "moe/ep_pack.h"

#include "wire.cuh"

namespace moe::cuda {
namespace {

struct PackTask {
  EpPackArgs args;
  RowLayout row;
};

// The token of a row and the rank it goes to; token -1 for a row without a slot.
struct Origin {
  int64_t token, rank;

  __device__ __forceinline__ Origin(const EpPackArgs& args, int64_t r) {
    const int64_t slot = args.row_to_slot ? args.row_to_slot[r] : r * args.ep_size;
    token = slot / args.ep_size;
    rank = slot - token * args.ep_size;
    if (slot < 0 || (token >= args.num_tokens && !MOE_BUG(ep, 4))) token = -1;
  }
};

__device__ __forceinline__ void write_rest(const PackTask& task, uint8_t* out, Origin origin, float scale) {
  const EpPackArgs& args = task.args;
  const RowLayout& row = task.row;
  const int64_t lane = threadIdx.x % 32, first_expert = origin.rank * args.num_local_experts;
  if (lane < row.scale_at - row.hidden_bytes && !MOE_BUG(ep, 8)) out[row.hidden_bytes + lane] = 0;
  for (int64_t at = row.scale_at + 4 * lane; at < row.bytes; at += 4 * 32) {
    uint32_t word = 0;
    const int64_t k = (at - row.ids_at) / 4, weight_word = (at - row.weights_at) / 4;
    if (row.quantised && at == row.scale_at) {
      memcpy(&word, &scale, sizeof(word));
    } else if (row.has_ids && k < row.top_k) {
      const int64_t id = origin.token < 0 ? -1 : args.physical_ids[origin.token * row.top_k + k] - first_expert;
      word = static_cast<uint32_t>(id >= 0 && id < args.num_local_experts ? id : -1);
    } else if (row.has_weights && origin.token >= 0 && at >= row.weights_at) {
      const int64_t words = row.top_k * row.weight_bytes / 4;
      if (weight_word < words)
        word = static_cast<const uint32_t*>(args.topk_weights)[origin.token * words + weight_word];
    }
    *reinterpret_cast<uint32_t*>(out + at) = word;
  }
}

template <typename Piece>
__global__ void __launch_bounds__(32 * kRowsPerBlock, kBlocksPerSM) ep_pack_copy_kernel(PackTask task) {
  const int64_t r = row_of_warp();
  if (r >= task.args.num_rows) return;
  const Origin origin(task.args, r);
  uint8_t* out = task.args.rows + r * task.row.bytes;
  const auto* tokens = static_cast<const uint8_t*>(task.args.hidden_states);
  copy_by_warp<Piece>(out, origin.token < 0 ? nullptr : tokens + origin.token * task.row.hidden_bytes,
                      task.row.hidden_bytes);
  write_rest(task, out, origin, 0);
}

template <typename T, int N>
__global__ void __launch_bounds__(32 * kRowsPerBlock, kBlocksPerSM) ep_pack_quantise_kernel(PackTask task) {
  const int64_t r = row_of_warp();
  if (r >= task.args.num_rows) return;
  const Origin origin(task.args, r);
  uint8_t* out = task.args.rows + r * task.row.bytes;
  const auto* tokens = static_cast<const T*>(task.args.hidden_states);
  const T* token = origin.token < 0 ? nullptr : tokens + origin.token * task.row.hidden_size;
  write_rest(task, out, origin, quantise_by_warp<T, N>(out, token, task.row));
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status ep_pack_cuda(const EpPackArgs& args, const CudaContext& cuda) {
  if (args.num_rows == 0) return Status::kOk;
  const PackTask task{args, RowLayout(args.row)};
  const dim3 grid = blocks_of_rows(args.num_rows), block(32 * kRowsPerBlock);
  if (!task.row.quantised) {
    const auto launch = [&]<typename Piece>(Piece) {
      LAUNCH(ep_pack_copy_kernel<Piece>, grid, block, 0, stream(cuda), task);
      return launched("ep_pack", cuda);
    };
    return with_copy_piece(args.row.dtype, task.row.hidden_bytes, launch, args.hidden_states, args.rows);
  }
  return with_type(args.row.dtype, [&]<typename T>(std::type_identity<T>) {
    return with_quad<T>(task.row.hidden_size, args.hidden_states, [&](auto count) {
      LAUNCH((ep_pack_quantise_kernel<T, count>), grid, block, 0, stream(cuda), task);
      return launched("ep_pack", cuda);
    });
  });
}

}  // namespace moe
