"""Models for evaluation: the adapter reaches the model, magnitudes included, and what does not fit is named."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from failures import refuses, says
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import FACTOR, apart, nudged_model, shaken
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdora.plugin import peft_int8
from finlora.evaluate import harness
from finlora.models import load as models
from finlora.models.trained import adapter_facts, prompts, resolve_adapter

TARGETS = ["q_proj", "k_proj", "v_proj"]
IDS = torch.arange(3, 45).reshape(2, 21)


def make_adapter(base, folder, method="dora", r=4, targets=TARGETS, alpha=16):
    """An untrained adapter whose B and magnitudes are not what PEFT starts with, so that each changes the model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        use_dora=method == "dora",
        use_rslora=method == "rslora",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.05)
        elif "magnitude" in name:
            tensor.data *= 1 + 0.3 * torch.rand_like(tensor)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {method: make_adapter(tiny_base, folder / method, method) for method in ("lora", "dora", "rslora")}


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def rounding_of(model, bits: int) -> float:
    """How far logits of the same weights may be: what one rounding of each weight changes.

    On 8 bits what rounding each layer's activations to 8 bits does, as LLM.int8 does.
    """
    expected = {"logits": logits(model)}
    if bits != 8:
        differences = lambda seed: apart({"logits": logits(nudged_model(model, seed))}, expected)  # noqa: E731
        return shaken(differences, torch.float32)["logits"] * expected["logits"].abs().max()

    def rounded(module, inputs):
        step = inputs[0].abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((inputs[0] / step).round() * step,)

    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(rounded) for layer in layers]
    lost = (logits(model) - expected["logits"]).abs().max()
    for hook in hooks:
        hook.remove()
    return FACTOR * lost


