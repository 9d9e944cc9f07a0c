"""RouterConfig: every way to choose experts, as frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch_moe._checked import Checked


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Checked):
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
    projection : {"linear", "mlp"}, default="linear"
        What gives the logits. "mlp": a linear map to ``projection_size``, an RMS norm, and three linear maps with GELU
        between them (ZAYA).
    projection_size : int, default=None
        Width of the "mlp".
    projection_state : bool, default=False
        Add the state of the layer before, times a learned scale, to what the first map gives: that is this layer's
        state (ZAYA).
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
    selection : {"topk", "hash", "sinkhorn", "top2_gshard", "sparsemixer", "expert_choice"}, default="topk"
        Who chooses. "hash": a fixed table from token ids, with learned weights. "sinkhorn": in training, the best
        after the scores were balanced; in evaluation "topk". "top2_gshard": the two best, see
        ``second_expert_policy``. "sparsemixer": one after the other, drawn in training, as in
        :func:`torch_moe.nn.sparsemixer.sparsemixer`. "expert_choice": each expert takes its best tokens, of which it
        sees all: not for causal models.
    expert_bias : bool, default=False
        Keep a bias that steers the selection only and has no gradient. "sparsemixer" adds it to the logits.
    num_groups, topk_groups, group_score, group_mask
        As in :func:`torch_moe.ops.route`.
    vocab_size : int, default=None
        Rows of the table of "hash".
    sinkhorn_iterations : int, default=8
        Alternations of "sinkhorn".
    second_expert_policy : {"all", "random", "sampling"}, default="all"
        For "top2_gshard", in training: keep the second expert always, or with probability ``2 * weight``, or draw it by
        its probability.
    sparsemixer_tolerance : float, default=0.01
        How near a logit has to come for "sparsemixer".
    causal : bool, default=True
        Whether the model predicts later tokens from earlier ones. "expert_choice" needs False.
    force_balanced : bool, default=False
        Choose experts in turn, whatever the logits are: for benchmarks.
    force_biased : float, default=0.0
        Choose experts by Zipf's law with this exponent, whatever the logits are: for benchmarks of imbalance.
    renormalize, renormalize_p, renormalize_eps, renormalize_eps_mode, routed_scaling_factor
        As in :func:`torch_moe.ops.route`.
    per_expert_scale : bool, default=False
        Multiply the weights by a learned scale of the expert (Gemma-4).
    num_shared_sinks : int, default=0
        Shared experts whose logits, the last ones, join those of the chosen in the normalisation and weigh them; see
        ``gate="router"`` of :class:`torch_moe.SharedExpertsConfig` (Inkling).
    global_scale : bool, default=False
        Multiply all weights by one learned scale (Inkling).
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
        Whether the later slots are dropped first, or those of the least weight. For "top2_gshard" second choices are
        dropped before first ones, and the tokens of the least highest score first.
    renormalize_before_drop : bool, default=True
        Whether the weights have their sum before slots are dropped, or after.
    check_finite : bool, default=False
        Raise on NaN or infinite logits, instead of showing NaN in the weights.

    Raises
    ------
    ValueError
        If options contradict each other, or would leave the router without a gradient. The message names the fields.

    References
    ----------
    arXiv 1701.06538 (noisy), 2006.16668 (GShard), 2101.03961 (Switch: jitter, capacity), 2106.04426 (hash), 2202.09368
    (expert choice), 2401.04088 (Mixtral), 2409.12136 (SparseMixer-v2), 2412.19437 (DeepSeek-V3), 2509.01322 (LongCat:
    identity experts).
    """

    hidden_size: int
    num_experts: int
    top_k: int
    input_norm: bool = False
    input_jitter: float = 0.0
    projection: Literal["linear", "mlp"] = "linear"
    projection_size: int | None = None
    projection_state: bool = False
    projection_bias: bool = False
    projection_dtype: Literal["float32", "input"] = "float32"
    noisy: bool = False
    logit_softcap: float | None = None
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    score_order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    selection: Literal["topk", "hash", "sinkhorn", "top2_gshard", "sparsemixer", "expert_choice"] = "topk"
    expert_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    group_mask: Literal["-inf", "zero"] = "-inf"
    vocab_size: int | None = None
    sinkhorn_iterations: int = 8
    second_expert_policy: Literal["all", "random", "sampling"] = "all"
    sparsemixer_tolerance: float = 0.01
    causal: bool = True
    force_balanced: bool = False
    force_biased: float = 0.0
    renormalize: bool = True
    renormalize_p: float = 1.0
    renormalize_eps: float = 1e-20
    renormalize_eps_mode: Literal["add", "clamp"] = "add"
    routed_scaling_factor: float = 1.0
    per_expert_scale: bool = False
    num_shared_sinks: int = 0
    global_scale: bool = False
    num_zero_experts: int = 0
    zero_expert: Literal["identity", "zero"] = "identity"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    capacity: int | None = None
    capacity_scope: Literal["batch", "sequence"] = "batch"
    drop_policy: Literal["position", "probability"] = "position"
    renormalize_before_drop: bool = True
    check_finite: bool = False

    @property
    def num_choices(self) -> int:
        """Return how many experts a token chooses among: those with and without weights."""
        return self.num_experts + self.num_zero_experts

    def _check(self) -> None:
        self._require_at_least_1("hidden_size", "num_experts", "sinkhorn_iterations")
        self._require(self.num_zero_experts >= 0, f"num_zero_experts must not be negative, got {self.num_zero_experts}")
        choices = "num_experts" + (" + num_zero_experts" if self.num_zero_experts else "") + f" = {self.num_choices}"
        self._require(1 <= self.top_k <= self.num_choices, f"top_k must be in [1, {choices}], got {self.top_k}")
        self._check_projection()
        jitter, softcap = self.input_jitter, self.logit_softcap
        self._require(0 <= jitter < 1, f"input_jitter must be in [0, 1), got {jitter}")
        softcapped = softcap is None or 0 < softcap < math.inf
        self._require(softcapped, f"logit_softcap must be positive and finite, or None, got {softcap}")
        self._check_groups()
        self._check_selection()
        self._check_weights()
        self._check_capacity()
        self._require_default_unless(self.num_zero_experts > 0, "num_zero_experts", "zero_expert")

    def _check_projection(self) -> None:
        mlp, size = self.projection == "mlp", self.projection_size
        self._require_default_unless(mlp, 'projection="mlp"', "projection_size", "projection_state")
        self._require(not mlp or (size or 0) >= 1, f'projection="mlp" needs projection_size >= 1, got {size}')
        self._require(
            not (mlp and self.noisy),
            'noisy=True needs projection="linear": the size of its noise is linear in the token',
        )

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
        self._require_default_unless(choice == "sparsemixer", 'selection="sparsemixer"', "sparsemixer_tolerance")
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
        if choice == "sparsemixer":
            for name in ("score_function", "score_order", "routed_scaling_factor"):
                self._require(self.is_default(name), f'selection="sparsemixer" weighs by itself: leave {name}')
            self._require(
                not self.renormalize, 'selection="sparsemixer" needs renormalize=False: each weight is of its own draw'
            )
            tolerance = self.sparsemixer_tolerance
            self._require(tolerance > 0, f"sparsemixer_tolerance must be positive, got {tolerance}")
        if choice not in ("topk", "top2_gshard"):
            keeps_bias = choice in ("sinkhorn", "sparsemixer")
            unused = ("num_groups",) if keeps_bias else ("expert_bias", "num_groups")
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
        p, eps = self.renormalize_p, self.renormalize_eps
        self._require(1 <= p < math.inf, f"renormalize_p must be at least 1 and finite, got {p}")
        self._require(0 <= eps < math.inf, f"renormalize_eps must be finite and not negative, got {eps}")
        zipf = self.force_biased
        self._require(0 <= zipf < math.inf, f"force_biased must be finite and not negative, got {zipf}")
        self._require(not (zipf and self.force_balanced), f"give force_balanced=True or force_biased={zipf}, not both")
        self._check_sinks()
        scale = self.routed_scaling_factor
        self._require(0 < scale < math.inf, f"routed_scaling_factor must be positive and finite, got {scale}")

    def _check_sinks(self) -> None:
        number = self.num_shared_sinks
        self._require(number >= 0, f"num_shared_sinks must not be negative, got {number}")
        if number:
            self._require(
                self.score_function != "softmax" and self.score_order == "score_then_topk",
                f'num_shared_sinks={number} needs score_function="sigmoid" or "sqrtsoftplus" and score_order='
                '"score_then_topk": scores that do not depend on each other',
            )
            self._require(
                self.renormalize and self.renormalize_p == 1,
                f"num_shared_sinks={number} join a sum: set renormalize=True and renormalize_p=1.0",
            )
            self._require(
                self.selection == "topk" and self.num_zero_experts == 0,
                f'num_shared_sinks={number} needs selection="topk" and num_zero_experts=0',
            )

    def _check_capacity(self) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            positive = factor is None or 0 < factor < math.inf
            self._require(positive, f"{name} must be positive and finite, or None for no limit, got {factor}")
        self._require(self.capacity is None or self.capacity >= 1, f"capacity must be at least 1, got {self.capacity}")
        both = self.capacity is not None and self.capacity_factor is not None
        self._require(not both, f"give capacity={self.capacity} or capacity_factor={self.capacity_factor}, not both")
        limited = self.capacity is not None or self.capacity_factor is not None
        needs = "capacity_factor or capacity (None is dropless)"
        names = ("capacity_scope", "drop_policy", "eval_capacity_factor", "renormalize_before_drop")
        self._require_default_unless(limited, needs, *names)
        after = not self.renormalize_before_drop
        self._require(
            not after or (self.renormalize and self.renormalize_p == 1),
            "renormalize_before_drop=False needs renormalize=True and renormalize_p=1.0",
        )
        for name in ("per_expert_scale", "num_shared_sinks", "global_scale"):
            self._require(
                not after or self.is_default(name),
                f"renormalize_before_drop=False would divide by {name}, too: leave one of the two",
            )
        if self.selection == "expert_choice":
            for name in ("capacity", "capacity_scope", "drop_policy"):
                self._require(
                    self.is_default(name),
                    f'{name}={getattr(self, name)!r} contradicts selection="expert_choice", where every expert takes '
                    f"capacity_factor * num_tokens * top_k / num_experts tokens: leave {name}",
                )
