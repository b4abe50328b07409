"""The Triton kernels and the attention on a real GPU: right against float64, and how long each takes against its bytes.

    python -m bench.gpu_check [--out FILE]

Exit code 1 when a result is off by more than its dtype explains. CI has no GPU and runs the same kernels in Triton's
interpreter (tests/interpreted.py).
"""

import argparse
import copy
import functools
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as axolotl does, before torch is imported

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from triton.testing import do_bench

from fastdora import attention, dora, dropout, graphs, kernels, packing, prefixes, quantized, triton_kernels
from fastdora.plugin import peft_int8
from finlora.core.machine import gpus
from finlora.core.paths import ROOT
from finlora.core.provenance import git_state, versions
from finlora.models import shared

T, K, N = 5120, 4096, 4096
SEED = (2**30 + 1, 4242)


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    """||result - expected|| / ||expected||."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


Row = dict[str, float]


def measured(bytes_moved: float, call, *expected: torch.Tensor) -> Row:
    """A kernel's largest relative error (with `expected`), its time, and its throughput over the bytes it must move."""
    row = {}
    if expected:
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        row["error"] = max(relative(r, e) for r, e in zip(results, expected, strict=True))
    ms = do_bench(call, warmup=5, rep=40, return_mode="median")
    return row | {"ms": round(ms, 4), "gb": bytes_moved / 1e9, "gb_s": round(bytes_moved / ms / 1e6)}


def low_rank_rows(rank: int) -> dict[str, Row]:
    """The kernels of the low-rank path and of the epilogue at the sentiment recipe's sizes, against float64."""
    torch.manual_seed(rank)
    make = dict(device="cuda", dtype=torch.bfloat16)
    x, dy, base = torch.randn(T, K, **make), torch.randn(T, N, **make), torch.randn(T, N, **make)
    a, b, t = torch.randn(rank, K, **make), torch.randn(N, rank, **make), torch.randn(T, rank, **make)
    mag_scale, norm = torch.rand(N, device="cuda") + 0.5, torch.rand(N, device="cuda") + 1
    X, DY, BASE, A, B, D = (y.double() for y in (x, dy, base, a, b, t))
    keep = dropout.keep_mask(SEED, (T, K), 0.05, x.device)
    dropped, z = X * keep / 0.95, BASE + 0.5 * D @ B.t()
    rows = {
        "low_rank": measured(x.nbytes, lambda: kernels.low_rank(x, a, 1.0, 0.0, SEED), X @ A.t()),
        "low_rank dropout": measured(x.nbytes, lambda: kernels.low_rank(x, a, 1.0, 0.05, SEED), dropped @ A.t()),
        "low_rank transposed": measured(x.nbytes, lambda: kernels.low_rank(dy, b.t(), 0.5, 0.0, SEED), 0.5 * DY @ B),
        "epilogue": measured(2 * x.nbytes, lambda: kernels.epilogue(base, t, b, 0.5, mag_scale, None), z * mag_scale),
        "epilogue_backward": measured(
            3 * x.nbytes,
            lambda: kernels.epilogue_backward(dy, base, t, b, 0.5, mag_scale, norm),
            DY * mag_scale,
            (DY * z).sum(0) / norm.double(),
            0.5 * (DY * mag_scale).t() @ D,
        ),
    }
    dx = dy.clone()
    da = kernels.low_rank_backward(t, x, a, dx, 0.05, SEED)  # once only: each call adds to dx
    error = max(relative(da, D.t() @ dropped), relative(dx, DY + (D @ A) * keep / 0.95))
    timed = measured(3 * x.nbytes, lambda: kernels.low_rank_backward(t, x, a, dx, 0.05, SEED))
    rows["low_rank_backward"] = {"error": error} | timed
    return {f"{name} r{rank}": row for name, row in rows.items()}


