"""Balancing without a loss: a bias that steers the selection, moved after each optimiser step by what was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_moe._routing import count_tokens, scores, sum_over_ranks
from torch_moe.nn.router import TopKRouter
from torch_moe.observe import Observation, Read, RouterObserver, find_routers, read_router, token_mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METHODS = ("sign", "proportional", "pid", "quantile")


class BiasBalancer(RouterObserver):
    r"""Keep the load of experts even by a bias on the selection: no loss, no gradient.

    After the optimiser's step, :meth:`step` moves the bias :math:`b` of each layer by the counts :math:`c` since the
    last step, summed over micro-batches and ranks. With the fair count :math:`\bar c` and the relative error
    :math:`e = (\bar c - c) / \bar c`:

    - ``"sign"``: :math:`b \mathrel{+}= u \operatorname{sign}(\bar c - c)`. The rate times the steps must exceed the
      spread of the scores: short runs need a rate of .01, lowered later (``balancer.rate`` may be set any time).
    - ``"proportional"``: :math:`b \mathrel{+}= u\,e`; comes to rest, which softmax scores want.
    - ``"pid"``: :math:`b \mathrel{+}= u\,(e + p\,(e - e') + d\,(e - 2e' + e''))` with the errors :math:`e', e''` of the
      last two steps: the proportional rule with damping.
    - ``"quantile"``: each expert's bias becomes what would have won it exactly its share of the tokens just seen. With
      :math:`\alpha_t` the (K+1)-th largest of token t's biased scores, :math:`-b_i` is the quantile over t of
      :math:`s_i - \alpha` that :math:`TK/E` tokens exceed; ``rate`` is the weight of the new value against the old.

    Then the mean of b is subtracted, which changes no selection and stops a drift. A layer that chose nothing keeps its
    bias. Experts without weights are balanced like the others. Routers in eval mode are not observed, so that
    evaluation changes nothing. Recomputed activations are counted once.

    Make one of a model with :meth:`attach`, or observe counts yourself with :meth:`add` and write any bias tensors.

    Parameters
    ----------
    num_experts : int
        Number of experts, the same in every layer.
    num_layers : int, default=1
        Number of layers, each with its own counts and bias.
    method : {"sign", "proportional", "pid", "quantile"}, default="sign"
        The rule.
    rate : float, default=None
        The step size :math:`u`. None is 1e-3, and 1.0 for ``"quantile"``.
    center : bool, default=True
        Subtract the mean of the bias after each step.
    pid_gains : (float, float), default=(1.0, 0.0)
        :math:`p` and :math:`d` of ``"pid"``.
    process_group : ProcessGroup, default=None
        Ranks to sum the counts over, in one call for all layers; None is the default group where torch.distributed is
        initialised.

    Raises
    ------
    ValueError
        If a size or option is impossible.

    References
    ----------
    arXiv 2408.15664, 2412.19437 (sign).

    Examples
    --------
    >>> balancer, bias = BiasBalancer(num_experts=4, rate=0.01), torch.zeros(4)
    >>> balancer.add(torch.tensor([7, 1, 0, 0]))
    >>> balancer.step([bias])
    >>> bias
    tensor([-0.0150,  0.0050,  0.0050,  0.0050])
    """

    def __init__(
        self,
        num_experts: int,
        num_layers: int = 1,
        *,
        method: str = "sign",
        rate: float | None = None,
        center: bool = True,
        pid_gains: tuple[float, float] = (1.0, 0.0),
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _require(num_experts >= 1, f"num_experts must be at least 1, got {num_experts}")
        _require(num_layers >= 1, f"num_layers must be at least 1, got {num_layers}")
        _require(method in METHODS, f"method must be in {METHODS}, got {method!r}")
        if rate is None:
            rate = 1.0 if method == "quantile" else 1e-3
        _require(rate >= 0, f"rate must not be negative, got {rate}")
        _require(len(pid_gains) == 2, f"pid_gains must be two numbers, p and d, got {pid_gains}")
        self.num_experts = num_experts
        self.num_layers = num_layers
        self.method = method
        self.rate = rate
        self.center = center
        self.pid_gains = pid_gains
        self.process_group = process_group
        self._biased: list[tuple[nn.Module, str]] = []
        # One tensor per layer, because layers may live on different devices.
        self._counts = [torch.zeros(num_experts, dtype=torch.int64) for _ in range(num_layers)]
        # Sum over tokens of the bias that would have balanced their micro-batch; the last element counts the tokens.
        self._targets = [torch.zeros(num_experts + 1, dtype=torch.float64) for _ in range(num_layers)]
        self._errors = torch.zeros(2, num_layers, num_experts)  # of the last step, and of the one before

    @classmethod
    def attach(
        cls,
        model: nn.Module | Iterable[nn.Module],
        *,
        bias_name: str = "expert_bias",
        read: Read = read_router,
        **options: Any,  # noqa: ANN401
    ) -> BiasBalancer:
        """Watch the routers of a model and steer their biases.

        Parameters
        ----------
        model : Module or iterable of Module
            A model, whose :class:`torch_moe.TopKRouter` with a bias are taken; or router modules themselves, of any
            class that has a bias tensor and that ``read`` understands.
        bias_name : str, default="expert_bias"
            Where a router keeps its bias: a buffer or parameter of dtype float32 and shape (num_experts,).
        read : callable, default=read_router
            As in :meth:`RouterObserver.watch`. ``"quantile"`` needs the logits.
        **options
            Of :class:`BiasBalancer`, except the sizes.

        Returns
        -------
        BiasBalancer
            Call its :meth:`step` after the optimiser's, and keep its ``state_dict`` beside the optimiser's.

        Raises
        ------
        ValueError
            If no router has a bias, a bias is not float32 or not flat, or numbers of experts differ.
        """
        routers = find_routers(model)
        if isinstance(model, nn.Module):
            routers = [router for router in routers if getattr(router, bias_name, None) is not None]
        _require(bool(routers), f"no router with {bias_name} to steer (make the layers with expert_bias=True)")
        for number, router in enumerate(routers):
            bias = getattr(router, bias_name, None)
            kind = type(router).__name__
            if not isinstance(bias, Tensor):
                raise ValueError(f"BiasBalancer: router {number}, a {kind}, must have a tensor {bias_name}, got {bias}")
            wide = bias.dtype in (torch.float32, torch.float64)
            _require(
                wide,
                f"{bias_name} of router {number} must be float32, got {bias.dtype} (call .float(): a step is too small "
                "for 16 bits)",
            )
            flat = bias.dim() == 1
            _require(flat, f"{bias_name} of router {number} must have shape (num_experts,), got {list(bias.shape)}")
        sizes = sorted({getattr(router, bias_name).numel() for router in routers})
        _require(len(sizes) == 1, f"all layers must have as many experts, got {sizes} (attach one balancer to each)")
        grouped = [router for router in routers if isinstance(router, TopKRouter) and router.config.num_groups > 1]
        ungrouped = options.get("method") != "quantile" or not grouped
        _require(ungrouped, "method 'quantile' needs routers without groups (use 'sign' or 'proportional')")
        balancer = cls(sizes[0], len(routers), **options)
        balancer._biased = [(router, bias_name) for router in routers]
        for layer, router in enumerate(routers):
            balancer._move(layer, getattr(router, bias_name).device)
        balancer.watch(routers, read)
        return balancer

    def _wants(self, router: nn.Module) -> bool:
        return router.training  # an evaluation must not move the biases

    @torch.no_grad()
    def add(self, tokens_per_expert: Tensor, layer: int = 0) -> None:
        """Add the counts of one micro-batch.

        Parameters
        ----------
        tokens_per_expert : Tensor of shape (num_experts,), any integer dtype
            How often each expert was chosen, padding left out.
        layer : int, default=0
            Whose.

        Raises
        ------
        ValueError
            If the shape differs, or the method is ``"quantile"``, which needs scores.
        """
        _require(self.method != "quantile", "method 'quantile' needs scores, not counts: use observe")
        expected = (self.num_experts,)
        _require(
            tokens_per_expert.shape == expected,
            f"tokens_per_expert must have shape {list(expected)}, got {list(tokens_per_expert.shape)}",
        )
        self._move(layer, tokens_per_expert.device)
        self._counts[layer].add_(tokens_per_expert)

    @torch.no_grad()
    def observe(self, observation: Observation, layer: int = 0, *, mask: Tensor | None = None) -> None:
        """Take in one forward of one layer.

        Parameters
        ----------
        observation : Observation
            The router's choice before capacity: what tokens *want* is to be balanced.
        layer : int, default=0
            Whose.
        mask : Tensor, default=None
            False or 0 where a token is padding, one element per token.

        Raises
        ------
        ValueError
            If a shape differs, or the method is ``"quantile"`` and the observation has no logits.
        """
        mask = token_mask("BiasBalancer", observation, mask)
        if self.method != "quantile":
            self.add(count_tokens(observation.topk_ids, self.num_experts, mask), layer)
            return
        router_logits, options = observation.router_logits, observation.route_options or {}
        if router_logits is None:
            raise ValueError("BiasBalancer: method 'quantile' needs router_logits in the observation")
        score = router_logits
        if options.get("score_order") != "topk_then_score":
            score = scores(router_logits, options.get("score_function", observation.score_function))
        self._move(layer, score.device)
        target, num_tokens = _balancing_bias(score, observation.expert_bias, observation.topk_ids.shape[-1], mask)
        self._targets[layer].add_(torch.cat([target * num_tokens, num_tokens.view(1)]))

    @torch.no_grad()
    def step(self, biases: Sequence[Tensor] | None = None) -> None:
        """Move the biases by what was observed since the last step, which is then forgotten; call it on every rank.

        Parameters
        ----------
        biases : sequence of Tensor of shape (num_experts,), dtype=float32, default=None
            One per layer, written in place. None takes those of the routers attached to.

        Raises
        ------
        ValueError
            If there are not as many biases as layers, or one is of another number of experts.
        """
        if biases is None:
            _require(bool(self._biased), "step needs biases, because no routers are attached")
            biases = [getattr(router, name) for router, name in self._biased]
        _require(len(biases) == self.num_layers, f"step needs {self.num_layers} biases, got {len(biases)}")
        shapes = [list(bias.shape) for bias in biases]
        expected = [self.num_experts]
        _require(all(shape == expected for shape in shapes), f"biases must have shape {expected}, got {shapes}")
        device = biases[0].device
        old = torch.stack([bias.to(device) for bias in biases])  # [L, E]
        if self.method == "quantile":
            sums = sum_over_ranks(torch.stack([target.to(device) for target in self._targets]), self.process_group)
            observed = sums[:, -1:] > 0
            target = (sums[:, :-1] / sums[:, -1:].clamp(min=1)).to(old.dtype)
            new = old.lerp(target, self.rate)
        else:
            counts = sum_over_ranks(torch.stack([count.to(device) for count in self._counts]), self.process_group)
            fair = counts.sum(dim=1, keepdim=True).to(old.dtype) / self.num_experts
            observed = fair > 0
            new = old + self.rate * self._correction(fair - counts, fair, observed)
        if self.center:
            new = new - new.mean(dim=1, keepdim=True)
        new = torch.where(observed, new, old)
        for bias, value in zip(biases, new, strict=True):
            bias.copy_(value)
        for sums in (*self._counts, *self._targets):
            sums.zero_()

    def _correction(self, missing: Tensor, fair: Tensor, observed: Tensor) -> Tensor:
        """Return what to add to the biases per unit of rate, [L, E]."""
        if self.method == "sign":
            return missing.sign()
        error = missing / fair.clamp(min=torch.finfo(fair.dtype).tiny)
        if self.method == "proportional":
            return error
        last, before = self._errors.to(error)
        proportional, derivative = self.pid_gains
        correction: Tensor = error + proportional * (error - last) + derivative * (error - 2 * last + before)
        self._errors = torch.where(observed, torch.stack([error, last]), torch.stack([last, before]))
        return correction

    def _move(self, layer: int, device: torch.device) -> None:
        """Keep the sums where the counts come from: no copy, and no wait, per forward."""
        if self._counts[layer].device != device:
            self._counts[layer] = self._counts[layer].to(device)
            self._targets[layer] = self._targets[layer].to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of this rank's sums and the errors of ``"pid"``; the biases are the model's."""
        return {
            "tokens_per_expert": torch.stack([counts.cpu() for counts in self._counts]),
            "targets": torch.stack([target.cpu() for target in self._targets]),
            "errors": self._errors.to("cpu", copy=True),
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned.

        Parameters
        ----------
        state_dict : dict of str to Tensor
            Of a balancer of the same sizes.

        Raises
        ------
        ValueError
            If keys or sizes differ.
        """
        own = self.state_dict()
        shapes = {name: list(value.shape) for name, value in state_dict.items()}
        expected = {name: list(value.shape) for name, value in own.items()}
        _require(shapes == expected, f"state_dict must have the shapes {expected}, got {shapes}")
        for layer in range(self.num_layers):
            self._counts[layer].copy_(state_dict["tokens_per_expert"][layer])
            self._targets[layer].copy_(state_dict["targets"][layer])
        self._errors.copy_(state_dict["errors"])


def _balancing_bias(score: Tensor, bias: Tensor | None, top_k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the bias [E] at which these tokens' choices are even, fp64, and the number of tokens it comes from."""
    num_tokens, num_experts = score.shape
    count = torch.full((), num_tokens, dtype=torch.float64, device=score.device)
    count = count if mask is None else mask.sum(dtype=torch.float64)
    if top_k >= num_experts or num_tokens == 0:
        return score.new_zeros(num_experts, dtype=torch.float64), count
    score = score.double()
    biased = score if bias is None else score + bias
    threshold = biased.topk(top_k + 1, dim=-1).values[:, -1:]  # the best that a token did not choose
    margin = score - threshold
    if mask is not None:
        margin = margin.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    margin = margin.sort(dim=0, descending=True).values
    # As many margins lie above the position share - 1/2 of the descending order as the share, rounded, says.
    last = (count - 1).clamp(min=0)
    position = (count * top_k / num_experts - 0.5).clamp(min=0).minimum(last)
    below = position.floor()
    lower = margin.gather(0, below.long().expand(1, num_experts))[0]
    upper = margin.gather(0, (below + 1).minimum(last).long().expand(1, num_experts))[0]
    target = -lower.lerp(upper, position - below)
    return torch.where(count > 0, target, 0), count


def _require(condition: bool, message: str) -> None:
    """Raise ``ValueError`` unless the condition holds."""
    if not condition:
        raise ValueError(f"BiasBalancer: {message}")
