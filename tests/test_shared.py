"""Answers to prompts whose shared prefixes are computed once are those to one prompt at a time."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rounding import FACTOR
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdora import triton_kernels
from finlora.evaluate import harness
from finlora.models import generate, shared

NEW = 4


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()


def grown(shape, seed=0):
    """Prompts as a tree: each of `shape` is (the prompt that it begins like, in how many tokens, tokens of its own)."""
    draw, prompts = random.Random(seed), []
    for like, common, own in shape:
        before = prompts[like % len(prompts)][:common] if prompts else []
        prompts.append(before + [draw.randrange(6, 2600) for _ in range(own)])
    return prompts


def watched(model, call):
    """call()'s result, the head's outputs and the number of tokens of each forward pass."""
    logits, tokens = [], []
    hooks = [
        model.lm_head.register_forward_hook(lambda module, inputs, out: logits.append(out[0].clone())),
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: tokens.append(inputs[0].numel())),
    ]
    try:
        return call(), logits, tokens
    finally:
        for hook in hooks:
            hook.remove()


def alone(model, prompt, new=NEW):
    """The answer to one prompt by plain forward passes over all of it, and each step's logits."""
    ids, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(new):
            logits.append(model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


def asked(model, prompts, prefixes, kept=None, new=NEW):
    return shared.answer(model, prompts, prefixes, new, lambda ids: False, kept)


SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=7)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, st.integers(0, 99))
@example([(0, 0, 20), (0, 20, 1), (0, 20, 9), (0, 20, 1)], 0)  # rows of one prefix; one is another's beginning
@example([(0, 0, 8), (0, 0, 8), (1, 7, 1)], 1)  # no prefix; two
@example([(0, 0, 1)], 2)
@example([(0, 0, 9), (0, 9, 1), (0, 9, 1)], 3)  # one own token each: as many as in a step
def test_answers_and_logits_are_those_of_each_prompt_alone(model, shape, seed):
    """In float64, over trees of prompts: one row a group, several groups, none, equal prompts, one within another."""
    prompts = grown(shape, seed)
    prompts += prompts[:1]
    ordered = harness.order_by_prefix(dict(enumerate(prompts)), 100, True)
    sizes = {one.index: one.prefix for one in ordered}
    prefixes = [sizes[index] for index in range(len(prompts))]
    written, logits, _ = watched(model, lambda: asked(model, prompts, prefixes))
    expected = [alone(model, prompt) for prompt in prompts]
    assert written == [ids for ids, _ in expected]
    # The rows of a batch are in the order of their prefixes.
    order = sorted(range(len(prompts)), key=lambda i: (not prefixes[i], tuple(prompts[i][: prefixes[i]]), i))
    steps = torch.stack(logits[bool(any(prefixes)) :])  # without the pass over prefixes: (steps, prompts, vocabulary)
    plain = torch.stack([expected[index][1] for index in order], 1)
    assert (steps - plain).abs().max() < 1e-10 * plain.abs().max()


def test_in_float32_logits_differ_by_rounding_alone(tiny_base):
    """Not bit for bit: a matmul of several rows sums in another order than one of a single row, before any sharing."""
    exact = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    single = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    prompts = grown([(0, 0, 60)] + [(0, 50, 8)] * 7)
    expected = torch.stack([alone(exact, prompt, 1)[1][0] for prompt in prompts])
    apart = torch.stack([alone(single, prompt, 1)[1][0] for prompt in prompts]).double() - expected
    written, logits, _ = watched(single, lambda: asked(single, prompts, [50] * 8, new=1))
    assert written == [alone(single, prompt, 1)[0] for prompt in prompts]
    assert (logits[1].double() - expected).abs().max() < FACTOR * apart.abs().max()


def test_a_prefix_is_computed_once_for_all_batches_of_its_group(model):
    prompts = grown([(0, 0, 40)] + [(0, 30, 5)] * 5 + [(0, 0, 9), (0, 30, 4)])
    prefixes, kept = [30] * 6 + [0, 30], {}
    first, _, tokens = watched(model, lambda: asked(model, prompts[:6], prefixes[:6], kept))
    assert tokens == [30, 10 + 5 * 5, 6, 6, 6] and [len(prefix) for prefix in kept] == [30]
    storage = next(iter(kept.values()))[0]
    assert storage.shape[:2] == (2, 30) and storage.untyped_storage().nbytes() == storage.numel() * 8
    second, _, tokens = watched(model, lambda: asked(model, prompts[6:], prefixes[6:], kept))
    assert tokens == [9 + 4, 2, 2, 2] and [len(prefix) for prefix in kept] == [30]
    assert first + second == [alone(model, prompt)[0] for prompt in prompts]
    other = grown([(0, 0, 20), (0, 10, 3)], 1)
    _, _, tokens = watched(model, lambda: asked(model, other + prompts[7:], [10, 10, 30], kept))
    assert tokens[:2] == [10, 10 + 3 + 4] and list(kept) == [tuple(prompts[7][:30])]
    asked(model, prompts[6:7], [0], kept)
    assert list(kept) == [tuple(prompts[7][:30])], "a batch without prefixes leaves the kept one"


