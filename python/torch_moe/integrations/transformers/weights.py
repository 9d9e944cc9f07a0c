"""Checkpoints with a tensor per expert into stacked ones and back, bit for bit, without building a model.

transformers has the rules of all families in tables; they are used where it is installed. The two commonest forms are
known here, too: ``experts.N.{gate,up,down}_proj.weight`` and Mixtral's ``experts.N.{w1,w3,w2}.weight``.
Both become ``experts.gate_up_proj`` (num_experts, 2 * intermediate_size, hidden_size), gate rows first, and
``experts.down_proj`` (num_experts, hidden_size, intermediate_size): also the names and layout of
:class:`torch_moe.Experts`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

from torch_moe.integrations.transformers.gate import Host
from torch_moe.integrations.transformers.registry import transformers_with

# Gate, up and down projection of an expert, in the two forms.
FORMS = {"proj": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
_EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")
# transformers 5 keeps the block of Mixtral and its kin under another name than their checkpoints.
_RENAMED = (".block_sparse_moe.", ".mlp.")


def convert_checkpoint(state_dict: Mapping[str, Tensor], config: Host, *, reverse: bool = False) -> dict[str, Tensor]:
    """Turn a checkpoint's tensors into those of the transformers model, by transformers' own tables.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        All tensors of a checkpoint, as its files have them; the model's for ``reverse``.
    config : PreTrainedConfig
        Of the model: its ``model_type`` names the rules.
    reverse : bool, default=False
        Give back the checkpoint's form instead.

    Returns
    -------
    dict of str to Tensor
        The same numbers under the other form's names.

    Raises
    ------
    ImportError
        If transformers is absent or has no such tables: see :func:`stack_experts`.
    ValueError
        If an expert's tensor is left over because an expert is missing.
    """
    with transformers_with("tables of its checkpoints' forms"):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if not reverse:
        _check_complete(state_dict)
    rules = get_checkpoint_conversion_mapping(config.model_type) or []
    if reverse:
        rules = [rule.reverse_transform() for rule in reversed(rules)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    pending: dict[str, Host] = {}
    for key in sorted(state_dict, key=dot_natural_key):  # expert 10 after expert 9
        target, pattern = rename_source_key(key, renamings, converters, reverse=reverse)
        if target not in pending:
            pending[target] = WeightRenaming(key, target) if pattern is None else deepcopy(by_pattern[pattern])
        pending[target].add_tensor(target, key, key if pattern is None else pattern, state_dict[key])
    converted = {}
    for target, rule in pending.items():
        for name, tensor in rule.convert(target, model=None, config=config).items():
            converted[name] = tensor[0] if isinstance(tensor, list) else tensor
    return converted


def stack_experts(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack per-expert tensors of the two common forms; needs no transformers.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of a checkpoint; tensors of other names are passed on.

    Returns
    -------
    dict of str to Tensor
        With ``experts.gate_up_proj`` and ``experts.down_proj`` per layer.

    Raises
    ------
    ValueError
        If an expert or one of its projections is missing, or there are others.
    """
    _check_complete(state_dict)
    found: dict[str, dict[tuple[int, str], Tensor]] = defaultdict(dict)
    stacked = {}
    for key, tensor in state_dict.items():
        match = _EXPERT.fullmatch(key)
        if match is None:
            stacked[key.replace(*_RENAMED)] = tensor
        else:
            found[match["experts"]][int(match["number"]), match["projection"]] = tensor
    for experts, tensors in found.items():
        projections = {projection for _, projection in tensors}
        form = next((form for form in FORMS.values() if set(form) == projections), None)
        if form is None:
            raise ValueError(
                f"{experts}: projections must be one of {tuple(FORMS.values())}, got {sorted(projections)}"
            )
        gate, up, down = (torch.stack([tensors[n, name] for n in range(len(tensors) // 3)]) for name in form)
        prefix = experts.replace(*_RENAMED)
        stacked[f"{prefix}.gate_up_proj"], stacked[f"{prefix}.down_proj"] = torch.cat([gate, up], dim=1), down
    return stacked


def unstack_experts(state_dict: Mapping[str, Tensor], form: str = "proj") -> dict[str, Tensor]:
    """Undo :func:`stack_experts`.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        With stacked experts.
    form : {"proj", "mixtral"}, default="proj"
        How a checkpoint of this family names an expert's projections; ``"mixtral"`` also renames the block.

    Returns
    -------
    dict of str to Tensor
        With a tensor per expert and projection.

    Raises
    ------
    ValueError
        If the form is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"unstack_experts: form must be in {tuple(FORMS)}, got {form!r}")
    unstacked = {}
    for key, tensor in state_dict.items():
        name = key.replace(*_RENAMED[::-1]) if form == "mixtral" and _is_block(key) else key
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith("experts") or last not in ("gate_up_proj", "down_proj"):
            unstacked[name] = tensor
            continue
        parts = tensor.chunk(2, dim=1) if last == "gate_up_proj" else (tensor,)
        names = FORMS[form][:2] if last == "gate_up_proj" else FORMS[form][2:]
        for projection, part in zip(names, parts, strict=True):
            for number, expert in enumerate(part):
                unstacked[f"{prefix}.{number}.{projection}.weight"] = expert.contiguous()
    return unstacked


def _is_block(key: str) -> bool:
    return ".mlp.experts." in key or ".mlp.gate." in key


def _check_complete(state_dict: Mapping[str, Tensor]) -> None:
    """Raise unless each layer has all projections of experts 0, 1, .. without a gap."""
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for key in state_dict:
        match = _EXPERT.fullmatch(key)
        if match is not None:
            numbers[match["experts"], match["projection"]].add(int(match["number"]))
    largest: dict[str, int] = defaultdict(int)
    for (experts, _), present in numbers.items():
        largest[experts] = max(largest[experts], max(present) + 1)
    for (experts, projection), present in numbers.items():
        missing = sorted(set(range(largest[experts])) - present)
        if missing:
            raise ValueError(f"{experts}: {projection} of experts {missing} is missing (are all files read?)")
