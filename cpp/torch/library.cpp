// Every schema of torch.ops.moe, and nothing else. Fakes and autograd are registered in Python, beside each wrapper
// in python/torch_moe/ops. A plan is always the same three tensors, in this order:
//   expert_offsets [E + 1] int32, row_to_slot [R] int32, slot_to_row [T, K] int32.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moe, m) {
  // With route_override [T, K] int32 nothing is selected: the weights are those of these ids.
  m.def(
      "route(Tensor router_logits, int top_k, Tensor? expert_bias=None, Tensor? route_override=None, *, "
      "str score_function='softmax', str score_order='score_then_topk', bool renormalize=True, "
      "float renormalize_p=1.0, float renormalize_eps=1e-20, str renormalize_eps_mode='add', "
      "float routed_scaling_factor=1.0, int num_groups=1, int topk_groups=1, str group_score='top2_sum', "
      "str group_mask='-inf', bool check_finite=False) -> (Tensor topk_weights, Tensor topk_ids)");
  m.def(
      "route_backward(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, *, str score_function, "
      "str score_order, bool renormalize, float renormalize_p, float renormalize_eps, str renormalize_eps_mode, "
      "float routed_scaling_factor) -> Tensor grad_router_logits");

  m.def(
      "plan(Tensor topk_ids, int num_experts, SymInt? capacity=None) "
      "-> (Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row)");

  m.def("permute(Tensor hidden_states, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row) -> Tensor rows");

  m.def(
      "grouped_gemm(Tensor rows, Tensor weight, Tensor expert_offsets, Tensor? bias=None, *, "
      "str weight_layout='out_in') -> Tensor");
  m.def("grouped_gemm_wgrad(Tensor lhs, Tensor rhs, Tensor expert_offsets) -> Tensor");
  // The same, added to `grad`.
  m.def("grouped_gemm_wgrad_(Tensor(a!) grad, Tensor lhs, Tensor rhs, Tensor expert_offsets) -> ()");
  m.def("grouped_gemm_bgrad(Tensor grad_output, Tensor expert_offsets) -> Tensor");

  m.def(
      "activation(Tensor pre_activation, str activation='swiglu', *, str gate_layout='concat', float alpha=1.0, "
      "float? limit=None, float up_offset=0.0) -> Tensor");
  m.def(
      "activation_backward(Tensor grad_output, Tensor pre_activation, str activation, *, str gate_layout, "
      "float alpha, float? limit, float up_offset) -> Tensor grad_pre_activation");

  m.def(
      "combine(Tensor rows, Tensor? topk_weights, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row) "
      "-> Tensor");
  m.def(
      "combine_backward(Tensor grad_output, Tensor rows, Tensor topk_weights, Tensor expert_offsets, "
      "Tensor row_to_slot, Tensor slot_to_row) -> (Tensor grad_rows, Tensor grad_topk_weights)");

  // The fused path. `accumulate` is for the backward: gradients of the projections are added to their .grad. With
  // save_pre_activation=False the second output is empty ([0, P]) and the backward, given that empty tensor, computes
  // the pre-activation again.
  m.def(
      "experts(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, "
      "Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, Tensor? gate_up_bias=None, "
      "Tensor? down_bias=None, *, str activation='swiglu', str gate_layout='concat', str weight_layout='out_in', "
      "float alpha=1.0, float? limit=None, float up_offset=0.0, bool row_invariant=False, "
      "bool save_pre_activation=True, "
      "bool accumulate=False) -> (Tensor output, Tensor pre_activation)");
  // plan and experts in one, for inference: it has no gradient. A call for one token is short enough for a second one
  // to show.
  m.def(
      "routed_experts(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, "
      "Tensor topk_ids, Tensor? gate_up_bias=None, Tensor? down_bias=None, *, str activation='swiglu', "
      "str gate_layout='concat', str weight_layout='out_in', float alpha=1.0, float? limit=None, "
      "float up_offset=0.0, bool row_invariant=False) -> Tensor output");
  // A gradient that is not needed comes back as an empty tensor of shape [0].
  m.def(
      "experts_backward(Tensor grad_output, Tensor hidden_states, Tensor pre_activation, Tensor gate_up_proj, "
      "Tensor down_proj, Tensor topk_weights, Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, "
      "Tensor? gate_up_bias, Tensor? down_bias, *, str activation, str gate_layout, str weight_layout, float alpha, "
      "float? limit, float up_offset, bool row_invariant, bool needs_hidden_states, "
      "bool needs_projections, bool needs_topk_weights, "
      "bool needs_biases) -> (Tensor grad_hidden_states, Tensor grad_gate_up_proj, Tensor grad_down_proj, "
      "Tensor grad_topk_weights, Tensor grad_gate_up_bias, Tensor grad_down_bias)");
  // The gradients of the projections are added to the two tensors given.
  m.def(
      "experts_backward_(Tensor(a!) grad_gate_up_proj, Tensor(b!) grad_down_proj, Tensor grad_output, "
      "Tensor hidden_states, Tensor pre_activation, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, "
      "Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, Tensor? gate_up_bias, Tensor? down_bias, *, "
      "str activation, str gate_layout, str weight_layout, float alpha, float? limit, float up_offset, "
      "bool row_invariant, "
      "bool needs_hidden_states, bool needs_topk_weights, bool needs_biases) -> (Tensor grad_hidden_states, "
      "Tensor grad_topk_weights, Tensor grad_gate_up_bias, Tensor grad_down_bias)");

  // Expert parallelism. row_to_slot, slot_to_row and rank_offsets are those of a plan whose slots are (token, rank)
  // pairs.
  m.def(
      "ep_plan(Tensor topk_ids, Tensor? placement, int num_experts, int num_local_experts, int ep_size, int ep_rank, "
      "int num_chunks=1) -> (Tensor physical_ids, Tensor rank_offsets, Tensor row_to_slot, Tensor slot_to_row, "
      "Tensor counts)");
  // Rows between ranks are bytes; `like` is any tensor of the tokens' dtype.
  m.def(
      "ep_pack(Tensor hidden_states, Tensor? topk_weights, Tensor? physical_ids, Tensor? row_to_slot, int ep_size, "
      "int num_local_experts, *, str wire='input') -> Tensor rows");
  m.def(
      "ep_index(Tensor rows, Tensor like, int hidden_size, int top_k, int num_experts, SymInt num_pairs, *, "
      "str wire='input') -> (Tensor hidden_states, Tensor topk_weights, Tensor expert_offsets, Tensor row_to_slot, "
      "Tensor slot_to_row)");
  // The second output is [T, 0] without physical_ids.
  m.def(
      "ep_reduce(Tensor rows, Tensor like, Tensor slot_to_row, Tensor? physical_ids, int hidden_size, "
      "int num_local_experts) -> (Tensor output, Tensor weights)");
  // With the exchange, in Python: python/torch_moe/distributed/experts.py. The received rows are in flight.
  m.def(
      "ep_dispatch(Tensor hidden_states, Tensor topk_weights, Tensor physical_ids, Tensor rank_offsets, "
      "Tensor row_to_slot, Tensor slot_to_row, Tensor counts, str group_name, *, str wire='input', bool check=False, "
      "int capacity=0) "
      "-> (Tensor received_counts, Tensor[] received)");
  m.def(
      "ep_experts(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, "
      "Tensor rank_offsets, Tensor row_to_slot, Tensor slot_to_row, Tensor physical_ids, Tensor received_counts, "
      "Tensor[] received, Tensor? gate_up_bias=None, Tensor? down_bias=None, *, str group_name, int num_local_experts, "
      "str wire='input', bool check=False, int capacity=0, str activation, str gate_layout, str weight_layout, "
      "float alpha, float? limit, float up_offset, bool save=True, bool recompute=False) "
      "-> (Tensor output, Tensor[] saved)");
  m.def(
      "ep_experts_backward(Tensor grad_output, Tensor gate_up_proj, Tensor down_proj, Tensor rank_offsets, "
      "Tensor row_to_slot, Tensor slot_to_row, Tensor physical_ids, Tensor received_counts, Tensor[] saved, "
      "Tensor? gate_up_bias, Tensor? down_bias, *, str group_name, int num_local_experts, bool check=False, "
      "str activation, str gate_layout, str weight_layout, float alpha, float? limit, float up_offset, "
      "bool needs_projections, bool needs_biases) -> (Tensor grad_hidden_states, Tensor grad_gate_up_proj, Tensor "
      "grad_down_proj, "
      "Tensor grad_topk_weights, Tensor grad_gate_up_bias, Tensor grad_down_bias)");
}
