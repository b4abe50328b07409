"""Prefixes that rows share: found, packed and laid out; loss and gradients are those of rows with whole prefixes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rounding import apart, beyond, nudged_model, shaken
from test_graphs import rerun
from transformers import LlamaConfig, LlamaForCausalLM

from fastdora import attention, dora, graphs, kernels, packing, prefixes

VOCABULARY, ANSWER = 61, 2
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@st.composite
def trees(draw, most: int = 12) -> list[dict[str, list[int]]]:
    """Rows from a random tree of prefixes: equal ones, one a prefix of another, lone ones; the last tokens answers."""
    rows: list[list[int]] = []
    token = st.integers(3, 6)  # few, so that rows share by chance too
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.sampled_from(rows)) if rows and draw(st.booleans()) else []
        kept = draw(st.integers(0, len(start)))
        rows.append(start[:kept] + draw(st.lists(token, min_size=0 if kept else 1, max_size=9)))
    answers = [draw(st.integers(1, 2)) for _ in rows]
    return [
        {"input_ids": row + [ANSWER] * answer, "labels": [-100] * len(row) + [ANSWER] * answer}
        for row, answer in zip(rows, answers, strict=True)
    ]


def limits(rows) -> list[int]:
    return [row["labels"].index(ANSWER) - 1 for row in rows]


def find(rows, capacity=64, together=None) -> prefixes.Shared:
    return prefixes.find([np.array(row["input_ids"]) for row in rows], limits(rows), capacity, together)


def tokens(rows, shared, numbers) -> int:
    """Tokens of a pack of these rows with each prefix once."""
    groups = {int(shared.groups[n]): int(shared.lengths[n]) for n in numbers if shared.groups[n] >= 0}
    return sum(groups.values()) + sum(len(rows[n]["labels"]) - int(shared.lengths[n]) for n in numbers)


@given(rows=trees(), together=st.sampled_from([None, 1, 3]))
def test_rows_of_a_group_begin_with_its_prefix(rows, together):
    shared = find(rows, together=together)
    for group in set(shared.groups.tolist()):
        members = np.flatnonzero(shared.groups == group)
        (length,) = set(shared.lengths[members].tolist())
        assert length == 0 if group < 0 else length > 0 and len(members) > 1
        assert len({tuple(rows[n]["input_ids"][:length]) for n in members}) == 1
        assert all(length <= limits(rows)[n] for n in members), "the token that predicts the first label stays"


@given(
    rows=trees(40), capacity=st.integers(12, 60), together=st.sampled_from([None, 1, 2]),
    most=st.sampled_from([None, 3]), seed=st.none() | st.integers(0, 3), extra=st.integers(0, 5),
)  # fmt: skip
def test_every_row_is_in_one_pack_that_it_fits(rows, capacity, together, most, seed, extra):
    sizes = np.array([len(row["labels"]) for row in rows])
    capacity = max(capacity, sizes.max())
    shared = find(rows, capacity, together)
    generator = None if seed is None else np.random.default_rng(seed)
    packs = prefixes.pack(sizes, shared, capacity, together, most, generator)
    assert sorted(n for pack in packs for n in pack) == list(range(len(rows)))
    assert all(tokens(rows, shared, pack) <= capacity and len(pack) <= (most or len(rows)) for pack in packs)
    more = prefixes.split(packs, len(packs) + extra)
    assert sorted(n for pack in more for n in pack) == list(range(len(rows))) and all(more)
    assert len(more) == min(len(packs) + extra, max(len(rows), len(packs)))


def test_the_deepest_prefix_that_saves_most_is_taken():
    """Instruction, filing, question: rows share their filing; a filing with one question shares the instruction."""
    instruction, question = list(range(10, 30)), [[50, n] for n in range(8)]
    filings = [list(range(100 * n, 100 * n + 60)) for n in (1, 2, 3, 4, 5, 6)]
    rows = [instruction + filing + q for filing in filings[:2] for q in question]
    rows += [instruction + filing + question[0] for filing in filings[2:]]
    rows = [{"input_ids": row + [ANSWER], "labels": [-100] * len(row) + [ANSWER]} for row in rows]
    shared = find(rows, capacity=400)
    # Of the question's two tokens the first is the same in all rows of a filing.
    assert shared.lengths.tolist() == [81] * 16 + [20] * 4
    assert len(set(shared.groups.tolist())) == 3


def test_rows_of_one_prefix_are_drawn_together_as_often_as_the_limit_says():
    rows = [[100 + n // 20] * 30 + [1 + n % 20] for n in range(400)]
    rows = [{"input_ids": row + [3, ANSWER], "labels": [-100] * 32 + [ANSWER]} for row in rows]
    sizes, counts = np.full(400, 33), {}
    for together in (None, 4, 20):
        shared = find(rows, 200, together)
        packs = prefixes.pack(sizes, shared, 200, together, None, np.random.default_rng(0))
        counts[together] = len(packs)
        for pack in packs:
            within = np.unique(shared.groups[pack], return_counts=True)[1]
            assert within.max() <= (together or 20)
    assert counts[20] < counts[4] < counts[None]
    assert counts[20] <= 20 * 90 / 200 * 1.3, "a group of 20 rows has 90 tokens"


def model(dropout: float = 0.0, bits: type = torch.float64):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, use_dora=True, lora_dropout=dropout, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
    )
    made = get_peft_model(LlamaForCausalLM(CONFIG).to(bits), config)
    for layer in made.get_base_model().model.layers:  # transformers' own norms compute in float32
        layer.input_layernorm, layer.post_attention_layernorm = (torch.nn.RMSNorm(32, dtype=bits) for _ in range(2))
    made.get_base_model().model.norm = torch.nn.RMSNorm(32, dtype=bits)
    dora.accelerate(made)
    attention.install(made.get_base_model())
    packing.read_label_positions(made)
    return made.train()


def pad(features):
    """As axolotl's collator joins the rows of a pack and pads them."""
    (rows,) = features
    joined = {name: np.concatenate([np.asarray(row[name]) for row in rows]) for name in rows[0]}
    spare = -len(joined["labels"]) % 8
    fill = {"labels": np.full(spare, -100), "position_ids": np.arange(spare)}
    joined = {name: np.concatenate([value, fill.get(name, np.zeros(spare, int))]) for name, value in joined.items()}
    return {name: torch.tensor(value)[None] for name, value in joined.items()}


