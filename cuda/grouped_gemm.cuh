// What grouped_gemm.cu and experts.cu ask of a GEMM kernel. One struct serves every architecture, so that the layer is
// written once and a kernel is a row of one table (grouped_gemm.cu).
#pragma once

#include "moe/activation.h"
#include "moe/grouped_gemm.h"
#include "moe/plan.h"

namespace moe::cuda {

// Where the tiles of each expert are, on the device, made once per layer call by schedule.cu. Offsets are clamped there
// to [previous offset, R], so that a kernel that goes by `offsets` never leaves a buffer whatever a plan holds.
struct TileSchedule {
  const int32_t* offsets;     // [E + 1] clamped expert_offsets
  const int32_t* order;       // [E] experts, most rows first; equal ones by id
  const int32_t* first_tile;  // [E + 1] prefix sums of ceil(rows of order[i] / tile_rows); the last is the tile count
  int64_t tile_rows;
  int32_t* arrivals;  // [kMostSplitTiles] zeros; a kernel that counts here leaves zeros
};
constexpr int64_t kMostSplitTiles = 1024;

// Fills *schedule with scratch of `cuda` and queues the kernel that computes it. A weight gradient reads no first_tile,
// so tile_rows is free there.
Status make_schedule(const int32_t* expert_offsets, int64_t num_rows, int64_t num_experts, int64_t tile_rows,
                     const CudaContext& cuda, TileSchedule* schedule);

// Rows of a tile: 64 or 128, by the average number of rows of an expert; fp64 takes 64 only, every other kernel both.
int64_t tile_rows_for(DType dtype, int64_t num_rows, int64_t num_experts);

// Rows that a product reads through the plan instead of a copy: row r is source[row_to_slot[r] / top_k], and zero when
// row_to_slot[r] is outside [0, num_slots).
struct Gather {
  const int32_t* row_to_slot = nullptr;  // [R]; null: no gather, row r is source[r]
  int64_t num_slots = 0, top_k = 1;
};

enum class Epilogue : int8_t {
  kStore,               // output = C + bias
  kActivation,          // pre_activation = C + bias, output = act(pre_activation)
  kActivationBackward,  // C = W2^T dO: writes dH, s act(H) and the partial sums of <C, act(H)>
};

// The sums of <C, act(H)> are over this many columns each, whatever the tiles of a kernel are.
constexpr int64_t kPartialColumns = 64;
constexpr int64_t gemm_partials(int64_t n) { return (n + kPartialColumns - 1) / kPartialColumns; }

// C[r] = weight_e rows[r] for the rows r of each expert e; then an epilogue. Rows outside of every expert are written
// as zeros in every output that has R rows (the partial sums, which nothing reads there, may be left).
struct GemmTask {
  void* output;                      // [R, N], kActivation: [R, I] or null, kActivationBackward: s act(H) [R, I] or
                                     // null; dtype
  void* pre_activation;              // kActivation: [R, N] dtype, or null when it is not to be saved
  void* grad_pre_activation;         // kActivationBackward: [R, P] dtype or null; may be saved_pre_activation itself
  void* partial_grad_weights;        // kActivationBackward: [R, gemm_partials(N)] fp32 (fp64 for fp64) or null, each
                                     // written once
  const void* rows;                  // [R, K], or [num_tokens, K] with a gather; dtype
  Gather gather;                     // of rows
  const void* weight;                // [E, N, K] out_in or [E, K, N] in_out, dtype
  const void* bias;                  // [E, N] dtype, or null
  const void* saved_pre_activation;  // kActivationBackward: [R, P] dtype
  const void* row_weights;           // kActivationBackward: topk_weights by slot, fp32 (fp64 for fp64); row r has
                                     // row_weights[row_to_slot[r]] of `gather`, 0 without a slot
  TileSchedule schedule;
  int64_t num_rows, num_experts, n, k;
  WeightLayout weight_layout;
  DType dtype;
  Epilogue epilogue = Epilogue::kStore;
  ActivationOptions activation{};
};

// output[e] (+)= sum over the rows of e of lhs[r] rhs[r]^T; zeros, or untouched, for an expert without rows.
struct WgradTask {
  void* output;     // [E, M, N] dtype
  const void* lhs;  // [R, M], or [num_tokens, M] with a gather
  Gather lhs_gather;
  const void* rhs;  // [R, N], or [num_tokens, N] with a gather
  Gather rhs_gather;
  TileSchedule schedule;
  int64_t num_rows, num_experts, m, n;
  DType dtype;
  bool accumulate = false;
};

// output[e] = sum over the rows of e of w_r rows[r], w_r = row_weights[row_to_slot[r]] (1 when null); rows ascending in
// a fixed order.
struct BgradTask {
  void* output;             // [E, N] dtype
  const void* rows;         // [R, N], or [num_tokens, N] with a gather; dtype
  Gather gather;            // of rows
  const void* row_weights;  // topk_weights by slot, fp32 (fp64 for fp64), or null
  TileSchedule schedule;
  int64_t num_rows, num_experts, n;
  DType dtype;
};

// grad_topk_weights[slot] = sum of partials[row] (+ <grad_output[t], down_bias[e]>) for row = slot_to_row[slot] and its
// expert e; 0 for a slot without a row in an expert. partials ascending, in fp32 (fp64 for fp64).
struct GradWeightsTask {
  void* grad_topk_weights;  // [T, K] fp32 (fp64 for fp64)
  const void* partials;     // [R, num_partials] fp32 (fp64 for fp64)
  const void* grad_output;  // [T, H] dtype; read only when there is a bias
  const void* down_bias;    // [E, H] dtype, or null
  PlanView plan;
  TileSchedule schedule;
  int64_t num_partials, hidden_size;
  DType dtype;
};

// By the table of grouped_gemm.cu.
Status gemm(const GemmTask& task, const CudaContext& cuda);
Status wgrad(const WgradTask& task, const CudaContext& cuda);

Status bgrad(const BgradTask& task, const CudaContext& cuda);                      // grouped_gemm_bgrad.cu
Status reduce_grad_weights(const GradWeightsTask& task, const CudaContext& cuda);  // combine.cu

// The rows of the table.
Status gemm_simt(const GemmTask& task, const CudaContext& cuda);  // fp32 in fp32, fp64: every size
Status wgrad_simt(const WgradTask& task, const CudaContext& cuda);
Status gemm_sm80(const GemmTask& task, const CudaContext& cuda);  // bf16, fp16, tf32: every size
Status wgrad_sm80(const WgradTask& task, const CudaContext& cuda);
Status gemm_sm90(const GemmTask& task, const CudaContext& cuda);  // bf16, fp16: rows of a multiple of 16 bytes
Status wgrad_sm90(const WgradTask& task, const CudaContext& cuda);
Status gemm_sm90_few(const GemmTask& task, const CudaContext& cuda);  // the same, tiles of at most 64 rows

// Into how many parts the contracted width, `steps` stages of it, is split when there are `tiles` tiles. The last block
// of a tile needs as long as `steps_to_add` stages for each of several parts.
int64_t count_parts(int64_t tiles, int64_t steps, int64_t sms, int64_t steps_to_add = 0);

}  // namespace moe::cuda
