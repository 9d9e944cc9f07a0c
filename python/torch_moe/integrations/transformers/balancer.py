"""Routing statistics and bias updates for transformers models, which has neither."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_moe.balancing import BiasBalancer
from torch_moe.integrations.transformers.families import OWN_BIAS
from torch_moe.integrations.transformers.layers import Layer, find_layers, read
from torch_moe.metrics import RoutingStats


class ModelBalancer:
    """What :func:`attach_balancer` returns: call :meth:`step` after the optimiser's.

    Attributes
    ----------
    balancer : BiasBalancer
        Counts and rule; ``balancer.rate`` may be set any time, ``balancer.mask`` before each padded batch.
    stats : RoutingStats
        Statistics of the same layers, ``stats.summary()`` as a table.
    layers : list of Layer
        Those that are steered, in the model's order.
    """

    def __init__(self, layers: list[Layer], balancer: BiasBalancer, stats: RoutingStats) -> None:
        self.layers, self.balancer, self.stats = layers, balancer, stats
        self._steering = [handle for layer in layers if (handle := layer.add_bias()) is not None]
        watched = [layer.watched for layer in layers]
        reader = partial(read, dict(zip(watched, layers, strict=True)))
        balancer.watch(watched, reader)
        stats.watch(watched, reader)
        # A step is too small for 16 bits: biases that are kept in them move in fp32 and are rounded.
        self._exact = [bias.float() for bias in self._biases()]

    def _biases(self) -> list[Tensor]:
        return [bias for layer in self.layers if (bias := layer.bias) is not None]

    def _keep_up(self) -> None:
        """Take over biases that were moved to another device, or loaded."""
        for number, (bias, exact) in enumerate(zip(self._biases(), self._exact, strict=True)):
            if exact.device != bias.device or not torch.equal(exact.to(bias.dtype), bias):
                self._exact[number] = bias.float()

    def _write(self) -> None:
        for bias, exact in zip(self._biases(), self._exact, strict=True):
            bias.copy_(exact)

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by what was chosen since the last step; call it on every rank."""
        self._keep_up()
        self.balancer.step(self._exact)
        self._write()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the biases, (num_layers, num_experts), and of what the balancer has counted.

        A bias that the model did not have is saved nowhere else.
        """
        self._keep_up()
        return {"biases": torch.stack([exact.cpu() for exact in self._exact]), **self.balancer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned.

        Parameters
        ----------
        state_dict : dict of str to Tensor
            Of a balancer of the same model.

        Raises
        ------
        ValueError
            If keys or sizes differ; nothing is then changed.
        """
        counts = dict(state_dict)
        biases, expected = counts.pop("biases", None), [len(self._exact), self.balancer.num_experts]
        if biases is None or list(biases.shape) != expected:
            got = "none" if biases is None else list(biases.shape)
            raise ValueError(f"ModelBalancer: state_dict must have biases of shape {expected}, got {got}")
        self.balancer.load_state_dict(counts)
        self._exact = [new.to(bias.device, torch.float32) for new, bias in zip(biases, self._biases(), strict=True)]
        self._write()

    def detach(self) -> None:
        """Remove the hooks, and with them the biases that the model did not have; its own stay as they are."""
        self.balancer.detach()
        self.stats.detach()
        for handle in self._steering:
            handle.remove()
        self._steering.clear()
        for layer in self.layers:
            layer.remove_bias()


def attach_stats(model: nn.Module) -> RoutingStats:
    """Gather routing statistics of any MoE model of transformers.

    Parameters
    ----------
    model : Module
        On any experts implementation, swapped or not.

    Returns
    -------
    RoutingStats
        One layer per set of experts, in the model's order. What needs probabilities (entropy, margin, flips) is NaN
        where it could not be found out by running the router how its weights follow from its logits.

    Raises
    ------
    ValueError
        If the model has no MoE layer.
    """
    layers = _layers_of(model, "attach_stats")
    stats = RoutingStats([layer.num_experts for layer in layers])
    watched = [layer.watched for layer in layers]
    stats.watch(watched, partial(read, dict(zip(watched, layers, strict=True))))
    return stats