def weight_rows(rank: int) -> dict[str, Row]:
    """The kernels that read weights, at 4,096 x 4,096: dequantization, row norms and the casts to e4m3."""
    torch.manual_seed(rank)
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda")
    scales, mag_scale = torch.rand(N, device="cuda") + 0.1, torch.rand(N, device="cuda") + 0.5
    exact = weight.double() * (scales.double() / 127).unsqueeze(1)
    half = exact.bfloat16()
    packed, state = bnb.functional.quantize_4bit(half, quant_type="nf4", compress_statistics=True)
    out = torch.empty_like(half)
    rows = {
        "dequantize_int8": measured(N * K * 3, lambda: kernels.dequantize_int8(weight, scales, out), exact),
        "dequantize_4bit": measured(
            N * K * 2.5,
            lambda: kernels.dequantize_4bit(packed, state, out),
            bnb.functional.dequantize_4bit(packed, state),
        ),
    }
    if rank <= triton_kernels.LARGEST_RANK:
        a, b = torch.randn(rank, K, device="cuda") / 64, torch.randn(N, rank, device="cuda")
        for kind, own, whole, factors in (("int8", weight, exact, scales), ("bf16", half, half.double(), None)):
            norm = (whole + 0.5 * b.double() @ a.double()).norm(dim=1)
            layer = kernels.NormInputs(own, factors, a, b, mag_scale, 0.5, (whole * whole).sum(1).float())
            one, many = (
                functools.partial(triton_kernels.row_norms, [layer]),
                functools.partial(triton_kernels.row_norms, [layer] * 32),
            )
            rows[f"row_norms {kind}"] = measured(own.nbytes, lambda one=one: one()[0], norm, mag_scale / norm)
            rows[f"row_norms {kind} of 32 layers"] = measured(32 * own.nbytes, many)
    if quantized.has_fp8():
        x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
        q, s = kernels.quantize_rows(x, scales)
        scaled = x.double() * scales.double()
        worst = ((q.double() * s.double() - scaled).abs().amax(1) / scaled.abs().amax(1)).max().item()
        # e4m3 rounds by up to 1/28 of a row's largest value, far more than the 1e-2 that main() allows: scaled down.
        rows["quantize_rows"] = {"error": worst / 40} | measured(T * K * 3, lambda: kernels.quantize_rows(x))
        for transpose in (False, True):
            out = torch.empty(K, N, dtype=kernels.FP8, device="cuda").t() if transpose else half.to(kernels.FP8)
            cast = functools.partial(kernels.int8_to_fp8, weight, out)
            rows[f"int8_to_fp8 {transpose}"] = measured(N * K * 2, cast, weight.float().to(kernels.FP8))
    return {f"{name} r{rank}": row for name, row in rows.items()}