@pytest.mark.parametrize("alpha", [16, 32])
def test_merging_is_the_formula(tiny_base, tmp_path, alpha):
    """W' = m (W0 + s B A) / ||W0 + s B A||, the norm over each output row, in float64."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    adapter = make_adapter(tiny_base, tmp_path / "a", alpha=alpha)
    merged = models.attach(models.load_base(tiny_base, 16), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for layer in range(4):
        for target in TARGETS:
            name = f"model.layers.{layer}.self_attn.{target}"
            a, b, m = (
                tensors[f"base_model.model.{name}.{part}"].double()
                for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            )
            summed = plain.get_submodule(name).weight.double() + alpha / 4 * b @ a
            expected = m[:, None] * summed / summed.norm(dim=1, keepdim=True)
            weight = merged.get_submodule(name).weight.double()
            # Merged in float32: the norm's, the division's and the sum's rounding.
            assert (weight - expected).abs().max() < FACTOR * torch.finfo(torch.float32).eps * expected.abs().max()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "bits"),
    [("dora", 16), ("dora", 8), ("dora", 4), ("lora", 16), ("rslora", 16)]
    + [pytest.param(method, bits, marks=SLOW) for method in ("lora", "rslora") for bits in (8, 4)],
)
def test_merged_is_what_was_trained(tiny_base, adapters, method, bits):
    """Merged into dequantized weights, and left on quantized ones with cached norms, an adapter answers the same."""
    merged = logits(models.attach(models.load_base(tiny_base, bits), adapters[method]))
    base = models.load_base(tiny_base, bits, keep_quantised=True)
    kept = models.attach(base, adapters[method]) if bits != 16 else PeftModel.from_pretrained(base, adapters[method])
    first = logits(kept.eval())
    assert torch.equal(first, logits(kept)), "the second forward takes the cached norms"
    assert (merged - first).abs().max() < rounding_of(
        models.attach(models.load_base(tiny_base, bits), adapters[method]), bits
    )
    without = logits(models.load_base(tiny_base, bits))
    assert (merged - without).abs().max() > 4


def test_the_magnitudes_are_used_and_the_wrong_way_of_loading_loses_them_in_silence(tiny_base, adapters, tmp_path):
    right = logits(models.attach(models.load_base(tiny_base, 16), adapters["dora"]))
    changed = tmp_path / "changed"
    shutil.copytree(adapters["dora"], changed)
    tensors = load_file(changed / "adapter_model.safetensors")
    for name in tensors:
        if "magnitude" in name:
            tensors[name] = tensors[name] * 1.5
    save_file(tensors, changed / "adapter_model.safetensors")
    assert (logits(models.attach(models.load_base(tiny_base, 16), changed)) - right).abs().max() > 0.1

    lost = AutoModelForCausalLM.from_pretrained(adapters["dora"], dtype=torch.float32).eval()
    assert (logits(lost) - right).abs().max() > 0.1, "transformers keeps magnitudes now: the docs may say so"


def test_a_tensor_that_does_not_reach_the_model_is_named(tiny_base, adapters, tmp_path, monkeypatch):
    import peft.utils

    real = peft.utils.get_peft_model_state_dict
    monkeypatch.setattr(
        peft.utils,
        "get_peft_model_state_dict",
        lambda model: {name: t for name, t in real(model).items() if "magnitude" not in name},
    )
    with refuses("lora_magnitude_vector", file=adapters["dora"]):
        models.attach(models.load_base(tiny_base, 16), adapters["dora"])


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_magnitudes(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "magnitude" not in name}, path)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# How an adapter is damaged, the file that is named, and words for the fault and the remedy.
BAD_ADAPTERS = {
    "missing": (shutil.rmtree, "", ["no such", "ADAPTER="]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "", [WEIGHTS, "name the"]),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "", [WEIGHTS, "pickle", "name the"]),
    "no config": (lambda f: (f / CONFIG).unlink(), "", [CONFIG, "name the"]),
    "config is not JSON": (lambda f: (f / CONFIG).write_text("{"), CONFIG, ["LoRA", "name a"]),
    "another kind": (lambda f: edit_config(f, peft_type="IA3"), CONFIG, ["LoRA", "name a"]),
    "truncated": (truncate, WEIGHTS, ["read", "fetch or train"]),
    "magnitudes lost": (drop_magnitudes, CONFIG, ["use_dora: true", "no magnitudes", "save"]),
    "magnitudes ignored": (lambda f: edit_config(f, use_dora=False), CONFIG, ["use_dora;", "magnitudes", "save"]),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapters(case, adapters, tmp_path):
    damage, name, words = BAD_ADAPTERS[case]
    shutil.copytree(adapters["dora"], tmp_path / "a")
    damage(tmp_path / "a")
    with refuses(*words, file=tmp_path / "a" / name) as error:
        adapter_facts(tmp_path / "a")
    assert ("pickle" in str(error.value)) == (case == "pickled")


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "down_proj"]])
def test_an_adapter_for_another_base_is_named_before_weights_load(targets, tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "a", targets=targets)
    models.check_fits(adapter, adapter_facts(adapter), str(tiny_base))
    config = json.loads((tiny_base / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 512, "head_dim": 128}))
    with refuses("lora_", "512", "trained on", str(tiny_base), "MODEL=", file=adapter):
        models.check_fits(adapter, adapter_facts(adapter), str(other))
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with refuses("layers.2|layers.3", "no layer", str(tiny_base), "MODEL=", file=adapter):
        models.check_fits(adapter, adapter_facts(adapter), str(other))
    of_no_base = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(of_no_base))
    with refuses("layers.2|layers.3", "another base|other base", "MODEL=", file=adapter):
        models.check_fits(adapter, adapter_facts(adapter), str(other))


def test_an_adapter_with_other_target_modules(tiny_base, adapters, tmp_path):
    other = tmp_path / "a"
    shutil.copytree(adapters["lora"], other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name.replace("q_proj", "w_q"): tensor for name, tensor in tensors.items()}, other / "adapter_model.safetensors"
    )
    with refuses("w_q.lora_A.weight", "no layer", "MODEL=", file=other):
        models.check_fits(other, adapter_facts(other), str(tiny_base))


def test_an_adapter_by_its_hub_id(adapters, tmp_path, monkeypatch):
    """From the hub's cache as a download leaves it; what is neither there nor a folder is named."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with refuses("folder", "hub", file="ADAPTER=owner/adapter"):
        resolve_adapter("owner/adapter")
    kept = tmp_path / "models--owner--adapter"
    shutil.copytree(adapters["dora"], kept / "snapshots" / ("1" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1" * 40)
    folder = resolve_adapter("owner/adapter")
    assert adapter_facts(folder) == adapter_facts(adapters["dora"])


def test_a_base_that_is_not_there(tmp_path):
    with refuses("load", "hub id", "HF_TOKEN", file=tmp_path / "nothing"):
        models.load_config(str(tmp_path / "nothing"))
    with refuses("tokenizer", "load", file=tmp_path / "nothing"):
        models.load_tokenizer(str(tmp_path / "nothing"), None, "saved")


@pytest.mark.parametrize(
    ("file", "load", "words"),
    [
        ("model.safetensors", lambda model: models.load_base(model, 16), ["load", "fetch"]),
        ("tokenizer.json", lambda model: models.load_tokenizer(model, None, "raw"), ["tokenizer", "load"]),
        ("config.json", models.load_config, ["load", "hub id"]),
    ],
)
def test_a_base_that_is_cut_short(tiny_base, tmp_path, file, load, words):
    shutil.copytree(tiny_base, tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_bytes(path.read_bytes()[:-200])
    with refuses(*words, file=tmp_path / "base"):
        load(str(tmp_path / "base"))


def test_prompts(tiny_base, adapters, tmp_path):
    """Saved beside the adapter, then the base's; FinLoRA's two by name; none at all is an error."""
    question = [{"role": "user", "content": "Up or down?"}]

    def prompt(tokenizer):
        return tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)

    bare = AutoTokenizer.from_pretrained(tiny_base)
    assert bare.chat_template is None
    with refuses("chat template", "PROMPT=finlora_inst", "raw"):
        models.load_tokenizer(str(tiny_base), adapters["dora"], "saved")
    assert prompt(models.load_tokenizer(str(tiny_base), None, "raw")) == "<|begin_of_text|>Up or down?"
    inst = prompt(models.load_tokenizer(str(tiny_base), None, "finlora_inst"))
    assert inst == "<|begin_of_text|>[INST] Up or down? [/INST]"
    beside = tmp_path / "a"
    shutil.copytree(adapters["dora"], beside)
    bare.chat_template = "{{ messages[0]['content'] }}!"
    bare.save_pretrained(beside)
    assert prompt(models.load_tokenizer(str(tiny_base), beside, "saved")) == "Up or down?!"
    assert prompts() == ["saved", "finlora_inst", "raw"]


@pytest.fixture(scope="module")
def ask(tiny_base, adapters):
    """Answers of the tiny model with its DoRA adapter merged; returns (answers, lm)."""
    from lm_eval.api.instance import Instance

    model = models.attach(models.load_base(tiny_base, 16), adapters["dora"])
    tokenizer = models.load_tokenizer(str(tiny_base), None, "raw")

    def call(texts, batch_tokens=300, tokenizer=tokenizer, **options):
        options = {"max_gen_toks": 6, "do_sample": False} | options
        requests = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)]
        lm = harness.BatchedHFLM(model, tokenizer, batch_tokens)
        return lm.generate_until(requests, disable_tqdm=True), lm

    call.model, call.tokenizer = model, tokenizer
    return call


