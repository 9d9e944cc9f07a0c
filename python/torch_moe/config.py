"""Every MoE layer that can be built, as frozen data: what contradicts itself is refused when it is written down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

from torch_moe.ops.activation import GATED_ACTIVATIONS, UNGATED_ACTIVATIONS, is_gated


class _Checked:
    """A config that checks itself: the values of every Literal field, then what `_check` says."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                choices = get_args(hint)
                self._require(
                    getattr(self, name) in choices, f"{name} must be in {choices}, got {getattr(self, name)!r}"
                )
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def _require_at_least_1(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")

    def is_default(self, name: str) -> bool:
        """Tell whether a field that has a default holds it."""
        return bool(getattr(self, name) == getattr(type(self), name))

    def _require_default_unless(self, condition: bool, needs: str, *names: str) -> None:
        """Refuse options that would do nothing."""
        for name in names:
            unused = condition or self.is_default(name)
            self._require(
                unused, f"{name}={getattr(self, name)!r} does nothing without {needs}: set it or leave {name}"
            )


@cache
def _choices_of(config: type) -> dict[str, tuple[str, ...]]:
    """Return the values of every Literal field."""
    hints = get_type_hints(config)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


@dataclass(frozen=True, kw_only=True)
class RouterConfig(_Checked):
    """How tokens choose experts. The order of the fields is the order in which they act.

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    num_experts : int
        Experts with weights.
    top_k : int
        Experts per token.
    input_norm : bool, default=False
        Normalise the tokens by their root mean square, times a learned scale, over sqrt(hidden_size) (Gemma-4).
    input_jitter : float, default=0.0
        In training, multiply every input by a number drawn from [1 - input_jitter, 1 + input_jitter] (Switch).
    projection_bias : bool, default=False
        Add a bias to the logits: it enters the weights, and learns by gradient (gpt-oss).
    projection_dtype : {"float32", "input"}, default="float32"
        What the logits are computed in. "input" only repeats checkpoints that were trained so.
    noisy : bool, default=False
        In training, add normal noise of a learned size to the logits (Shazeer 2017).
    logit_softcap : float, default=None
        Replace the logits z by ``c * tanh(z / c)``.
    score_function, score_order
        As in :func:`torch_moe.ops.route`.
    selection : {"topk", "hash", "sinkhorn", "top2_gshard", "expert_choice"}, default="topk"
        Who chooses. "hash": a fixed table from token ids, with learned weights. "sinkhorn": in training, the best
        after the scores were balanced; in evaluation "topk". "top2_gshard": the two best, see
        ``second_expert_policy``. "expert_choice": each expert takes its best tokens, of which it sees all: not for
        causal models.
    expert_bias : bool, default=False
        Keep a bias that steers the selection only and has no gradient.
    num_groups, topk_groups, group_score, group_mask
        As in :func:`torch_moe.ops.route`.
    vocab_size : int, default=None
        Rows of the table of "hash".
    sinkhorn_iterations : int, default=8
        Alternations of "sinkhorn".
    second_expert_policy : {"all", "random"}, default="all"
        For "top2_gshard", in training: keep the second expert always, or with probability ``2 * weight``.
    causal : bool, default=True
        Whether the model predicts later tokens from earlier ones. "expert_choice" needs False.
    force_balanced : bool, default=False
        Choose experts in turn, whatever the logits are: for benchmarks.
    renormalize, renormalize_p, renormalize_eps, renormalize_eps_mode, routed_scaling_factor
        As in :func:`torch_moe.ops.route`.
    per_expert_scale : bool, default=False
        Multiply the weights by a learned scale of the expert (Gemma-4).
    num_zero_experts : int, default=0
        Experts without weights that a token can choose, numbered after the others.
    zero_expert : {"identity", "zero"}, default="identity"
        What they return: the token itself (LongCat), or nothing.
    capacity_factor : float, default=None
        An expert takes at most ``ceil(capacity_factor * num_tokens * top_k / num_experts)`` slots. None, without
        ``capacity``, is dropless: no slot is ever dropped. For "expert_choice" what every expert takes (None: 1).
    eval_capacity_factor : float, default=None
        The same in evaluation; None: as in training.
    capacity : int, default=None
        That number itself, in place of ``capacity_factor``.
    capacity_scope : {"batch", "sequence"}, default="batch"
        Whether experts have this capacity for all tokens of a call together or for each sequence.
    drop_policy : {"position", "probability"}, default="position"
        Whether the later slots are dropped first, or those of the least weight.
    check_finite : bool, default=False
        Raise on NaN or infinite logits, instead of showing NaN in the weights.

    Raises
    ------
    ValueError
        If options contradict each other, or would leave the router without a gradient. The message names the fields.

    References
    ----------
    arXiv 1701.06538 (noisy), 2006.16668 (GShard), 2101.03961 (Switch: jitter, capacity), 2106.04426 (hash), 2202.09368
    (expert choice), 2401.04088 (Mixtral), 2412.19437 (DeepSeek-V3), 2509.01322 (LongCat: identity experts).
    """

    hidden_size: int
    num_experts: int
    top_k: int
    input_norm: bool = False
    input_jitter: float = 0.0
    projection_bias: bool = False
    projection_dtype: Literal["float32", "input"] = "float32"
    noisy: bool = False
    logit_softcap: float | None = None
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    score_order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    selection: Literal["topk", "hash", "sinkhorn", "top2_gshard", "expert_choice"] = "topk"
    expert_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    group_mask: Literal["-inf", "zero"] = "-inf"
    vocab_size: int | None = None
    sinkhorn_iterations: int = 8
    second_expert_policy: Literal["all", "random"] = "all"
    causal: bool = True
    force_balanced: bool = False
    renormalize: bool = True
    renormalize_p: float = 1.0
    renormalize_eps: float = 1e-20
    renormalize_eps_mode: Literal["add", "clamp"] = "add"
    routed_scaling_factor: float = 1.0
    per_expert_scale: bool = False
    num_zero_experts: int = 0
    zero_expert: Literal["identity", "zero"] = "identity"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    capacity: int | None = None
    capacity_scope: Literal["batch", "sequence"] = "batch"
    drop_policy: Literal["position", "probability"] = "position"
    check_finite: bool = False

    @property
    def num_choices(self) -> int:
        """Return the width of the logits: experts with and without weights."""
        return self.num_experts + self.num_zero_experts

    def _check(self) -> None:
        self._require_at_least_1("hidden_size", "num_experts", "sinkhorn_iterations")
        self._require(self.num_zero_experts >= 0, f"num_zero_experts must not be negative, got {self.num_zero_experts}")
        choices = "num_experts" + (" + num_zero_experts" if self.num_zero_experts else "") + f" = {self.num_choices}"
        self._require(1 <= self.top_k <= self.num_choices, f"top_k must be in [1, {choices}], got {self.top_k}")
        jitter, softcap = self.input_jitter, self.logit_softcap
        self._require(0 <= jitter < 1, f"input_jitter must be in [0, 1), got {jitter}")
        self._require(softcap is None or softcap > 0, f"logit_softcap must be positive or None, got {softcap}")
        self._check_groups()
        self._check_selection()
        self._check_weights()
        self._check_capacity()
        self._require_default_unless(self.num_zero_experts > 0, "num_zero_experts", "zero_expert")

    def _check_groups(self) -> None:
        groups, kept = self.num_groups, self.topk_groups
        divides = groups >= 1 and self.num_experts % groups == 0
        self._require(divides, f"num_groups must divide num_experts = {self.num_experts}, got {groups}")
        self._require(1 <= kept <= groups, f"topk_groups must be in [1, num_groups = {groups}], got {kept}")
        eligible = kept * (self.num_experts // groups)
        self._require(
            groups == 1 or self.top_k <= eligible,
            f"top_k must be at most {eligible}, the experts of topk_groups = {kept} groups, got {self.top_k} "
            "(raise topk_groups or lower num_groups)",
        )
        self._require(
            groups == 1 or self.num_zero_experts == 0,
            f"num_zero_experts={self.num_zero_experts} belong to no group: set num_groups=1, got {groups}",
        )
        self._require_default_unless(groups > 1, "num_groups", "group_score", "group_mask")

    def _check_selection(self) -> None:
        choice = self.selection
        self._require_default_unless(choice == "hash", 'selection="hash"', "vocab_size")
        self._require_default_unless(choice == "sinkhorn", 'selection="sinkhorn"', "sinkhorn_iterations")
        self._require_default_unless(choice == "top2_gshard", 'selection="top2_gshard"', "second_expert_policy")
        if choice == "hash":
            rows = self.vocab_size
            self._require(rows is not None and rows >= 1, f'selection="hash" needs vocab_size >= 1, got {rows}')
        if choice == "top2_gshard":
            self._require(self.top_k == 2, f'selection="top2_gshard" needs top_k=2, got {self.top_k}')
        if choice == "expert_choice":
            self._require(
                not self.causal,
                'selection="expert_choice" leaks the future in a causal model: an expert sees all tokens of a call '
                'before it chooses. Set causal=False if the model is not causal, or selection="topk"',
            )
            self._require(not self.renormalize, 'selection="expert_choice" needs renormalize=False: a token has no sum')
        if choice not in ("topk", "top2_gshard"):
            unused = ("expert_bias", "num_groups") if choice != "sinkhorn" else ("num_groups",)
            for name in unused:
                self._require(
                    self.is_default(name), f'{name} does nothing with selection="{choice}": leave {name} or use "topk"'
                )
        self._require(
            self.num_zero_experts == 0 or choice in ("topk", "hash"),
            f'num_zero_experts={self.num_zero_experts} needs selection="topk" or "hash", got "{choice}"',
        )

    def _check_weights(self) -> None:
        constant = self.renormalize or (self.score_function == "softmax" and self.score_order == "topk_then_score")
        self._require(
            not (self.top_k == 1 and self.num_choices > 1 and constant),
            "top_k=1 needs renormalize=False and scores that are not a softmax over the selection "
            '(score_order="score_then_topk", or score_function="sigmoid"): else the weight is identically 1 and the '
            "router gets no gradient",
        )
        options = ("renormalize_p", "renormalize_eps", "renormalize_eps_mode")
        self._require_default_unless(self.renormalize, "renormalize", *options)
        self._require(self.renormalize_p >= 1, f"renormalize_p must be at least 1, got {self.renormalize_p}")
        self._require(self.renormalize_eps >= 0, f"renormalize_eps must not be negative, got {self.renormalize_eps}")
        scale = self.routed_scaling_factor
        self._require(0 < scale < math.inf, f"routed_scaling_factor must be positive, got {scale}")

    def _check_capacity(self) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            positive = factor is None or 0 < factor < math.inf
            self._require(positive, f"{name} must be positive, or None for no limit, got {factor}")
        self._require(self.capacity is None or self.capacity >= 1, f"capacity must be at least 1, got {self.capacity}")
        both = self.capacity is not None and self.capacity_factor is not None
        self._require(not both, f"give capacity={self.capacity} or capacity_factor={self.capacity_factor}, not both")
        limited = self.capacity is not None or self.capacity_factor is not None
        needs = "capacity_factor or capacity (None is dropless)"
        self._require_default_unless(limited, needs, "capacity_scope", "drop_policy")
        self._require_default_unless(self.capacity_factor is not None, "capacity_factor", "eval_capacity_factor")
        if self.selection == "expert_choice":
            for name in ("capacity", "capacity_scope", "drop_policy"):
                self._require(
                    self.is_default(name),
                    f'{name}={getattr(self, name)!r} contradicts selection="expert_choice", where every expert takes '
                    f"capacity_factor * num_tokens * top_k / num_experts tokens: leave {name}",
                )


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(_Checked):
    """What the experts compute.

    Parameters
    ----------
    hidden_size : int
        Width of a token.
    intermediate_size : int
        Width between the two projections.
    num_experts : int
        Number of experts.
    activation, gate_layout, alpha, limit, up_offset
        As in :func:`torch_moe.ops.activation`.
    bias : bool, default=False
        Add biases to both projections.
    weight_layout : {"out_in", "in_out"}, default="out_in"
        ``gate_up_proj`` is (num_experts, 2 * intermediate_size, hidden_size) and ``down_proj`` (num_experts,
        hidden_size, intermediate_size); ``"in_out"`` swaps the last two dimensions of both.
    weight_position : {"output", "input"}, default="output"
        Whether a token's weight multiplies what the expert returns or what it is given (Llama-4).
    recompute : bool, default=False
        Keep no pre-activation for the backward; it is computed again.
    accumulate : bool, default=False
        Add the projections' gradients to their ``.grad`` in place, as in :func:`torch_moe.ops.experts`.
    dropout : float, default=0.0
        In training, zero each intermediate value inside an expert with this probability and divide the others by its
        complement. Switch fine-tunes with 0.4. The stages then run one by one and keep what lies between them.
    expert_dropout : float, default=0.0
        In training, skip each chosen expert of a token with this probability and divide the weights of the others by
        its complement. With either kind, the output's expectation over what is dropped is that of evaluation.

    Raises
    ------
    ValueError
        If a size is less than 1, an option is unknown, or ``dropout`` is to go with ``recompute``.

    References
    ----------
    arXiv 2101.03961, section 2.4 (dropout inside experts).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: str = "swiglu"
    bias: bool = False
    gate_layout: Literal["concat", "interleaved"] = "concat"
    weight_layout: Literal["out_in", "in_out"] = "out_in"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    weight_position: Literal["output", "input"] = "output"
    recompute: bool = False
    accumulate: bool = False
    dropout: float = 0.0
    expert_dropout: float = 0.0

    @property
    def pre_activation_size(self) -> int:
        """Return the width of the first projection: 2I when gated, else I."""
        return self.intermediate_size * (2 if is_gated(self.activation) else 1)

    def _check(self) -> None:
        self._require_at_least_1("hidden_size", "intermediate_size", "num_experts")
        names = GATED_ACTIVATIONS + UNGATED_ACTIVATIONS
        self._require(self.activation in names, f"activation must be in {names}, got {self.activation!r}")
        self._require(self.limit is None or self.limit > 0, f"limit must be positive or None, got {self.limit}")
        plain = (self.alpha, self.limit, self.up_offset) == (1.0, None, 0.0)
        self._require(
            plain or self.activation == "swiglu", f"alpha, limit and up_offset shape swiglu, not {self.activation}"
        )
        for name in ("dropout", "expert_dropout"):
            self._require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        self._require(
            self.dropout == 0 or not self.recompute,
            f"dropout={self.dropout} keeps what recompute=True would not: use torch.utils.checkpoint instead",
        )
        self._require(
            self.expert_dropout == 0 or self.weight_position == "output",
            f'expert_dropout={self.expert_dropout} scales the weights, which weight_position="input" feeds through the '
            'activation: set weight_position="output"',
        )


@dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig(ExpertsConfig):
    """The dense network that every token passes beside its experts; its sizes and options are its own.

    Parameters
    ----------
    gate : {"none", "sigmoid"}, default="none"
        Multiply its output by the sigmoid of a learned linear function of the token (Qwen2-MoE, Qwen3-Next).
    """

    num_experts: int = 1
    gate: Literal["none", "sigmoid"] = "none"

    def _check(self) -> None:
        super()._check()
        for name in (
            "num_experts",
            "weight_layout",
            "weight_position",
            "recompute",
            "accumulate",
            "dropout",
            "expert_dropout",
        ):
            self._require(self.is_default(name), f"{name}={getattr(self, name)!r} is for routed experts: leave {name}")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(_Checked):
    """A whole layer.

    Parameters
    ----------
    router : RouterConfig
        Who goes where.
    experts : ExpertsConfig
        What is computed there.
    shared_experts : SharedExpertsConfig, default=None
        What is added for every token.

    Raises
    ------
    ValueError
        If the parts do not fit together.
    """

    router: RouterConfig
    experts: ExpertsConfig
    shared_experts: SharedExpertsConfig | None = None

    def _check(self) -> None:
        for name in ("hidden_size", "num_experts"):
            ours, theirs = getattr(self.router, name), getattr(self.experts, name)
            self._require(ours == theirs, f"router.{name} = {ours} must equal experts.{name} = {theirs}")
        if self.shared_experts is not None:
            ours, theirs = self.router.hidden_size, self.shared_experts.hidden_size
            self._require(
                ours == theirs, f"router.hidden_size = {ours} must equal shared_experts.hidden_size = {theirs}"
            )
