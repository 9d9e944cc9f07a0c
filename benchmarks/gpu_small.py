"""Every operator once, forward and backward, on small shapes: what compute-sanitizer watches.

compute-sanitizer --tool racecheck python benchmarks/gpu_small.py
"""

import argparse

import torch

import torch_moe
from torch_moe.testing import SHAPES, Shape

# Sizes that take the aligned paths of each kernel, and primes that take the others.
ALIGNED = Shape(num_tokens=96, hidden_size=128, intermediate_size=128, num_experts=4, top_k=2)


def main() -> None:
    """Run each shape and dtype through the layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    for shape in (ALIGNED, SHAPES["unaligned"], SHAPES["empty_expert"], SHAPES["single_token"]):
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
            layer = torch_moe.MoE(*sizes, bias=dtype == torch.float32, device=device, dtype=dtype)
            x = torch.randn(shape.num_tokens, shape.hidden_size, device=device, dtype=dtype, requires_grad=True)
            layer(x).float().square().sum().backward()
            for tensor in (x, *layer.parameters()):
                if tensor.grad is None or not tensor.grad.isfinite().all():
                    raise SystemExit(f"{shape}, {dtype}: a gradient is missing or not finite")
    print("all finite")


if __name__ == "__main__":
    main()
