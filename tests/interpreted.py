"""The Triton kernels against the torch formulas, in Triton's interpreter: run as `TRITON_INTERPRET=1 python ...`.

A process of its own, since the interpreter is chosen when the kernels are defined. Prints one JSON line: the largest
relative difference of each kernel's results.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from fastdora import kernels


def both(function, *args):
    """What `function` returns on the torch path and in the interpreter, on copies of the same inputs."""
    results = []
    for on in (False, True):
        kernels.fused = lambda x, on=on: on
        copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        found = function(*copies)
        results.append([*(found if isinstance(found, tuple) else (found,)), *copies])
    return results


def difference(function, *args) -> float:
    """The largest difference of all results and of inputs changed in place, against the largest value of each."""
    worst = 0.0
    for expected, found in zip(*both(function, *args), strict=True):
        if isinstance(expected, torch.Tensor):
            assert expected.shape == found.shape and expected.dtype == found.dtype, (expected.dtype, found.dtype)
            scale = expected.float().abs().max().clamp_min(1e-6)
            worst = max(worst, ((expected.float() - found.float()).abs().max() / scale).item())
    return worst


def main() -> None:
    torch.manual_seed(0)
    rows = {}
    for tokens, inputs, outputs, rank in ((70, 130, 96, 3), (33, 64, 40, 20), (1, 16, 8, 1)):
        x, dy = torch.randn(tokens, inputs).half(), torch.randn(tokens, outputs).half()
        a, b = torch.randn(rank, inputs).half(), torch.randn(outputs, rank).half()
        t, base = torch.randn(tokens, rank).half(), torch.randn(tokens, outputs).half()
        gain, bias = torch.rand(outputs) + 0.5, torch.randn(outputs)
        seed = (2**30 + 1, 12345)
        shape = f"{tokens}x{inputs}x{outputs} r{rank}"
        rows[f"low_rank {shape}"] = difference(kernels.low_rank, x, a, 0.5, 0.0, seed)
        rows[f"low_rank dropout {shape}"] = difference(kernels.low_rank, x, a, 1.0, 0.3, seed)
        rows[f"low_rank transposed {shape}"] = difference(
            lambda y, f: kernels.low_rank(y, f.t(), 2.0, 0.0, (1, 0)), dy, b
        )
        rows[f"low_rank_backward {shape}"] = difference(kernels.low_rank_backward, t, x, a, x.clone(), 0.3, seed)
        rows[f"low_rank_backward no dx {shape}"] = difference(kernels.low_rank_backward, t, x, a, None, 0.0, seed)
        rows[f"combine {shape}"] = difference(lambda *c: kernels.combine(*c).clone(), base, t, b, 0.5, gain, bias)
        norm = torch.rand(outputs) + 1
        rows[f"combine_backward {shape}"] = difference(kernels.combine_backward, dy, base, t, b, 0.5, gain, norm)
        rows[f"combine_backward lora {shape}"] = difference(kernels.combine_backward, dy, None, t, b, 0.5, None, None)
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scales = torch.rand(outputs) + 0.1
        rows[f"widen_int8 {shape}"] = difference(kernels.widen_int8, weight, scales, torch.float16)
        a32, b32 = torch.randn(rank, inputs), torch.randn(outputs, rank)
        kernels.fused = lambda _: True
        for name, w, factor in (("int8", weight, scales), ("bf16", torch.randn(outputs, inputs).bfloat16(), None)):
            exact = w.double() if factor is None else w.double() * (factor.double() / 127).unsqueeze(1)
            square = (exact * exact).sum(1)
            found, gained = kernels.row_norms(w, factor, a32, b32, 0.5, square.float(), gain)
            exact = (exact + 0.5 * b32.double() @ a32.double()).norm(dim=1)
            worst = ((found.double() - exact) / exact).abs().max(), ((gained * exact - gain) / gain).abs().max()
            rows[f"row_norms {name} {shape}"] = max(worst).item()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