@pytest.mark.parametrize("budget", [1, 60, 200, 10_000])
def test_batches_hold_the_tokens_that_the_budget_takes(budget):
    prompts = grown([(0, 0, 40)] + [(0, 30, own) for own in range(1, 12)] + [(0, 0, own) for own in (3, 70, 9)])
    left = harness.order_by_prefix(dict(enumerate(prompts)), budget, True)
    assert sorted(one.index for one in left) == list(range(len(prompts)))
    assert all(one.prefix + one.own == len(prompts[one.index]) and one.own > 0 for one in left)
    whole = left
    while left:
        rows, tokens = harness.fill_batch(left, NEW, budget)
        batch = left[:rows]
        before = {one.group: one.prefix for one in batch if one.group >= 0}
        assert tokens == sum(before.values()) + rows * (max(one.own for one in batch) + NEW)
        assert rows == 1 or tokens <= budget
        left = left[rows:]
    groups = [one.group for one in whole]
    assert all(groups.index(group) + groups.count(group) == place + 1 for place, group in enumerate(groups)
               if group >= 0 and group not in groups[place + 1 :])  # fmt: skip
    assert [one.prefix for one in harness.order_by_prefix(dict(enumerate(prompts)), budget, False)] == [0] * len(whole)


@pytest.mark.parametrize("change", [{"repetition_penalty": 9.0}, {"sliding_window": 8}])
def test_other_models_are_answered_by_transformers(tiny_base, monkeypatch, change):
    """One with a penalty in its generation_config, and one whose layers look back a few tokens only."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert shared.supports(model) and model.config._attn_implementation == "sdpa"
    prompts = grown([(0, 0, 20), (0, 12, 5), (0, 12, 2)])
    plain = generate.generate(model, tokenizer, prompts, 8)
    for key, value in change.items():
        owner = model.generation_config if key == "repetition_penalty" else model.config
        monkeypatch.setattr(owner, key, value, raising=False)
    assert not shared.supports(model) and model.config._attn_implementation == "sdpa"
    changed = generate.generate(model, tokenizer, prompts, 8, prefixes=[12] * 3, kept={})
    assert changed == generate.padded(model, tokenizer, prompts, 8) != plain


def test_a_kernel_that_is_missing_or_wrong_is_noticed(monkeypatch, capsys):
    """On the CPU in bfloat16, which stands in for a GPU."""

    def works(kernel):
        shared.kernel_works.cache_clear()
        monkeypatch.setattr(shared, "_flash_cpu", kernel)
        return shared.kernel_works("cpu", torch.bfloat16, 8, 2, 64)

    kernel = shared._flash_cpu

    def missing(query, *rest):
        if query.dtype == torch.bfloat16:
            raise RuntimeError("no kernel image")
        return kernel(query, *rest)

    def without_prefixes(query, new, run, *rest):
        return kernel(query, new, replace(run, prefixes=None) if query.dtype == torch.bfloat16 else run, *rest)

    def seeing_one_more(query, new, run, *rest):
        less = run.seen and query.dtype == torch.bfloat16
        return kernel(query, new, replace(run, used=run.used + 1) if less else run, *rest)

    def other_arguments(query, *rest):
        return missing(query, *rest) if query.dtype != torch.bfloat16 else kernel()

    assert works(kernel) and not capsys.readouterr().err
    for fault, words in (
        (missing, "no kernel image"),
        (other_arguments, "missing"),
        (without_prefixes, "float32"),
        (seeing_one_more, "float32"),
    ):
        assert not works(fault)
        (line,) = capsys.readouterr().err.splitlines()
        assert "padded" in line and words in line
    shared.kernel_works.cache_clear()


def test_the_query_has_the_layout_that_merging_reads(model, monkeypatch):
    """The flash kernel gives its output the query's strides; kernels.merge_attention reads (T, H, D) as it is written.

    Random tokens in (1, H, T, D), as `kernel_works` tries the GPU's kernel with, are a transposed view of that.
    """
    seen = []
    attend = shared._flash_cpu
    monkeypatch.setattr(shared, "_flash_cpu", lambda query, *args: seen.append(query) or attend(query, *args))
    shared._trial("cpu", torch.bfloat16, 4, 2, 8, torch.float32)
    assert len(seen) == 2 and all(query.is_contiguous() for query in seen)


def test_strides_that_a_kernel_would_misread_are_refused():
    out, lse, within = torch.zeros(2, 5, 8).transpose(0, 1), torch.zeros(2, 5), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="contiguous"):
        triton_kernels.merge_attention(out, lse, out, lse, within)
    with pytest.raises(ValueError, match="contiguous"):
        triton_kernels.add_rows(out.contiguous(), out, within)