def batches(rows, shared=None, packs=None, copy=False):
    """A batch of each pack, with each prefix once, or whole."""
    collator = packing.Collator(pad, packed=True, answers=True, copy=copy)
    for numbers in packs or [range(len(rows))]:
        features = [rows[n] | {"position_ids": list(range(len(rows[n]["labels"])))} for n in numbers]
        if shared is not None:
            columns = [{packing.GROUP: shared.groups[n], packing.PREFIX: shared.lengths[n]} for n in numbers]
            features = [feature | extra for feature, extra in zip(features, columns, strict=True)]
        yield collator([features])


def loss(made, batch) -> torch.Tensor:
    logits, positions = made(**batch, num_items_in_batch=7).logits, batch[packing.ANSWERS]
    return F.cross_entropy(logits[0], F.pad(batch["labels"], (0, 1), value=-100)[0, 1:][positions], reduction="sum")


def gradients(made, given) -> dict[str, torch.Tensor]:
    """The loss and its gradients; transformers would take it in float32."""
    made.zero_grad()
    total = sum(loss(made, batch) for batch in given)
    total.backward()
    return {"loss": total.detach()} | {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@given(rows=trees(), split=st.booleans())
@settings(max_examples=25)
@example(rows=[{"input_ids": [3, 4, 5, 2], "labels": [-100, -100, -100, 2]}] * 3, split=False)
def test_loss_and_gradients_are_those_of_whole_rows(rows, split):
    """In float64 without dropout, over random trees, in one pack and in several: to 1e-10, and to rounding."""
    made = model()
    sizes = np.array([len(row["labels"]) for row in rows])
    capacity = int(sizes.max()) * 2 if split else int(sizes.sum())
    shared = find(rows, capacity)
    packs = prefixes.pack(sizes, shared, capacity, None)
    together = list(batches(rows, shared, packs))
    assert sum(int(batch[packing.COUNTS][1]) for batch in together) == sizes.sum()
    actual, expected = gradients(made, together), gradients(made, batches(rows))
    assert actual.keys() == expected.keys() and len(actual) > 12
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@given(rows=trees(), spare=st.integers(0, 5), seed=st.integers(0, 99))
def test_copied_keys_are_the_prefixs_and_the_rows_own(rows, spare, seed):
    """A segment sees what the reference sees, and the gradients of copies add up to those of the keys."""
    shared = find(rows, 600)
    layout = prefixes.lay_out(rows, shared.groups.tolist(), shared.lengths.tolist())
    size = layout.edges[-1] + spare
    segments = attention.Segments(**prefixes.tensors(layout, size, copy=True))
    edges, key_edges, copied = (part.tolist() for part in (segments.edges, segments.key_edges, segments.copied))
    groups = attention._groups(segments)
    for start, end, first, last in zip(edges, edges[1:], key_edges, key_edges[1:], strict=False):
        prefix = next((range(a, b) for begin, over, a, b in groups if begin <= start < over), range(0))
        assert copied[first:last] == [*prefix, *range(start, end)]
    assert segments.longest_keys == max(2, segments.key_edges.diff().max()) and key_edges[-1] == len(copied)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(size, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, len(copied) + 4, 2, 3, generator=generator, dtype=torch.float64)
    room = torch.cat([segments.copies, segments.copies[-4:]])  # a graph's buffers are longer
    sums = kernels.sum_copies(weights[0], weights[1], room, segments.key_edges, size)
    for weight, actual in zip(weights, sums, strict=True):
        (expected,) = torch.autograd.grad((keys[segments.copied] * weight[: len(copied)]).sum(), keys)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_something_is_computed_once_and_the_prefix_learns_from_all_its_rows():
    rows = [{"input_ids": [*range(5, 45), n, 3, ANSWER], "labels": [-100] * 42 + [ANSWER]} for n in range(50, 58)]
    shared = find(rows, 600)
    (batch,) = batches(rows, shared)
    assert (batch["labels"] != -100).sum() == 8 and batch["input_ids"].shape[1] == 40 + 8 * 3
    assert batch[packing.COUNTS].tolist() == [8, 8 * 43]
    segments = {field: batch[entry] for field, entry in packing.SEGMENTS.items() if entry in batch}
    assert segments["prefixes"].tolist() == [0, 40] and segments["suffixes"].tolist() == [40, 64]
    assert [segments[f"longest{which}"] for which in ("", "_suffixes", "_prefix")] == [40, 24, 40]


def test_evaluation_and_checkpointing_read_the_same_layout():
    rows = [{"input_ids": [*range(5, 25), n, 3, ANSWER], "labels": [-100] * 22 + [ANSWER]} for n in range(50, 58)]
    made, shared = model(), find(rows, 600)
    expected = gradients(made, batches(rows))
    made.enable_input_require_grads()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = gradients(made, batches(rows, shared))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)
    with torch.no_grad():
        (actual,) = (loss(made.eval(), batch) for batch in batches(rows, shared))
    torch.testing.assert_close(actual, expected["loss"], rtol=1e-10, atol=0)