def matmul_rows() -> dict[str, dict[str, float]]:
    """TFLOP/s of the matmuls of one Llama-3.1-8B layer, in bf16 and in fp8."""
    rows = {}
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        x, w = (torch.randn(rows_, k, device="cuda", dtype=torch.bfloat16) for rows_ in (T, n))
        ms = do_bench(lambda: F.linear(x, w), warmup=10, rep=60, return_mode="median")  # noqa: B023
        rows[f"bf16 {T}x{k}x{n}"] = {"tflop_s": round(2 * T * n * k / ms / 1e9)}
        if torch.cuda.get_device_capability() >= (8, 9):
            (xq, xs), (wq, ws) = kernels.quantize_rows(x), kernels.quantize_rows(w)
            ws = ws.view(1, -1)
            call = lambda: torch._scaled_mm(xq, wq.t(), xs, ws, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731, B023
            error = relative(call(), x.double() @ w.double().t())
            ms = do_bench(call, warmup=10, rep=60, return_mode="median")
            rows[f"fp8 {T}x{k}x{n}"] = {"tflop_s": round(2 * T * n * k / ms / 1e9), "fp8_error": round(error, 4)}
    return rows


def attention_row() -> dict[str, float]:
    """Packed attention against one sample at a time in float64, values and gradients; 32 query and 8 key heads."""
    torch.manual_seed(1)
    sizes = [97, 1, 300, 64, 640, 2]
    positions = torch.cat([torch.arange(size) for size in sizes]).cuda()[None]
    q, k, v = (torch.randn(1, heads, sum(sizes), 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    errors = []
    inputs = [y.detach().requires_grad_() for y in (q, k, v)]
    exact = [y.detach().double().requires_grad_() for y in (q, k, v)]
    out, _ = attention.varlen_attention(None, *inputs, None, position_ids=positions)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    expected, _ = attention.varlen_attention(None, *exact, None, position_ids=positions)
    (expected * weights.double()).sum().backward()
    errors.append(relative(out, expected))
    errors += [relative(ours.grad, theirs.grad) for ours, theirs in zip(inputs, exact, strict=True)]
    return {"error": max(errors)}


def shared_attention_row(copy: bool) -> dict[str, float]:
    """As attention_row, in a pack of three prefixes with their suffixes, two lone rows and padding."""
    torch.manual_seed(2)
    sizes = {300: [5, 64, 1], 40: [9, 9], 2000: [130, 40], 0: [70, 7]}  # of the suffixes, by their prefix's length
    lengths = [length for length, suffixes in sizes.items() for _ in suffixes]
    rows = [{"labels": [-100] * (length + size)} for length, suffixes in sizes.items() for size in suffixes]
    layout = prefixes.lay_out(rows, [length or -1 for length in lengths], lengths)
    total = layout.edges[-1] + 33
    fields = prefixes.tensors(layout, total, copy)
    segments = attention.Segments(
        **{name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in fields.items()}
    )
    q, k, v = (torch.randn(total, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    weights = torch.randn_like(q)
    results = []
    for dtype, attend in ((torch.bfloat16, attention._on_gpu), (torch.float64, attention._one_by_one)):
        inputs = [y.detach().to(dtype).requires_grad_() for y in (q, k, v)]
        out = attend(*inputs, segments, 128**-0.5)
        results.append([out.detach(), *torch.autograd.grad((out * weights.to(dtype)).sum(), inputs)])
    return {"error": max(relative(actual, expected) for actual, expected in zip(*results, strict=True))}


def answers_row() -> dict[str, float]:
    """Logits of answers whose prompts share prefixes (finlora/models/shared.py), in bf16: against float64.

    Three prefixes with one to 21 prompts, and prompts without. again: the error of one prompt at a time.
    """
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).cuda().bfloat16().eval()
    exact = copy.deepcopy(model).double()
    ids = torch.randint(4000, (50_000,)).tolist()
    owns = {1500: [50] * 21, 700: [1, 3, 200, 17], 90: [9], 0: [33, 4, 1]}
    prompts, prefixes, place = [], [], 5000
    for start, (prefix, sizes) in enumerate(owns.items()):
        for own in sizes:
            prompts.append(ids[1500 * start :][:prefix] + ids[place : place + own])
            prefixes.append(prefix)
            place += own
    logits: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: logits.append(out[0]))
    written = shared.answer(model, prompts, prefixes, 6, lambda ids: False)
    hook.remove()
    order = sorted(
        range(len(prompts)), key=lambda index: (not prefixes[index], prompts[index][: prefixes[index]], index)
    )
    answered = torch.stack(logits[1:], 1)  # without the pass over prefixes: (prompts, steps, vocabulary)
    errors = []
    with torch.no_grad():
        for row, index in enumerate(order):
            tokens = torch.tensor([prompts[index] + written[index][:-1]], device="cuda")
            expected, alone = (one(tokens, use_cache=False, logits_to_keep=6).logits[0] for one in (exact, model))
            errors.append((relative(answered[row], expected), relative(alone, expected)))
    return dict(zip(("error", "again"), map(max, zip(*errors, strict=True)), strict=True))


def layer_rows() -> dict[str, dict[str, float]]:
    """A DoRA layer with a bias on each base, in bf16 with a float32 adapter as in training: against float64.

    error: the largest of the output's and all gradients'. against_peft: the largest ratio to that of PEFT's own layer.
    Inputs and their gradients with strides of their own, and empty batches, go through the same kernels.
    """
    peft_int8.patch()
    rows = {}
    for bits in (16, 8, 4):
        torch.manual_seed(bits)
        net = nn.Sequential(quantized_linear(nn.Linear(1024, 768).bfloat16(), bits)).cuda()
        net.is_loaded_in_8bit, net.is_loaded_in_4bit = bits == 8, bits == 4
        config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=["0"], init_lora_weights=False)
        theirs = get_peft_model(net, config)
        exact = get_peft_model(nn.Sequential(nn.Linear(1024, 768)).cuda().double(), config)
        exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items() if "lora" in k}, strict=False)
        plain, base = (model.base_model.model[0].base_layer for model in (exact, theirs))
        plain.weight.data, plain.bias.data = quantized.dequantize(base, torch.float64), base.bias.data.double()
        exact.double()
        ours = copy.deepcopy(theirs)
        x, weights = (torch.randn(300, 2 * width, device="cuda").bfloat16() for width in (1024, 768))
        for name, of in (("", lambda y: y[:, ::2].contiguous()), (" strided", lambda y: y[:, ::2])):
            expected = gradients(exact, of(x).double(), of(weights).double())
            for fp8 in (False, True)[: 1 + (bits == 8 and quantized.has_fp8())]:
                dora.accelerate(ours, fp8)
                assert not any(empty.any() for empty in gradients(ours, of(x)[:0], of(weights)[:0]))
                results = gradients(ours, of(x), of(weights))
                errors = [relative(r, e) for r, e in zip(results, expected, strict=True)]
                row = rows[f"layer {bits} bits{' fp8' * fp8}{name}"] = {"fp8_error" if fp8 else "error": max(errors)}
            if bits == 16:
                results = gradients(theirs, of(x), of(weights))
                pefts = [relative(r, e) for r, e in zip(results, expected, strict=True)]
                row["against_peft"] = max(own / other for own, other in zip(errors, pefts, strict=True))
    return rows


