"""Packed attention and the loss on answers only: what they leave out changes nothing."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import FACTOR, apart, beyond, nudged_model, shaken
from transformers import (
    DynamicCache,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from fastdora import attention, packing
from fastdora.dora import Unsupported


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).double()
    attention.install(model)
    return model


def packed(sizes: list[int], pad: int = 0) -> torch.Tensor:
    """position_ids (1, S) of samples of these sizes, padded as axolotl pads them: with zeros."""
    return torch.cat([*(torch.arange(size) for size in sizes), torch.zeros(pad, dtype=torch.long)])[None]


def beyond_rounding(actual: dict[str, torch.Tensor], model, reference) -> dict:
    """What of `found` is further from `reference(model)` than rounding explains."""
    expected = reference(model)
    differences = lambda seed: apart(reference(nudged_model(model, seed)), expected)  # noqa: E731
    terms = model.config.intermediate_size
    bounds = shaken(differences, torch.float64, terms)
    for name, value in actual.items():  # transformers takes the loss in float32
        bounds[name] = max(bounds[name], FACTOR * terms * torch.finfo(value.dtype).eps)
    return beyond(actual, expected, bounds)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), pad=st.integers(0, 5), seed=st.integers(0, 999))
@settings(max_examples=10)
def test_packed_samples_are_computed_as_if_alone(model, sizes, pad, seed):
    """Logits within rounding; the gradient of one sample's logits with respect to another's tokens is exactly zero."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 97, (1, sum(sizes) + pad))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    together = model(inputs_embeds=embedded, position_ids=packed(sizes, pad)).logits[0]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    samples = list(zip(starts, sizes, strict=False))

    @torch.no_grad()
    def alone(model):
        return {
            str(start): model(input_ids=ids[:, start : start + size], position_ids=torch.arange(size)[None]).logits[0]
            for start, size in samples
        }

    actual = {str(start): together[start : start + size].detach() for start, size in samples}
    assert not beyond_rounding(actual, model, alone)
    chosen = seed % len(sizes)
    first, last = starts[chosen], starts[chosen] + sizes[chosen]
    (grad,) = torch.autograd.grad(together[first:last].square().sum(), embedded)
    outside = torch.cat([grad[0, :first], grad[0, last:]])
    assert not outside.any() and grad[0, first:last].any()


def test_it_equals_transformers_own_sdpa_on_padded_rows_and_while_generating(model):
    ids = torch.randint(0, 97, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :2] = 0
    actual = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.config._attn_implementation = "sdpa"
    try:
        seen = mask.bool()
        own = lambda model: {"y": model(input_ids=ids, attention_mask=mask).logits[seen].detach()}  # noqa: E731
        assert not beyond_rounding({"y": actual[seen].detach()}, model, own)
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, plain)
    finally:
        model.config._attn_implementation = attention.NAME


@pytest.mark.parametrize("kind", ["grows", "static"])
def test_several_tokens_on_a_filled_cache_see_all_before_them(model, kind):
    """As speculative decoding and a prefix that is kept call it: more tokens than one, no mask, a cache."""
    ids = torch.randint(0, 97, (2, 12))
    cache = DynamicCache() if kind == "grows" else StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        parts = [model(input_ids=part, past_key_values=cache).logits for part in (ids[:, :5], ids[:, 5:9], ids[:, 9:])]
    whole = lambda model: {"y": model(input_ids=ids).logits.detach()}  # noqa: E731
    assert not beyond_rounding({"y": torch.cat(parts, 1)}, model, whole)


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3), spare=st.integers(0, 3)
)
def test_boundaries_are_the_samples_ends(sizes, spare):
    width = max(map(sum, sizes)) + spare
    rows = torch.cat([packed(row, width - sum(row)) for row in sizes])
    edges, longest = attention.boundaries(rows)
    expected = [0]
    for row in sizes:
        for size in [*row, *[1] * (width - sum(row))]:
            expected.append(expected[-1] + size)
    assert edges.tolist() == expected and edges.dtype == torch.int32
    assert longest == max(b - a for a, b in zip(expected, expected[1:], strict=False))