TEXTS = ["<|begin_of_text|>" + "profit rose and " * n + "the share" for n in (1, 30, 2, 80, 3, 7, 7, 1, 55, 4)]


@pytest.fixture
def batches(monkeypatch):
    """For each batch, of every prompt its shared prefix and how many tokens it has beyond."""
    lengths, answer = [], harness.generate

    def record(model, tokenizer, ids, *options):
        *_, prefixes, kept = options
        lengths.append([(tuple(row[:size]), len(row) - size) for row, size in zip(ids, prefixes, strict=True)])
        return answer(model, tokenizer, ids, *options)

    monkeypatch.setattr(harness, "generate", record)
    return lengths


@pytest.mark.parametrize("instruction", ["", "What is the sentiment of this news? Choose one of negative, positive: "])
def test_batches_of_many_lengths_answer_as_one_prompt_at_a_time(ask, batches, instruction):
    """Their common beginning is computed once, or all of a prompt but its last token where one begins another."""
    texts = [text.replace("|>", f"|>{instruction}") for text in TEXTS]
    answers, many = ask(texts)
    assert sum(map(len, batches)) == len(texts) and len(batches) < len(texts)
    for batch in batches:
        prefixes, own = {prefix for prefix, _ in batch}, max(own for _, own in batch)
        assert len(batch) == 1 or sum(map(len, prefixes)) + len(batch) * (own + 6) <= 300
    alone, one = ask(texts, batch_tokens=1)
    assert answers == alone and many.tokens == one.tokens
    for text in texts:
        assert many.tokens[text][0] == len(ask.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_an_answer_ends_where_its_end_is_and_no_later(ask, monkeypatch):
    """A token that the model does write is declared an end: nothing is computed or kept after it."""
    whole, lm = ask(TEXTS[:1])
    assert lm.tokens[TEXTS[0]][1:] == (6, False)
    ids = ask.tokenizer(TEXTS[0], add_special_tokens=False, return_tensors="pt")
    written = ask.model.generate(**ids, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    end = next(place for place in range(1, 5) if written[place] not in written[:place])
    monkeypatch.setattr(ask.model.generation_config, "eos_token_id", [written[end]])
    calls = []
    hook = ask.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    answers, lm = ask(TEXTS[:1])
    hook.remove()
    assert answers == [ask.tokenizer.decode(written[:end])]
    assert lm.tokens[TEXTS[0]][1:] == (end + 1, True) and len(calls) == end + 1


@pytest.mark.parametrize(("text", "count"), [("", "no"), ("<|begin_of_text|>" * 2, "2"), ("<|begin_of_text|>", None)])
def test_a_prompt_that_begins_twice_or_not_at_all_is_warned_of(ask, text, count, capsys):
    ask([f"{text}profit rose"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(count)
    if count:
        says(warnings[0], f"{count} <|begin_of_text|>", "template", "PROMPT=")


TEMPLATE = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"


@pytest.mark.parametrize(
    ("eos", "template", "eot_tokens", "ends"),
    [
        ("<|end_of_text|>", TEMPLATE, (), ["<|end_of_text|>", "<|eot_id|>"]),
        ("<|end_of_text|>", "{{ messages[0].content }}", ["<|eot_id|>"], ["<|end_of_text|>", "<|eot_id|>"]),
        ("<|eot_id|>", TEMPLATE, ["<|no such token|>"], ["<|eot_id|>"]),
    ],
)
def test_what_ends_an_answer_is_asked_of_template_recipe_tokenizer_and_model(
    eos, template, eot_tokens, ends, tiny_base, tmp_path
):
    """And what is saved stops there too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    model = models.load_base(str(tiny_base), 16)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|end_header_id|>")]
    expected = sorted(tokenizer.convert_tokens_to_ids([*ends, "<|end_header_id|>"]))
    assert models.end_tokens(model, tokenizer, eot_tokens) == expected
    models.save(model, tokenizer, tmp_path, eot_tokens)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.generation_config.eos_token_id == expected and not saved.generation_config.do_sample


def test_stop_words_cut_an_answer(ask):
    whole = ask(TEXTS)[0]
    stop = next(text[2:4] for text in whole if len(text) > 4)
    answers, lm = ask(TEXTS, until=[stop])
    assert answers == [text.split(stop)[0] for text in whole] != whole
    assert all(lm.tokens[prompt][2] for prompt, text in zip(TEXTS, whole, strict=True) if stop in text)


def test_batches_shrink_where_memory_does_not_suffice(ask, batches, monkeypatch):
    expected, fits = ask(TEXTS)[0], harness.generate

    def answer(model, tokenizer, ids, *options):
        if len(ids) > 3:
            raise torch.OutOfMemoryError
        return fits(model, tokenizer, ids, *options)

    monkeypatch.setattr(harness, "generate", answer)
    batches.clear()
    assert ask(TEXTS, batch_tokens=3000)[0] == expected
    assert max(map(len, batches)) in (2, 3)


def test_likelihoods_in_batches_are_those_of_one_request_at_a_time(ask, monkeypatch):
    """Of long and short contexts, each with several continuations; batches hold what the budget takes."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(text, end) for text in TEXTS for end in (" A", " B", " rose again")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    alone = HFLM(pretrained=ask.model, tokenizer=ask.tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    sizes, call = [], HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", lambda lm, ids, **more: sizes.append(ids.shape) or call(lm, ids, **more))
    together = harness.BatchedHFLM(ask.model, ask.tokenizer, 300).loglikelihood(requests, disable_tqdm=True)
    assert [right for _, right in together] == [right for _, right in alone]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-4)
    assert any(rows > 1 for rows, _ in sizes) and all(rows == 1 or rows * width <= 300 for rows, width in sizes)


def test_a_prompt_that_the_model_cannot_take_is_named_not_cut(ask):
    with refuses("20,", "16,384", "TASKS="):
        ask(["profit " * 20000])


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(ask, tiny_base):
    """A token of its own for padding does no harm; one in a prompt cannot be looked up."""
    tokenizer = models.load_tokenizer(str(tiny_base), None, "raw")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    known = ask.model.get_input_embeddings().num_embeddings
    assert tokenizer.pad_token_id == known
    assert ask(TEXTS, tokenizer=tokenizer)[0] == ask(TEXTS)[0]
    with refuses("tokenizer", f"token {known:,}", f"{known:,} tokens", "MODEL="):
        ask(["<|begin_of_text|>rose<|pad|>"], tokenizer=tokenizer)


def test_4bit_weights_are_not_repacked_under_an_adapter(tiny_base, adapters, monkeypatch):
    """As on a CPU with AVX-512 BF16, whatever this one is: bitsandbytes repacks there what PEFT reads afterwards."""
    from bitsandbytes.nn import modules
    from peft.tuners.lora import dora

    # As before the repair; monkeypatch puts back what it made.
    for owner, name in ((dora, "dequantize_module_weight"), (dora.DoraLinearLayer, "forward")):
        now = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(now, "__wrapped__", now))
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    peft_int8.patch()
    base = models.load_base(tiny_base, 4, keep_quantised=True)
    layers = [module for module in base.modules() if isinstance(module, modules.Linear4bit)]
    packed = [layer.weight.clone() for layer in layers]
    kept = models.attach(base, adapters["dora"])
    first = logits(kept)
    assert layers and all(torch.equal(layer.weight, before) for layer, before in zip(layers, packed, strict=True))
    merged = models.attach(models.load_base(tiny_base, 4), adapters["dora"])
    assert (first - logits(merged)).abs().max() < rounding_of(merged, 4) and torch.equal(first, logits(kept))


def test_evaluations_that_share_a_gpu_take_their_part_of_its_memory(monkeypatch):
    """Two bytes a number; of Qwen3's head_dim, which is not its width over its heads: 2 x 36 x 8 x 128 in the cache."""
    config = dict(num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    model = SimpleNamespace(config=SimpleNamespace(**config, hidden_size=2560, intermediate_size=9728, vocab_size=9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 2**30, 80 * 2**30))
    a_token = 2 * (2 * 36 * 8 * 128 + 10 * 2560 + 3 * 9728)
    assert harness.batch_tokens(model) == 20 * 2**30 // a_token
    monkeypatch.setenv("FINLORA_POINTS_PER_GPU", "8")
    assert harness.batch_tokens(model) == 20 * 2**30 // 8 // a_token