def attach_balancer(model: nn.Module, **options: Any) -> ModelBalancer:  # noqa: ANN401
    """Keep the experts of a transformers model evenly loaded by a bias on the selection, without a loss.

    transformers loads such a bias (``e_score_correction_bias`` in DeepSeek-V3 and most others) and adds it to the
    scores, but nothing moves it in training. Here the choices of each forward in training mode are counted, recomputed
    activations once, and :meth:`ModelBalancer.step` moves the bias: DeepSeek-V3's rule, or another of
    :class:`torch_moe.balancing.BiasBalancer`.

    A router without such a bias (Mixtral, Qwen-MoE, OLMoE, gpt-oss, Granite, Llama-4, DBRX, Jamba, JetMoE, Switch and
    others) gets one, zero at first: a buffer that moves with the model and is not saved with it. A hook then chooses
    again by score plus bias, and weighs the chosen by the family's own rule without it. A token whose choice the bias
    does not change keeps the router's result bit for bit. The scores are probabilities (softmax), also in families that
    take the softmax over the chosen only, or sigmoids. The rule is found by running a copy of the router, so settings
    of the router are to be changed before this call. Two families choose by more than a rule, and their routers are
    replaced by the same with a bias: in PhiMoE it is added to the logits, by which candidates are told and drawn; in
    NLLB-MoE, whose choices count after those beyond capacity are dropped, to the probabilities.

    NOTE: a model trained with such a bias routes by it. Save :meth:`ModelBalancer.state_dict` beside the model, and
    attach and load it wherever the model is used, or anneal the bias away before the end.

    Parameters
    ----------
    model : Module
        Any MoE model of transformers with routed FFNs. Doge, whose 16384 experts are found by product keys, and
        ViTPose, whose experts are chosen by the data set's number, have no router to steer.
    **options
        Of :class:`torch_moe.balancing.BiasBalancer`: ``method`` (``"quantile"`` needs logits, so a rule in each layer),
        ``rate``, ``center``, ``process_group``.

    Returns
    -------
    ModelBalancer
        With statistics of the same layers.

    Raises
    ------
    ValueError
        If a router neither has a selection bias nor can be given one (routers beside others that have one are left
        alone: DeepSeek-V4's first layers choose by a table), if the model has a balancer already, or an option is
        impossible.

    References
    ----------
    arXiv 2408.15664.
    """
    layers = _layers_of(model, "attach_balancer")
    attached = [layer.name for layer in layers if hasattr(layer.watched, OWN_BIAS)]
    if attached:
        raise ValueError(f"attach_balancer: {attached[0]} has a balancer already, detach() that one first")
    unknown = [layer for layer in layers if not layer.can_obey]
    if unknown and all(layer.bias is None for layer in layers):
        raise ValueError(
            f"attach_balancer: the router of {unknown[0].name} in {type(model).__name__} has no selection bias, and "
            f"none can be added: {unknown[0].rule} (balance it by a loss on its router_logits, torch_moe.losses, and "
            "watch it with attach_stats)"
        )
    layers = [layer for layer in layers if layer not in unknown]
    if options.get("method") == "quantile":
        _check_quantile(layers)
    sizes = sorted({layer.num_experts for layer in layers})
    if len(sizes) > 1:
        raise ValueError(f"attach_balancer: all layers must have as many experts, got {sizes}")
    balancer = BiasBalancer(sizes[0], len(layers), **options)
    return ModelBalancer(layers, balancer, RoutingStats(sizes[0], len(layers)))


def _layers_of(model: nn.Module, caller: str) -> list[Layer]:
    layers = list(find_layers(model))
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no MoE layer that is known here")
    return layers


def _check_quantile(layers: list[Layer]) -> None:
    for layer in layers:
        if isinstance(layer.rule, str):
            raise ValueError(f"attach_balancer: method 'quantile' needs logits, which {layer.name} hides: {layer.rule}")
        if layer.rule.options.get("num_groups", 1) > 1:
            raise ValueError(f"attach_balancer: method 'quantile' needs routers without groups, {layer.name} has some")