def batches():
    """Labels (B, S) as they come: answers at the end, nothing at all, everything, one sample of two without."""
    torch.manual_seed(1)
    for rows, rule in ((1, "end"), (1, "none"), (2, "all"), (3, "end"), (2, "first row")):
        ids = torch.randint(0, 97, (rows, 20))
        labels = ids.clone()
        if rule == "end":
            labels[:, :17] = -100
        elif rule == "none":
            labels[:] = -100
        elif rule == "first row":
            labels[1:] = -100
        yield ids, labels


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("collated", [True, False])
def test_the_loss_on_answers_only_is_the_loss(model, items, collated):
    """Value and gradients, with the Trainer's token count and without it; without an answer both are no number."""
    extra = {} if items is None else {"num_items_in_batch": items}
    for ids, labels in batches():
        sizes = []

        def trained(model, only=False, ids=ids, labels=labels, sizes=sizes):
            model.zero_grad()
            batch = {"input_ids": ids, "labels": labels}
            if only and collated:
                batch = packing.Collator(lambda batch: batch, packed=False, answers=True)(batch)
            hook = packing.read_label_positions(model, answers=only and not collated)
            out = model(**batch, **extra)
            hook.remove()
            sizes.append(out.logits.shape[1])
            if not out.loss.isfinite():
                return {}
            out.loss.backward()
            return {"loss": out.loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

        actual = trained(model, only=True)
        assert bool(actual) == (items is not None or bool((labels[:, 1:] != -100).any()))
        assert not beyond_rounding(actual, model, trained)
        kept = max(1, int((labels[:, 1:] != -100).any(0).sum()))
        assert sizes[:2] == [kept, 20]


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("labelled", [[4, 12, 18], [0, 19], []])
def test_the_last_layer_goes_on_where_a_label_is_alone(model, checkpointing, labelled):
    """The output projection and the MLP see the kept positions; loss and gradients are those of all positions."""
    model = copy.deepcopy(model).train()
    attention.install(model)  # as an evaluation of a model that was trained does
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    labels = torch.full((1, 20), -100)
    labels[0, labelled] = 7
    batch = {"input_ids": torch.randint(0, 97, (1, 20)), "position_ids": packed([9, 11]), "labels": labels}
    batch |= {"num_items_in_batch": torch.tensor(3)}
    collated = packing.Collator(dict, packed=True, answers=True)(batch)
    packing.read_label_positions(model)
    sizes: list[int] = []
    mlp, projection = model.model.layers[-1].mlp, model.model.layers[-1].self_attn.o_proj
    for module in (mlp.down_proj, projection):
        module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))

    def trained(model, batch=batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    actual = trained(model, collated)
    assert {*sizes} == {max(1, len({*labelled} - {0})) + 1}
    assert not beyond_rounding(actual, model, trained)


def test_the_collator_adds_places_and_keeps_the_rest():
    inner = SimpleNamespace(tokenizer="kept")
    collator = packing.Collator(inner, packed=True, answers=True)
    assert collator.tokenizer == "kept"
    with pytest.raises(AttributeError):
        _ = collator.nothing
    collator.collator = dict  # a callable that pickles
    collator = pickle.loads(pickle.dumps(collator))  # as a worker of a data loader gets it
    labels = torch.tensor([[-100, -100, 5, -100, 6]])
    batch = collator({"input_ids": labels, "position_ids": packed([3, 2]), "labels": labels})
    assert batch["fastdora_edges"].tolist() == [0, 3, 5] and batch["fastdora_longest"] == 3
    assert "fastdora_suffixes" not in batch
    assert batch[packing.ANSWERS].tolist() == [1, 3]
    assert set(collator({"input_ids": labels})) == {"input_ids"}


def test_the_model_reads_the_packs_the_collator_saw(model, monkeypatch):
    """No boundary is looked for again in the forward pass, where a GPU would be waited for."""
    collator = packing.Collator(dict, packed=True, answers=False)
    batch = collator({"input_ids": torch.randint(0, 97, (1, 9)), "position_ids": packed([4, 5])})
    expected = model(input_ids=batch["input_ids"], position_ids=packed([4, 5])).logits
    hook = packing.read_label_positions(model)
    monkeypatch.setattr(attention, "boundaries", lambda *_: pytest.fail("looked for again"))
    actual = model(**batch).logits
    hook.remove()
    assert torch.equal(actual, expected)


def test_boundaries_are_those_of_what_the_positions_hold(model):
    """A buffer of positions that is written again, in place and in inference mode too, is another batch."""
    ids = torch.randint(0, 97, (1, 9))
    expected = {sizes: model(input_ids=ids, position_ids=packed(sizes)).logits for sizes in ((4, 5), (2, 7))}
    positions = packed((4, 5))
    assert torch.equal(model(input_ids=ids, position_ids=positions).logits, expected[4, 5])
    positions.copy_(packed((2, 7)))
    assert torch.equal(model(input_ids=ids, position_ids=positions).logits, expected[2, 7])
    with torch.inference_mode():
        positions = packed((4, 5))
        assert torch.equal(model(input_ids=ids, position_ids=positions).logits, expected[4, 5])
        positions.copy_(packed((2, 7)))
        assert torch.equal(model(input_ids=ids, position_ids=positions).logits, expected[2, 7])


def test_label_smoothing_which_takes_the_labels_away_keeps_all_logits(model, tmp_path):
    """transformers' Trainer pops the labels before the model is called, and needs the logits of each position."""
    labels = torch.randint(0, 97, (2, 9))
    labels[:, :4] = -100
    losses = []
    for answers in (False, True):
        arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
        trainer = Trainer(model, arguments, data_collator=lambda batch: batch)
        if answers:
            packing.install(trainer, packed=False, answers=True)
        batch = trainer.data_collator({"input_ids": labels.clamp_min(0), "labels": labels.clone()})
        losses.append(trainer.compute_loss(model, batch).detach())
    assert torch.equal(*losses)


def test_what_packs_cannot_have_is_refused(model):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="dropout.*sliding window"):
        attention.varlen_attention(None, q, q, q, None, dropout=0.1, position_ids=packed([4]))


@pytest.mark.parametrize(
    "config, kind",
    [
        (MistralConfig(sliding_window=8), "sliding_window"),
        (Llama4TextConfig(attention_chunk_size=8), "chunked_attention"),
        (Gemma3TextConfig(), "sliding_attention"),
        (
            Gemma3TextConfig(use_bidirectional_attention=True, layer_types=["full_attention"] * 26),
            "use_bidirectional_attention",
        ),
    ],
)
def test_models_that_attend_otherwise_are_refused_at_once(config, kind):
    before = config._attn_implementation
    with pytest.raises(Unsupported, match=f"^{config.model_type} .*{kind}"):
        attention.install(SimpleNamespace(config=config))
    assert config._attn_implementation == before


def test_models_that_attend_to_all_before_are_taken():
    for config in (MistralConfig(sliding_window=None), Qwen2Config(), Qwen3Config(), LlamaConfig()):
        layer = SimpleNamespace(self_attn=None)
        attention.install(
            SimpleNamespace(config=config, get_decoder=lambda layer=layer: SimpleNamespace(layers=[layer]))
        )
        assert config._attn_implementation == attention.NAME
