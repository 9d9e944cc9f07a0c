"""ExpertParallel: a layer of which each rank holds some experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from torch_moe import ops
from torch_moe.distributed.agreement import agree
from torch_moe.distributed.checkpoint import load_experts, save_experts
from torch_moe.distributed.exchange import local
from torch_moe.distributed.placement import Placement
from torch_moe.nn._common import require, uniform_by_fan_in_
from torch_moe.nn.layer import OPTIONAL_PARTS, ExtendedRouting, MoE, Routing
from torch_moe.ops._common import autocast_dtype
from torch_moe.ops.ep_pack import WIRES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from torch_moe.nn.experts import Experts

_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
_OPTIONS = ("activation", "gate_layout", "weight_layout", "alpha", "limit", "up_offset")


class Sent(NamedTuple):
    """What :meth:`ShardedExperts.send` started: the plan, and the rows in flight."""

    hidden_states: Tensor
    topk_weights: Tensor
    plan: ops.EpPlan
    received_counts: Tensor
    received: list[Tensor]


class ShardedExperts(nn.Module):
    """The experts of a layer, of which this rank holds those that the placement gives it.

    Made by :class:`ExpertParallel`. With the identity placement the parameters are ``DTensor`` of all experts,
    ``Shard(0)`` over the group; with another they are plain tensors of this rank's. Either way a distributed checkpoint
    has the layer's own names and shapes, every expert once, and loads at any number of ranks and with any placement.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None
    _table: Tensor | None

    def __init__(
        self,
        experts: Experts,
        mesh: DeviceMesh,
        *,
        placement: Placement | None = None,
        num_chunks: int = 1,
        wire: str = "input",
        capacity: int | None = None,
        check: bool = False,
    ) -> None:
        super().__init__()
        self.config = experts.config
        self.num_experts = experts.num_experts
        self.mesh = mesh
        self.ep_size, self.ep_rank = mesh.size(), mesh.get_local_rank()
        self.group_name: str = mesh.get_group().group_name
        self.num_chunks = num_chunks
        self.wire = wire
        self.capacity = capacity or 0
        self.check = check
        self.placement = Placement.identity(self.num_experts, self.ep_size) if placement is None else placement
        device = torch.device("cpu") if experts.down_proj.is_meta else experts.down_proj.device
        table = None if placement is None else placement.table.to(device)
        self.register_buffer("_table", table, persistent=False)
        self.experts = self.placement.experts_of(self.ep_rank)  # which expert each of the local ones is
        held = [max(expert, 0) for expert in self.experts]
        for name in _PARAMETERS:
            whole = getattr(experts, name)
            self.register_parameter(name, None if whole is None else self._shard(whole, held, placement is None))
        if placement is not None:
            self.register_state_dict_post_hook(save_experts)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(load_experts)  # type: ignore[no-untyped-call]

    def _shard(self, whole: nn.Parameter, held: list[int], is_identity: bool) -> nn.Parameter:
        own = whole.detach()[torch.tensor(held, dtype=torch.long, device=whole.device)].contiguous()
        if is_identity:
            own = DTensor.from_local(
                own, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
        return nn.Parameter(own, requires_grad=whole.requires_grad)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, from one seed the same numbers as the layer that holds all experts."""
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        gate_up, down, gate_up_bias, down_bias = (
            None if parameter is None else local(parameter) for parameter in self._parameters.values()
        )
        for expert in range(self.num_experts):
            places = [place for place, held in enumerate(self.experts) if held == expert]
            for weight, bias, size, fan_in in (
                (gate_up, gate_up_bias, (self.config.pre_activation_size, hidden), hidden),
                (down, down_bias, (hidden, intermediate), intermediate),
            ):
                assert weight is not None
                drawn = weight.new_empty(size)
                uniform_by_fan_in_(drawn, fan_in)
                drawn_bias = weight.new_empty(size[0])
                if bias is not None:
                    uniform_by_fan_in_(drawn_bias, fan_in)
                for place in places:
                    weight[place].copy_(drawn.T if self.config.weight_layout == "in_out" else drawn)
                    if bias is not None:
                        bias[place].copy_(drawn_bias)

    def send(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Sent:
        """Start to send each token to the ranks of its experts.

        Parameters
        ----------
        hidden_states : Tensor of shape (num_tokens, hidden_size)
            This rank's tokens, in the dtype of the parameters.
        topk_weights : Tensor of shape (num_tokens, top_k), dtype=float32
            Their weights.
        topk_ids : Tensor of shape (num_tokens, top_k), dtype=int32
            Their experts; an id outside ``[0, num_experts)`` is skipped.

        Returns
        -------
        Sent
            To be given to :meth:`finish`; anything may be computed in between.
        """
        plan = ops.ep_plan(
            topk_ids,
            self.num_experts,
            self.ep_size,
            ep_rank=self.ep_rank,
            num_local_experts=self.placement.num_local_experts,
            placement=self._table,
            num_chunks=self.num_chunks,
        )
        dtype = autocast_dtype(hidden_states)
        if dtype is not None:
            hidden_states = hidden_states.to(dtype)
        counts, received = torch.ops.moe.ep_dispatch(
            hidden_states.detach(),
            topk_weights.detach(),
            *plan,
            self.group_name,
            wire=self.wire,
            check=self.check,
            capacity=self.capacity,
        )
        return Sent(hidden_states, topk_weights, plan, counts, received)

    def finish(self, sent: Sent) -> Tensor:
        """Compute what arrived, and sum what comes back.

        Parameters
        ----------
        sent : Sent
            What :meth:`send` returned, once.

        Returns
        -------
        Tensor of shape (num_tokens, hidden_size)
            The weighted sums of this rank's tokens.
        """
        dtype = autocast_dtype(sent.hidden_states)
        parameters = [None if parameter is None else local(parameter) for parameter in self._parameters.values()]
        if dtype is not None:
            parameters = [None if parameter is None else parameter.to(dtype) for parameter in parameters]
        gate_up, down, gate_up_bias, down_bias = parameters
        differentiable = (sent.hidden_states, sent.topk_weights, *parameters)
        plan = sent.plan
        output: Tensor = torch.ops.moe.ep_experts(
            sent.hidden_states,
            gate_up,
            down,
            sent.topk_weights,
            plan.rank_offsets,
            plan.row_to_slot,
            plan.slot_to_row,
            plan.physical_ids,
            sent.received_counts,
            sent.received,
            gate_up_bias,
            down_bias,
            group_name=self.group_name,
            num_local_experts=self.placement.num_local_experts,
            wire=self.wire,
            check=self.check,
            capacity=self.capacity,
            save=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable),
            recompute=self.config.recompute,
            **{name: getattr(self.config, name) for name in _OPTIONS},
        )[0]
        return output

    def forward(self, hidden_states: Tensor, topk_weights: Tensor, plan: ops.Plan) -> Tensor:
        """Compute the experts, all of which this rank holds: what :class:`torch_moe.Experts` does, bit for bit."""
        gate_up, down, gate_up_bias, down_bias = (
            None if parameter is None else local(parameter) for parameter in self._parameters.values()
        )
        assert gate_up is not None
        assert down is not None
        options: dict[str, Any] = {name: getattr(self.config, name) for name in (*_OPTIONS, "recompute")}
        return ops.experts(hidden_states, gate_up, down, topk_weights, plan, gate_up_bias, down_bias, **options)

    def extra_repr(self) -> str:
        """Return sizes and options."""
        return (
            f"{self.config}, ep_size={self.ep_size}, ep_rank={self.ep_rank}, experts={self.experts}, "
            f"num_chunks={self.num_chunks}, wire={self.wire}"
        )


class ExpertParallel(MoE):
    """A :class:`torch_moe.MoE` whose experts are spread over the ranks of a group.

    Every rank routes its own tokens. A token travels once to each rank that has one of its experts, and one row comes
    back from each. Output and gradients are those of the layer in one process, up to the order of summation; they
    are the same bits from run to run and for any number of chunks. The gradient of an expert is the sum over the
    tokens of all ranks; router and shared experts are this rank's, as in data parallelism. A capacity counts the tokens
    of each rank by themselves. Every rank of the group has to call the layer, also one without tokens.

    Parameters
    ----------
    layer : MoE
        With the same parameters on every rank. Router and shared experts are taken over; experts are copied.
    group : DeviceMesh or ProcessGroup
        A mesh of one dimension, or with one named ``ep``.
    placement : Placement, default=None
        Which rank computes which expert. None: each rank the next ``ceil(num_experts / ep_size)``, as ``DTensor``.
    num_chunks : int, default=1
        Exchange the tokens in so many parts, of which one is computed while the others travel.
    wire : {"input", "fp8", "int8"}, default="input"
        The type of tokens on their way to the experts: see :func:`torch_moe.ops.ep_pack`. What comes back, and all
        gradients, have the type of the tokens.
    capacity : int, default=None
        Send so many rows to each rank per chunk, filled or not, and wait for no number: all shapes are known before.
        Whether that was enough everywhere is read once the output was computed; if not, all ranks do it again, exactly:
        nothing is dropped. The backward of enough reads nothing. Costs more bytes, and memory for ``min(top_k, local
        experts)`` pairs per row. None: as many rows as there are.
    check : bool, default=False
        Before each exchange, also in the backward, compare between all ranks how many rows they are about to send and
        to receive: backends move garbage where those differ, as when ranks call their layers in different order.

    Raises
    ------
    ValueError
        On every rank alike, if the layer is already parallel, cannot be, or differs between ranks.

    References
    ----------
    arXiv 2006.16668 (experts on ranks), 2412.19437 (a token once per node).
    """

    def __init__(
        self,
        layer: MoE,
        group: DeviceMesh | ProcessGroup,
        *,
        placement: Placement | None = None,
        num_chunks: int = 1,
        wire: str = "input",
        capacity: int | None = None,
        check: bool = False,
    ) -> None:
        mesh = _mesh(group, layer)
        options = {"num_chunks": num_chunks, "wire": wire, "capacity": capacity, "check": check}
        facts = {**options, "dtype": layer.router.weight.dtype}
        facts |= {"config": layer.config}
        facts["placement"] = None if placement is None else (placement.table.tolist(), placement.num_local_experts)
        _agree(facts, _problem(layer, placement, mesh.size(), options), mesh)
        nn.Module.__init__(self)
        self.config = layer.config
        self.router = layer.router
        self.experts: Any = ShardedExperts(layer.experts, mesh, placement=placement, **options)  # type: ignore[arg-type]
        for name in OPTIONAL_PARTS:
            setattr(self, name, getattr(layer, name))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        return_routing: bool = False,
        *,
        token_ids: Tensor | None = None,
        route_override: Tensor | None = None,
        router_input: Tensor | None = None,
        router_state: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Routing | ExtendedRouting]:
        """Apply the layer to this rank's tokens; arguments and result are those of :meth:`torch_moe.MoE.forward`."""
        if self.experts.ep_size == 1 and self.experts._table is None:
            forward: Any = super().forward
            plain: Tensor | tuple[Tensor, Routing | ExtendedRouting] = forward(
                hidden_states,
                return_routing,
                token_ids=token_ids,
                route_override=route_override,
                router_input=router_input,
                router_state=router_state,
            )
            return plain
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        routed = self._route(hidden_states, token_ids, route_override, router_input, router_state)
        plan = self._plan(routed, hidden_states)
        kept = routed.topk_ids.where(plan.slot_to_row >= 0, -1)
        sent = self.experts.send(self._narrow(tokens), self.router.weights_of_kept(routed, plan), kept)
        others = self._beside(tokens, routed)  # computed while the tokens travel
        output = self._finish(self.experts.finish(sent), others).view(hidden_states.shape)
        return (output, self._routing(routed, plan)) if return_routing else output


def _mesh(group: DeviceMesh | ProcessGroup, layer: MoE) -> DeviceMesh:
    if isinstance(group, DeviceMesh):
        names = group.mesh_dim_names or ()
        require(
            "ExpertParallel",
            group.ndim == 1 or "ep" in names,
            f"group must be a mesh of one dimension or with one named 'ep', got dimensions {list(names)}",
        )
        return group["ep"] if group.ndim > 1 else group
    # gloo works where the layer is; NCCL on GPUs alone.
    on_gpu = torch.distributed.get_backend(group) == "nccl" or layer.router.weight.is_cuda
    return DeviceMesh.from_group(group, "cuda" if on_gpu else "cpu")


def _problem(layer: MoE, placement: Placement | None, ep_size: int, options: dict[str, Any]) -> str | None:
    """Return what keeps this layer from being spread, or None."""
    if isinstance(layer, ExpertParallel):
        return "the layer is parallel already"
    experts, (num_chunks, wire) = layer.config.experts, (options["num_chunks"], options["wire"])
    if experts.weight_position != "output":
        return f"weight_position must be 'output', got {experts.weight_position!r}"
    if experts.limit_position != "before":
        return f"limit_position must be 'before', got {experts.limit_position!r}"
    for name in ("dropout", "expert_dropout"):
        if getattr(experts, name) > 0:
            return f"{name} must be 0, got {getattr(experts, name)}"
    if experts.accumulate:
        return "accumulate must be False: gradients of a DTensor go through autograd"
    if layer.config.router.selection == "expert_choice":
        return "selection must not be 'expert_choice': its choices per token differ between ranks"
    if num_chunks < 1:
        return f"num_chunks must be at least 1, got {num_chunks}"
    if wire not in WIRES:
        return f"wire must be in {WIRES}, got {wire!r}"
    if options["capacity"] is not None and options["capacity"] < 1:
        return f"capacity must be at least 1 or None, got {options['capacity']}"
    if placement is not None and placement.num_experts != experts.num_experts:
        return f"placement must have num_experts = {experts.num_experts} rows, got {placement.num_experts}"
    if placement is not None and int(placement.table.max()) >= ep_size * placement.num_local_experts:
        return (
            f"placement must name physical experts below ep_size * num_local_experts = "
            f"{ep_size * placement.num_local_experts}, got {int(placement.table.max())}"
        )
    return None


def _agree(facts: dict[str, object], problem: str | None, mesh: DeviceMesh) -> None:
    is_cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device(mesh.device_type)
    agree("ExpertParallel", facts, problem, mesh.get_group().group_name, mesh.size(), device)