class Projections(nn.Module):
    """q, k and v of 8B's widths, quantized."""

    def __init__(self, bits: int):
        super().__init__()
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = bits == 8, bits == 4
        for name, width in (("q_proj", K), ("k_proj", 1024), ("v_proj", 1024)):
            setattr(self, name, quantized_linear(nn.Linear(K, width, bias=False).bfloat16(), bits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], 1)


def together_rows() -> dict[str, dict[str, float]]:
    """q, k and v computed together, against each by itself: output and gradients, and both passes' milliseconds."""
    rows = {}
    for bits, use_dora in itertools.product((16, 8, 4), (True, False)):
        torch.manual_seed(bits)
        names = ["q_proj", "k_proj", "v_proj"]
        config = LoraConfig(r=8, use_dora=use_dora, target_modules=names, init_lora_weights=False)
        together = get_peft_model(Projections(bits).cuda(), config)
        dora.accelerate(together)
        alone = copy.deepcopy(together)
        for module in alone.modules():
            module._siblings = ()
        x, weights = (torch.randn(T, width, device="cuda").bfloat16() for width in (K, K + 2048))
        expected = gradients(alone, x, weights)
        for fp8 in (False, True)[: 1 + (bits == 8 and quantized.has_fp8())]:
            if fp8:
                dora.accelerate(together, fp8=True)
            errors = [relative(r, e) for r, e in zip(gradients(together, x, weights), expected, strict=True)]
            row = {"fp8_error" if fp8 else "error": max(errors)}
            if not fp8:
                for name, model in (("ms", together), ("ms_alone", alone)):
                    row[name] = do_bench(lambda: gradients(model, x, weights), return_mode="median")  # noqa: B023
            rows[f"together {bits} bits {'DoRA' if use_dora else 'LoRA'}{' fp8' * fp8}"] = row
    return rows


def quantized_linear(layer: nn.Linear, bits: int) -> nn.Linear:
    """The layer with 8- or 4-bit weights, which bitsandbytes quantizes when they move to the GPU; itself for 16."""
    if bits == 16:
        return layer
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    made = bnb.nn.Linear8bitLt(*sizes, False) if bits == 8 else bnb.nn.Linear4bit(*sizes, torch.bfloat16)
    made.load_state_dict({name: tensor.cpu() for name, tensor in layer.half().state_dict().items()})
    return made


