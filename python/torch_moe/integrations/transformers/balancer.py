"""Routing statistics and bias updates for transformers models, which has neither."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_moe.balancing import BiasBalancer
from torch_moe.integrations.transformers.gate import Host
from torch_moe.integrations.transformers.report import is_decorated
from torch_moe.integrations.transformers.swap import PREFIX
from torch_moe.metrics import RoutingStats
from torch_moe.observe import Observation

# What published models call a bias that only the selection sees.
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


class Layer(NamedTuple):
    """One MoE layer of a model: what to watch, and where its bias is, if it has one."""

    name: str
    watched: nn.Module
    num_experts: int
    bias_owner: nn.Module | None
    bias_name: str

    @property
    def bias(self) -> Tensor | None:
        """The selection bias as it is now, of shape (num_experts,): moving a model replaces its tensors."""
        return None if self.bias_owner is None else getattr(self.bias_owner, self.bias_name).detach().view(-1)


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
        # A step is too small for 16 bits: biases that are kept in them move in fp32 and are rounded.
        self._exact = [bias.float() for bias in self._biases()]

    def _biases(self) -> list[Tensor]:
        return [bias for layer in self.layers if (bias := layer.bias) is not None]

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by what was chosen since the last step; call it on every rank."""
        biases = self._biases()
        for number, (bias, exact) in enumerate(zip(biases, self._exact, strict=True)):
            if exact.device != bias.device or not torch.equal(exact.to(bias.dtype), bias):  # moved, or loaded
                self._exact[number] = bias.float()
        self.balancer.step(self._exact)
        for bias, exact in zip(biases, self._exact, strict=True):
            bias.copy_(exact)

    def detach(self) -> None:
        """Remove the hooks; the biases stay as they are."""
        self.balancer.detach()
        self.stats.detach()


def attach_stats(model: nn.Module) -> RoutingStats:
    """Gather routing statistics of any MoE model of transformers.

    Parameters
    ----------
    model : Module
        On any experts implementation, swapped or not.

    Returns
    -------
    RoutingStats
        One layer per set of experts, in the model's order. transformers hands over the chosen experts and their
        weights, not the probabilities: what needs these (entropy, margin, flips) is NaN.

    Raises
    ------
    ValueError
        If the model has no MoE layer.
    """
    layers = list(find_layers(model))
    if not layers:
        raise ValueError(f"attach_stats: {type(model).__name__} has no MoE layer that is known here")
    stats = RoutingStats([layer.num_experts for layer in layers])
    stats.watch([layer.watched for layer in layers], _read)
    return stats


def attach_balancer(model: nn.Module, **options: Any) -> ModelBalancer:  # noqa: ANN401
    """Keep the experts of a transformers model evenly loaded by its selection bias, without a loss.

    transformers loads the bias (``e_score_correction_bias`` in DeepSeek-V3 and most others) and adds it to the scores,
    but nothing moves it in training. Here the choices of each forward in training mode are counted, recomputed
    activations once, and :meth:`ModelBalancer.step` moves the bias: DeepSeek-V3's rule, or another of
    :class:`torch_moe.balancing.BiasBalancer`.

    Parameters
    ----------
    model : Module
        A model whose routers have a selection bias.
    **options
        Of :class:`torch_moe.balancing.BiasBalancer`: ``method`` (not ``"quantile"``, which needs the logits), ``rate``,
        ``center``, ``process_group``.

    Returns
    -------
    ModelBalancer
        With statistics of the same layers.

    Raises
    ------
    ValueError
        If no router of the model has a selection bias, or an option is impossible.

    References
    ----------
    arXiv 2408.15664.
    """
    layers = [layer for layer in find_layers(model) if layer.bias is not None]
    if not layers:
        raise ValueError(
            f"attach_balancer: no router of {type(model).__name__} has a selection bias ({', '.join(BIAS_NAMES)}); "
            "balance it by a loss on its router_logits (torch_moe.losses), and watch it with attach_stats"
        )
    if options.get("method") == "quantile":
        raise ValueError("attach_balancer: method 'quantile' needs logits, which transformers does not hand over")
    sizes = sorted({layer.num_experts for layer in layers})
    if len(sizes) > 1:
        raise ValueError(f"attach_balancer: all layers must have as many experts, got {sizes}")
    watched = [layer.watched for layer in layers]
    balancer = BiasBalancer(sizes[0], len(layers), **options)
    balancer.watch(watched, _read)
    stats = RoutingStats(sizes[0], len(layers))
    stats.watch(watched, _read)
    return ModelBalancer(layers, balancer, stats)


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """Yield the MoE layers of a model: every module that is called with ids and weights, or that chooses them."""
    for name, module in model.named_modules():
        kind, down_proj = _kind(module), getattr(module, "down_proj", None)
        if kind in _READERS or kind == "DbrxExperts":
            num_experts = int(getattr(module, "num_experts"))  # noqa: B009 - or mypy takes it for a module
        elif isinstance(down_proj, Tensor) and (kind in _CALLED_WITH_IDS or is_decorated(module)):
            num_experts = down_proj.shape[0]
        else:
            continue
        owner, bias_name = _bias_of(model.get_submodule(name.rpartition(".")[0]))
        bias = None if owner is None else getattr(owner, bias_name)
        yield Layer(name, module, num_experts if bias is None else bias.numel(), owner, bias_name)


def _bias_of(block: nn.Module) -> tuple[nn.Module | None, str]:
    """Return which module of a block has the selection bias, and its name: a router or the block itself."""
    for module in block.modules():
        for name in BIAS_NAMES:
            if isinstance(getattr(module, name, None), Tensor):
                return module, name
    return None, ""


def _read(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Observation:  # noqa: ANN401
    """Make an observation of experts, from the ids and weights they are called with, or of a router listed below."""
    reader = _READERS.get(_kind(module))
    return Observation(inputs[1], inputs[2]) if reader is None else reader(module, output)


def _kind(module: nn.Module) -> str:
    """Return the name of the class, before a swap."""
    return type(module).__name__.removeprefix(PREFIX)


def _llama4(router: Host, output: tuple[Tensor, Tensor]) -> Observation:
    scores, logits = output
    ids = logits.topk(router.top_k, dim=1).indices
    return Observation(ids, scores.gather(1, ids), logits)


def _jetmoe(router: Host, output: tuple[Any, ...]) -> Observation:
    logits, ids = output[4].topk(router.top_k, dim=1)
    return Observation(ids, logits.softmax(dim=1), output[4])


def _mask_of_ids(top_k: int, router: Host, output: tuple[Tensor, Tensor, Tensor]) -> Observation:
    """Read a router that returns a dense (tokens, experts) mask or weights, zero where not chosen."""
    dense = output[0 if top_k == 1 else 1].flatten(0, -2)
    weights, ids = dense.topk(top_k, dim=-1)
    return Observation(ids.masked_fill(weights == 0, -1), weights, output[2].flatten(0, -2))


_CALLED_WITH_IDS = ("LongcatFlashExperts", "Step3p7Experts")
# Classes whose experts are not called with ids: their routers are read instead.
_READERS: dict[str, Callable[[Host, Any], Observation]] = {
    "Llama4Router": _llama4,
    "JetMoeTopKGating": _jetmoe,
    "SwitchTransformersTop1Router": partial(_mask_of_ids, 1),
    "NllbMoeTop2Router": partial(_mask_of_ids, 2),
}
