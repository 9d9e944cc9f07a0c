"""The named cases of bench_layer.py: a layer shape and a number of tokens each, what others reach and what we want.

A target is in percent of the machine's floor (torch_moe/cli/floor.py). `peer` is the best that existed before, measured
side by side on a 2-core AVX-512 machine without AMX: the CPU kernels of vLLM, ggml, onnxruntime, or Hugging Face.
"""

from dataclasses import dataclass, field, replace

from torch_moe.cli.results import FORWARD, FORWARD_BACKWARD
from torch_moe.cli.shapes import SHAPES, LayerShape

PASSES = {"forward": FORWARD, "backward": FORWARD_BACKWARD}
# At so few tokens a call is all about reading weights, and a model's other layers have emptied the caches before it.
FLUSHED_TOKENS = 16

WIDE = LayerShape(
    name="wide",
    source="few wide experts without a gate",
    hidden_size=4096,
    intermediate_size=16384,
    num_experts=8,
    top_k=2,
    activation="relu",
)


@dataclass(frozen=True)
class Target:
    """Percent of the floor."""

    peer: float
    must: float
    aim: float


@dataclass(frozen=True)
class Case:
    """One shape with its number of tokens; `targets` by (dtype, pass)."""

    name: str
    shape: LayerShape
    targets: dict[tuple[str, str], Target] = field(default_factory=dict)

    @property
    def flushed(self) -> bool:
        return self.shape.num_tokens <= FLUSHED_TOKENS

    def dtypes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(dtype for dtype, _ in self.targets))

    def passes(self, dtype: str) -> tuple[str, ...]:
        """The passes with a target in this dtype; those of any dtype where it has none."""
        own = [name for known, name in self.targets if known == dtype]
        return tuple(dict.fromkeys(own or [name for _, name in self.targets]))


def _case(prefix: str, shape: LayerShape, num_tokens: int, **rows: tuple[float, float, float]) -> Case:
    """Rows are dtype_pass=(peer, must, aim)."""
    targets = {(dtype, name): Target(*row) for key, row in rows.items() for dtype, name in [key.split("_")]}
    return Case(f"{prefix}-t{num_tokens}", replace(shape, num_tokens=num_tokens), targets)


SEED, QWEN3, SWITCH = SHAPES["seed"], SHAPES["qwen3-30b-a3b"], SHAPES["switch"]
CASES = {
    case.name: case
    for case in (
        _case(
            "seed",
            SEED,
            512,
            fp32_forward=(54, 75, 85),
            bf16_forward=(42, 70, 80),
            fp16_forward=(42, 70, 80),
            fp32_backward=(42, 70, 80),
            bf16_backward=(17, 55, 70),
        ),
        _case("seed", SEED, 16, fp32_forward=(72, 85, 93), bf16_forward=(58, 78, 93)),
        _case("seed", SEED, 1, fp32_forward=(74, 85, 95), bf16_forward=(62, 80, 95)),
        _case("qwen3", QWEN3, 256, fp32_forward=(46, 62, 80), bf16_forward=(35, 52, 75)),
        _case("qwen3", QWEN3, 16, fp32_forward=(81, 85, 93), bf16_forward=(74, 78, 93)),
        _case("qwen3", QWEN3, 1, fp32_forward=(75, 85, 95), bf16_forward=(68, 80, 95)),
        _case(
            "switch",
            SWITCH,
            512,
            fp32_forward=(35, 60, 85),
            bf16_forward=(20, 45, 75),
            fp32_backward=(19, 50, 70),
            bf16_backward=(12, 38, 70),
        ),
        _case("switch", SWITCH, 16, fp32_forward=(75, 85, 93), bf16_forward=(58, 78, 93)),
        _case("switch", SWITCH, 1, fp32_forward=(62, 85, 95), bf16_forward=(44, 80, 95)),
        _case("wide", WIDE, 64, fp32_forward=(28, 65, 85), bf16_forward=(13, 55, 85)),
        _case("wide", WIDE, 16, fp32_forward=(49, 75, 90), bf16_forward=(30, 65, 90)),
    )
}