def gradients(model: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of sum(output * weights)."""
    x = x.detach().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.autocast("cuda", torch.bfloat16, x.dtype == torch.bfloat16):
        y = model(x)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *trained])]


def graph_rows() -> dict[str, dict[str, float]]:
    """Two decoder layers of 8B widths with DoRA and dropout, trained by CUDA graphs and without.

    error: difference of the adapters after 6 steps of SGD on two packs each, relative to how far they have moved;
    `again`: that of a second run without graphs, since the attention's backward pass adds up in no fixed order.
    """
    rows = {}
    for bits in (16, 8):
        (start, plain), (_, again), (_, graphed) = (
            trained_adapter(bits, by_graphs) for by_graphs in (False, False, True)
        )
        moved = plain - start
        error, again = (((other - plain).norm() / moved.norm()).item() for other in (graphed, again))
        rows[f"graphs {bits} bits"] = {"error": error, "again": again}
    return rows


def trained_adapter(bits: int, by_graphs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapter before and after 6 steps on two packs of T tokens each, flat.

    A long sample in the second pack of the fourth step has the graphs recorded anew while they may still be running.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=K, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=T,
    )  # fmt: skip
    with torch.device("cuda"):
        base = LlamaForCausalLM(config).bfloat16()
    for block in [*base.model.layers.modules()]:
        for name, layer in block.named_children():
            if isinstance(layer, nn.Linear):
                setattr(block, name, quantized_linear(layer, bits).cuda())
    base.is_loaded_in_8bit = bits == 8
    peft = LoraConfig(r=8, use_dora=True, lora_dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(base, peft)
    dora.accelerate(model)
    attention.install(model.get_base_model())
    packing.read_label_positions(model, answers=True)
    installed = graphs.install(model) if by_graphs else None
    own = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    flat = torch.nn.utils.parameters_to_vector
    start = flat(own).detach().double()
    optimizer = torch.optim.SGD(own, 1.0)
    generator = torch.Generator().manual_seed(1)
    for number in range(12):
        samples = T // (520 if number == 7 else 130)
        sizes = torch.randint(60, 130, (samples,), generator=generator).tolist()
        positions = torch.cat([torch.arange(size) for size in [*sizes, T - sum(sizes)]])[None]
        ids = torch.randint(0, 4096, (1, T), generator=generator)
        labels = ids.clone()
        labels[:, positions[0] % 40 > 0] = -100
        edges, longest = attention.boundaries(positions)
        batch = dict(input_ids=ids, position_ids=positions, labels=labels)
        # Pinned, as the trainer's: a copy that waits would let the backward pass end before the next pack.
        batch |= packing.entries(attention.Segments(edges, longest))
        on_gpu = {n: v.pin_memory().cuda(non_blocking=True) for n, v in batch.items() if isinstance(v, torch.Tensor)}
        model(**batch | on_gpu).loss.backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert installed is None or (installed.replays, installed.recorded) == (12 - graphs.WARM_UP, 2)
    return start, flat(own).detach().double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "gpu_check.json")
    options = parser.parse_args()
    rows = {"varlen_attention": attention_row(), "shared_attention": shared_attention_row(False)}
    rows["copied_attention"] = shared_attention_row(True)
    rows["shared_answers"] = answers_row()
    for rank in (8, 64, 256):
        rows |= low_rank_rows(rank) | weight_rows(rank)
    rows |= matmul_rows() | layer_rows() | together_rows() | graph_rows()
    record = {"what": "python -m bench.gpu_check", "device": gpus()[0][0], "versions": versions(), "git": git_state()}
    options.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:32}", row)
    wrong = [name for name, row in rows.items() if not row.get("error", 0) < max(1e-2, 2 * row.get("again", 0))]
    wrong += [name for name, row in rows.items() if row.get("against_peft", 0) > 1.05 or row.get("fp8_error", 0) > 0.05]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
