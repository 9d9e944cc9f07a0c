// What grouped_gemm.cu and experts.cu ask of a GEMM kernel. One struct serves every architecture, so that the layer is
// written once and a kernel is a row of one table (grouped_gemm.cu).
#pragma once

#include "moe/activation.h"
#include "moe/grouped_gemm.h"

namespace moe::cuda {

// Where the tiles of each expert are, on the device, made once per layer call by schedule.cu. Offsets are clamped there
// to [previous offset, R], so that a kernel that goes by `offsets` never leaves a buffer whatever a plan holds.
struct TileSchedule {
  const int32_t* offsets;     // [E + 1] clamped expert_offsets
  const int32_t* order;       // [E] experts, most rows first
  const int32_t* first_tile;  // [E + 1] prefix sums of ceil(rows of order[i] / tile_rows); the last is the tile count
  int64_t tile_rows;
};

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

// C[r] = weight_e rows[r] for the rows r of each expert e; then an epilogue. Rows past offsets[E] are written as zeros
// in every output that has R rows.
struct GemmTask {
  void* output;                      // [R, N], kActivation: [R, I], kActivationBackward: s act(H) [R, I]; dtype
  void* pre_activation;              // kActivation: [R, N] dtype, or null when it is not to be saved
  void* grad_pre_activation;         // kActivationBackward: [R, P] dtype; may be saved_pre_activation itself
  float* partial_grad_weights;       // kActivationBackward: [R, gemm_partials(task)] fp32, each written once
  const void* rows;                  // [R, K], or [num_tokens, K] with a gather; dtype
  Gather gather;                     // of rows
  const void* weight;                // [E, N, K] out_in or [E, K, N] in_out, dtype
  const void* bias;                  // [E, N] dtype, or null
  const void* saved_pre_activation;  // kActivationBackward: [R, P] dtype
  const float* row_weights;          // kActivationBackward: topk_weights by slot; row r has row_weights[row_to_slot[r]]
  TileSchedule schedule;
  int64_t num_rows, num_experts, n, k;
  WeightLayout weight_layout;
  DType dtype;
  Epilogue epilogue = Epilogue::kStore;
  ActivationOptions activation{};
  bool allow_tf32 = false;
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
  bool allow_tf32 = false;
};

}  // namespace moe::cuda
