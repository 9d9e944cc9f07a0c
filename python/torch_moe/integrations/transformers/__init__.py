"""torch-moe as the engine of Hugging Face transformers models.

::

    from torch_moe.integrations import transformers as moe_engine

    moe_engine.enable()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="torch_moe")
    print(moe_engine.explain(model))  # which modules run on torch-moe, and how

``enable`` serves every model whose experts class carries transformers' ``use_experts_implementation``; ``swap`` the
older classes that do not. Parameters stay where and as they are: saving, loading, adapters and switching back work.
Tested with transformers 5.18; without transformers this package imports, and ``enable`` says what is missing.
"""

from torch_moe.integrations.transformers.balancer import ModelBalancer, attach_balancer, attach_stats
from torch_moe.integrations.transformers.forward import experts_forward
from torch_moe.integrations.transformers.fp8 import fp8_experts_forward
from torch_moe.integrations.transformers.registry import NAME, disable, enable, is_enabled
from torch_moe.integrations.transformers.report import explain, prepare
from torch_moe.integrations.transformers.swap import swap, unswap
from torch_moe.integrations.transformers.weights import convert_checkpoint, stack_experts, unstack_experts

__all__ = [
    "NAME",
    "ModelBalancer",
    "attach_balancer",
    "attach_stats",
    "convert_checkpoint",
    "disable",
    "enable",
    "experts_forward",
    "explain",
    "fp8_experts_forward",
    "is_enabled",
    "prepare",
    "stack_experts",
    "swap",
    "unstack_experts",
    "unswap",
]
