"""The Triton kernels against the torch formulas, and Liger's loss with ours, in Triton's interpreter.

A process of its own, since the interpreter is chosen when the kernels are defined. Prints one JSON line: the largest
relative difference of each kernel's results.
"""

import itertools
import json
import os

# bitsandbytes would compile its own formula of 4 bits, which is the reference, for every shape.
os.environ |= {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1"}

import bitsandbytes as bnb
import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastdora import attention, dora, kernels, packing, prefixes, triton_kernels


def both(function, *args):
    """What `function` returns on the torch path and in the interpreter, on copies of the same inputs."""
    results = []
    for on in (False, True):
        kernels.use_triton = lambda x, on=on: on
        copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        actual = function(*copies)
        results.append([*(actual if isinstance(actual, tuple) else (actual,)), *copies])
    return results


def difference(function, *args) -> float:
    """The largest difference of all results and of inputs changed in place, against the largest value of each."""
    worst = 0.0
    for expected, actual in zip(*both(function, *args), strict=True):
        if isinstance(expected, torch.Tensor):
            assert expected.shape == actual.shape and expected.dtype == actual.dtype, (expected.dtype, actual.dtype)
            scale = expected.float().abs().max().clamp_min(1e-6)
            worst = max(worst, ((expected.float() - actual.float()).abs().max() / scale).item())
    return worst


def main() -> None:
    # Several blocks of every sum, the last one masked: as they are launched, sizes as small as these are one block.
    small = {"low_rank": {"BLOCK_K": 64}, "low_rank_backward": {"BLOCK_T": 16, "SPLITS": 2}}
    for kernel, sizes in (small | {"epilogue_backward": small["low_rank_backward"]}).items():
        for tiles in triton_kernels.TILES[kernel].values():
            tiles |= sizes
    torch.manual_seed(0)
    rows = {}
    for tokens, inputs, outputs, rank in ((70, 130, 96, 3), (33, 64, 40, 20), (1, 16, 8, 1)):
        x, dy = torch.randn(tokens, inputs).half(), torch.randn(tokens, outputs).half()
        a, b = torch.randn(rank, inputs).half(), torch.randn(outputs, rank).half()
        t, base = torch.randn(tokens, rank).half(), torch.randn(tokens, outputs).half()
        mag_scale, bias = torch.rand(outputs) + 0.5, torch.randn(outputs)
        seed = (2**30 + 1, 12345)
        shape = f"{tokens}x{inputs}x{outputs} r{rank}"
        rows[f"low_rank {shape}"] = difference(kernels.low_rank, x, a, 0.5, 0.0, seed)
        rows[f"low_rank dropout {shape}"] = difference(kernels.low_rank, x, a, 1.0, 0.3, seed)
        kernels.use_triton = lambda _: True
        low = [kernels.low_rank(x, a, 1.0, 0.3, each) for each in (seed, torch.tensor(seed))]
        into = [x.clone(), x.clone()]
        high = [
            kernels.low_rank_backward(t, x, a, dx, 0.3, each)
            for dx, each in zip(into, (seed, torch.tensor(seed)), strict=True)
        ]
        rows[f"seeds in memory {shape}"] = max((a - b).abs().max().item() for a, b in (low, high, into))
        rows[f"low_rank transposed {shape}"] = difference(
            lambda y, f: kernels.low_rank(y, f.t(), 2.0, 0.0, (1, 0)), dy, b
        )
        rows[f"low_rank_backward {shape}"] = difference(kernels.low_rank_backward, t, x, a, x.clone(), 0.3, seed)
        rows[f"low_rank_backward no dx {shape}"] = difference(kernels.low_rank_backward, t, x, a, None, 0.0, seed)
        rows[f"epilogue {shape}"] = difference(
            lambda *c: kernels.epilogue(*c).clone(), base, t, b, 0.5, mag_scale, bias
        )
        norm = torch.rand(outputs) + 1
        rows[f"epilogue_backward {shape}"] = difference(kernels.epilogue_backward, dy, base, t, b, 0.5, mag_scale, norm)
        rows[f"epilogue_backward lora {shape}"] = difference(kernels.epilogue_backward, dy, None, t, b, 0.5, None, None)
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scales = torch.rand(outputs) + 0.1
        rows[f"dequantize_int8 {shape}"] = difference(
            kernels.dequantize_int8, weight, scales, x.new_empty(weight.shape)
        )
        for name, kind, nested in (("nf4", "nf4", True), ("fp4", "fp4", False)):
            quantised, state = bnb.functional.quantize_4bit(
                torch.randn(outputs + 1, 192), quant_type=kind, compress_statistics=nested
            )
            expected = bnb.functional.dequantize_4bit(quantised, state)
            actual = kernels.dequantize_4bit(quantised, state, torch.empty(state.shape))
            rows[f"dequantize_4bit {name} {shape}"] = ((actual - expected).abs().max() / expected.abs().max()).item()
        a32, b32 = torch.randn(rank, inputs), torch.randn(outputs, rank)
        kernels.use_triton = lambda _: True
        for name, make, factor in (("int8", weight, scales), ("fp16", torch.randn(outputs, inputs).half(), None)):
            layers, exact = [], []
            for count in (outputs, outputs // 2, 1):  # layers of several sizes in one launch
                w, f, up = (
                    make[:count].contiguous(),
                    None if factor is None else factor[:count].contiguous(),
                    b32[:count],
                )
                whole = w.double() if f is None else w.double() * (f.double() / 127).unsqueeze(1)
                s = 0.5 / count
                square = (whole * whole).sum(1).float()
                layers.append(kernels.NormInputs(w, f, a32, up, mag_scale[:count].contiguous(), s, square))
                exact.append((whole + s * up.double() @ a32.double()).norm(dim=1))
            for number, (actual, expected) in enumerate(zip(triton_kernels.row_norms(layers), exact, strict=True)):
                norm, scale = actual
                wrong = (
                    ((norm - expected) / expected).abs().max(),
                    (scale * expected - layers[number].m).abs().max(),
                )
                rows[f"row_norms {name} {number} {shape}"] = max(wrong).item()
    for more in (
        rows_without_direction,
        past_the_end_of_4_bits,
        what_is_not_contiguous,
        whole_layers,
        layers_of_one_input,
        answers_with_liger,
        shared_prefixes,
    ):
        rows |= more()
    print(json.dumps(rows))


def shared_prefixes() -> dict[str, float]:
    """Attention to a shared prefix joined to a suffix's own; what lies outside of the bounds is never read."""
    rows = {}
    for tokens, heads, width, first, last in ((9, 4, 16, 3, 8), (5, 3, 40, 0, 5), (4, 2, 8, 2, 2)):
        out, part = torch.randn(2, tokens, heads, width).half()
        lse, part_lse = torch.randn(2, heads, tokens) * 9
        part[:first] = part[last:] = torch.nan
        part_lse[:, :first] = part_lse[:, last:] = torch.nan
        within = torch.tensor([first, (first + last) // 2, last], dtype=torch.int32)
        # What the kernels leave alone is NaN in both, so it is compared as zero.
        for name, function, args in (
            ("merge_attention", kernels.merge_attention, (out, lse, part, part_lse, within)),
            ("add_rows", kernels.add_rows, (out, part, within)),
        ):
            changed = [each[1 : 1 + len(args) // 2] for each in both(function, *args)]
            kept = [[tensor.nan_to_num() for tensor in each] for each in changed]
            rows[f"{name} {tokens}x{heads}x{width}"] = max(
                ((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(*kept, strict=True)
            )
    # Two prefixes of 3 and 2 tokens, with 9 and 1 suffixes of 2, and a lone row of 4.
    labels = [{"labels": [-100] * (size + 2)} for size in [3] * 9 + [2] * 2 + [2]]
    layout = prefixes.lay_out(labels, [0] * 9 + [1] * 2 + [-1], [3] * 9 + [2] * 2 + [0])
    segments = attention.Segments(**prefixes.tensors(layout, layout.edges[-1], copy=True))
    d_copied = torch.randn(2, len(segments.copied), 2, 20).half()
    args = *d_copied, segments.copies, segments.key_edges, layout.edges[-1]
    rows["sum_copies"] = difference(kernels.sum_copies, *args)
    return rows


def rows_without_direction() -> dict[str, float]:
    """A weight whose rows 0 and 1 are zero and cancelled by the adapter: mag_scale 0, norm 2^-10 of the base's."""
    kernels.use_triton = lambda _: True
    weight = torch.randn(32, 64).half()
    weight[0] = 0
    a, b, m = torch.zeros(1, 64), torch.zeros(32, 1), torch.ones(32)
    a[0], b[1] = weight[1].float(), -1.0
    square = (weight.float() ** 2).sum(1)
    ((norm, mag_scale),) = triton_kernels.row_norms([kernels.NormInputs(weight, None, a, b, m, 1.0, square)])
    expected = square.sqrt()
    expected[1] *= 2**-10
    wrong = (
        ((norm - expected)[1:] / expected[1:]).abs().max(),
        mag_scale[0].abs(),
        (mag_scale * norm - 1)[1:].abs().max(),
    )
    return {"row_norms without a direction": max(float(one) for one in wrong)}


def past_the_end_of_4_bits() -> dict[str, float]:
    """Two values a byte: of an odd number of values the last byte's second half lies past the weight."""
    kernels.use_triton = lambda _: True
    weight = torch.randn(33, 17)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    room = torch.full((weight.numel() + 1,), 7.5)
    actual = kernels.dequantize_4bit(packed.view(torch.uint8), state, room[:-1].view(33, 17))
    expected = bnb.functional.dequantize_4bit(packed, state).view(33, 17)
    return {"4 bits norms past the end": (actual - expected).abs().max().item() + abs(room[-1].item() - 7.5)}


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, and other strides."""
    return x.t().contiguous().t()


def what_is_not_contiguous() -> dict[str, float]:
    """Inputs, gradients, adapters and weights with strides of their own, through layers with and without an adapter."""
    kernels.use_triton = lambda x: x.dtype in kernels.TRITON_DTYPES
    rows = {}
    for bits in (16, 8):
        torch.manual_seed(3)
        outputs = []
        for change in (torch.Tensor.contiguous, strided):
            torch.manual_seed(4)
            net = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32, bias=False)).half()
            if bits == 8:
                for number, layer in enumerate(net):
                    int8 = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, False)
                    int8.load_state_dict(layer.state_dict())
                    net[number] = int8.to("cpu")
            net.is_loaded_in_8bit = bits == 8
            model = get_peft_model(net, LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=["0"]))
            adapter = model.base_model.model[0]
            for tensor in (
                adapter.lora_A["default"],
                adapter.lora_B["default"],
                adapter.base_layer,
                model.base_model.model[1],
            ):
                tensor.weight.data = change(tensor.weight.data)
            for fp8 in (False, True)[: 1 + (bits == 8)]:
                dora.accelerate(model, fp8)
                x, weights = change(torch.randn(20, 48).half()).requires_grad_(), change(torch.randn(20, 32).half())
                model.zero_grad()
                assert model(x[:0]).shape == (0, 32)
                model(x[:0]).sum().backward()
                assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
                y = model(x)
                model.zero_grad()
                (y * weights).sum().backward()
                outputs.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
                torch.manual_seed(5)
        half = len(outputs) // 2
        for fp8, (one, other) in enumerate(zip(outputs[:half], outputs[half:], strict=True)):
            apart = [
                ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(other, one, strict=True)
            ]
            rows[f"strides {bits} bits{' fp8' * fp8}"] = max(apart)
    return rows


def whole_layers() -> dict[str, float]:
    """Three DoRA layers with dropout through fastdora.accelerate: outputs and gradients on both paths, after a step."""
    actual = {}
    for on in (False, True):
        kernels.use_triton = lambda x, on=on: on and x.dtype in kernels.TRITON_DTYPES
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32), nn.Linear(32, 32)).half()
        config = LoraConfig(r=4, use_dora=True, lora_dropout=0.2, target_modules=["0", "1", "2"])
        model = get_peft_model(net, config)
        dora.accelerate(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.05)
        x = torch.randn(20, 48).half().requires_grad_()
        for _ in range(3):
            optimizer.zero_grad()
            y = model(x)
            y.float().square().mean().backward()
            optimizer.step()
        actual[on] = [y.detach(), x.grad, *(p.detach() for p in trained)]
    together = {module.cached_norm("default").norm.untyped_storage().data_ptr() for module in dora_layers(model)}
    assert on and len(together) == 1, "the norms of the three layers were not taken together"
    pairs = zip(*actual.values(), strict=True)
    return {"layers": max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)}


def layers_of_one_input() -> dict[str, float]:
    """q, k and v computed together, on both paths; e4m3 weights into columns of a wider matrix."""
    from test_dora import attention_adapter

    rows = {}
    methods = {"DoRA": {}, "LoRA": {"use_dora": False}, "dropout": {"lora_dropout": 0.3}}
    for bits, (name, how) in itertools.product((16, 8), methods.items()):
        model, actual = attention_adapter(bits, torch.float16, **how), []
        for on in (False, True):
            kernels.use_triton = lambda x, on=on: on and x.dtype in kernels.TRITON_DTYPES
            dora.accelerate(model)
            torch.manual_seed(5)
            x, weights = torch.randn(37, 64).half().requires_grad_(), torch.randn(37, 80).half()
            model.zero_grad()
            y = model(x)
            (y * weights).sum().backward()
            actual.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        pairs = zip(*actual, strict=True)
        wrong = [((a.float() - b.float()).norm() / a.float().norm()).item() for a, b in pairs]
        rows[f"together {bits} bits {name}"] = max(wrong)
    weight, wide = torch.randint(-127, 128, (20, 70), dtype=torch.int8), torch.zeros(70, 50).to(kernels.FP8)
    whole = kernels.int8_to_fp8(weight, torch.empty(20, 70, dtype=kernels.FP8)).float()
    kernels.int8_to_fp8(weight, wide[:, 5:25].t())
    wide = wide.float()
    rows["int8_to_fp8 columns"] = (wide[:, 5:25].t() - whole).abs().max().item() + wide[:, :5].sum().item()
    return rows


def answers_with_liger() -> dict[str, float]:
    """Liger's use_triton head and loss on answer positions only, against all positions: loss and gradients."""
    apply_liger_kernel_to_llama(
        rope=False, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=False, swiglu=False
    )
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(0, 97, (1, 20))
    labels = ids.clone()
    labels[:, :16] = -100
    actual = []
    for only in (False, True):
        model.zero_grad()
        hook = packing.read_label_positions(model, answers=only)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        hook.remove()
        actual.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    return {"answers with Liger": max((a - b).abs().max().item() for a, b in zip(*actual, strict=True))}


def dora_layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, dora.Fast)]


if __name__ == "__main__":
    main()