def test_a_label_at_a_suffixs_start_and_lost_segments_are_errors():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2
    with pytest.raises(ValueError, match="label"):
        prefixes.lay_out(rows, [0, 0], [1, 1])
    rows = [{"input_ids": [*range(5, 25), n, 3, ANSWER], "labels": [-100] * 22 + [ANSWER]} for n in range(50, 54)]
    (batch,) = batches(rows, find(rows, 600))
    batch = {name: value for name, value in batch.items() if name not in packing.SEGMENTS.values()}
    with pytest.raises(ValueError, match="segments"):
        model()(**batch)


@pytest.mark.parametrize("copy", [False, True])
def test_graphs_replay_packs_of_other_prefixes(monkeypatch, copy):
    """One recording serves packs with fewer and shorter groups; its results are those without graphs."""
    monkeypatch.setattr(graphs, "record", rerun)
    made, plain = model(), model()
    installed = graphs.install(made)
    for step in range(6):
        count = 8 - step % 3
        prefix, rest = [*range(5, 25 - step % 2)], 64 - (20 - step % 2) - 3 * count
        rows = [
            {"input_ids": [*prefix, n, 3, ANSWER], "labels": [-100] * (len(prefix) + 2) + [ANSWER]}
            for n in range(50, 50 + count)
        ]
        rows.append({"input_ids": [4] * (rest - 1) + [ANSWER], "labels": [-100] * (rest - 1) + [ANSWER]})
        given = list(batches(rows, find(rows, 600), copy=copy))
        assert given[0]["input_ids"].shape[1] == 64
        actual, expected = gradients(made, given), gradients(plain, given)
        # Not bit for bit: the graph's buffer of kept positions is longer, and another number of rows is another matmul.
        moved = lambda seed: apart(gradients(nudged_model(plain, seed), given), expected)  # noqa: E731, B023
        assert not beyond(actual, expected, shaken(moved, torch.float64, terms=64))
    assert installed.recorded == 1 and installed.replays == 4


@given(tokens=st.integers(1, 20), bounds=st.tuples(st.integers(0, 20), st.integers(0, 20)), seed=st.integers(0, 99))
def test_attention_to_two_sets_of_keys_is_merged_by_their_logsumexps(tokens, bounds, seed):
    """Against softmax over all keys at once; tokens outside of the bounds stay, whatever their part holds."""
    generator = torch.Generator().manual_seed(seed)
    first, last = sorted(min(bound, tokens) for bound in bounds)
    scores, values = (
        torch.randn(2, 3, tokens, 7, generator=generator, dtype=torch.float64),
        torch.randn(2, 7, 4, generator=generator, dtype=torch.float64),
    )
    scores = scores[0] * 5
    whole = scores.softmax(-1) @ values[0]
    outs, lses = [], []
    for keys in (slice(0, 3), slice(3, 7)):
        outs.append((scores[..., keys].softmax(-1) @ values[0][keys]).transpose(0, 1).contiguous())
        lses.append(scores[..., keys].logsumexp(-1))
    out, lse = outs[0].clone(), lses[0].clone()
    outs[1][:first], outs[1][last:] = torch.nan, torch.nan
    within = torch.tensor([first, (first + last) // 2, last], dtype=torch.int32)
    kernels.merge_attention(out, lse, outs[1], lses[1], within)
    inside = slice(first, last)
    torch.testing.assert_close(out[inside], whole.transpose(0, 1)[inside], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse[:, inside], scores.logsumexp(-1)[:, inside], rtol=1e-12, atol=1e-12)
    total = outs[0].clone()
    kernels.add_rows(total, outs[1], within)
    for changed in (out, total):
        assert torch.equal(changed[:first], outs[0][:first]) and torch.equal(changed[last:], outs[0][last:])
    assert torch.equal(total[inside], (outs[0] + outs[1])[inside])
