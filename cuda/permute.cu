// permute: rows are copied, so their type does not matter, only what divides them: 16, 4 or 2 bytes at a time.
#include "moe/permute.h"

#include "plan_view.cuh"

namespace moe::cuda {
namespace {

// Pieces that a thread has in flight: 64 bytes, as Little's law asks of about half the threads that fit on an SM.
constexpr int kInFlight = 4;

template <typename Piece>
__global__ void __launch_bounds__(Tiling::kThreads)
    permute_kernel(Piece* rows, const Piece* hidden_states, PlanView plan, int64_t pieces) {
  for_tiles(plan.num_rows, pieces, kInFlight, [&](int64_t row, int64_t first) {
    const int64_t slot = slot_of(plan, row);
    Piece copy[kInFlight] = {};
    if (slot >= 0) {
      const Piece* source = hidden_states + token_of(plan, slot) * pieces;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t piece = first + i * blockDim.x;
        if (piece < pieces) copy[i] = __ldg(source + piece);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t piece = first + i * blockDim.x;
      if (piece < pieces) rows[row * pieces + piece] = copy[i];
    }
  });
}

template <typename Piece>
Status permute(const PermuteArgs& args, int64_t row_bytes, const CudaContext& cuda) {
  const int64_t pieces = row_bytes / static_cast<int64_t>(sizeof(Piece));
  const Tiling tiling(args.plan.num_rows, pieces, kInFlight);
  LAUNCH(permute_kernel<Piece>, tiling.grid, tiling.block, 0, stream(cuda), static_cast<Piece*>(args.rows),
         static_cast<const Piece*>(args.hidden_states), args.plan, pieces);
  return launched("permute", cuda);
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

Status permute_cuda(const PermuteArgs& args, const CudaContext& cuda) {
  const int64_t row_bytes = args.hidden_size * static_cast<int64_t>(size_of(args.dtype));
  if (args.plan.num_rows == 0 || row_bytes == 0) return Status::kOk;
  if (cuda::fits_pieces(row_bytes, args.rows, args.hidden_states)) return cuda::permute<uint4>(args, row_bytes, cuda);
  if (size_of(args.dtype) >= 4) return cuda::permute<uint32_t>(args, row_bytes, cuda);
  return cuda::permute<uint16_t>(args, row_bytes, cuda);
}

}  // namespace moe
