"""Models for evaluation: a base at 16, 8 or 4 bits, an adapter held against it, and lm-eval's view of both.

An adapter is merged into the base *as it was trained on*: 8- and 4-bit weights are quantised as in training, widened to
16 bits, and DoRA's W' = m (W0 + s B A) / ||W0 + s B A|| (arXiv 2402.09353, eq. 5) is folded in float32, a layer at a
time. Generation then runs at the speed of the plain model. `keep_quantised` leaves 8- and 4-bit weights as they are,
for cards that 16 bits do not fit, and caches DoRA's norms instead.
"""

import json
import os
from pathlib import Path
from typing import Any

from tools import recipes
from tools.checks import read_json, sha256
from tools.cli import UserError

PROMPTS = recipes.RECIPES / "prompts"
CPU_BATCH_TOKENS = 8192
LARGEST_BATCH = 1024


def prompts() -> list[str]:
    """What PROMPT= may name: the template that is saved beside the adapter, and those of recipes/prompts."""
    return ["saved", *sorted(path.stem for path in PROMPTS.glob("*.jinja"))]


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What an adapter folder says of itself: base, method, r, alpha, sha256. UserError where it is not a whole one."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder; train one, or name a PEFT folder or hub id with ADAPTER=")
    for path in (config, weights):
        if not path.is_file():
            bins = " (pickled weights are not loaded)" if (folder / "adapter_model.bin").is_file() else ""
            raise UserError(f"{folder}: holds no {path.name}{bins}; name the folder of a finished PEFT adapter")
    found = read_json(config)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise UserError(f"{config}: is not the configuration of a LoRA or DoRA adapter; name a PEFT folder")
    shapes = tensor_shapes(weights)
    magnitudes = any(name.endswith(("lora_magnitude_vector", "lora_magnitude_vector.weight")) for name in shapes)
    if bool(found.get("use_dora")) != magnitudes:
        said = "says use_dora: true and the weights hold no magnitudes" if not magnitudes else "does not say use_dora"
        raise UserError(f"{config}: {said}; magnitudes would be lost in silence, so save the adapter again")
    method = "dora" if magnitudes else "rslora" if found.get("use_rslora") else "lora"
    return {
        "base": found.get("base_model_name_or_path"),
        "method": method,
        "r": found.get("r"),
        "alpha": found.get("lora_alpha"),
        "sha256": sha256(weights),
    }


def tensor_shapes(weights: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file; UserError where it is cut short or is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: cannot be read ({error}); fetch or train the adapter again") from error


def check_fits(adapter: Path, model: str) -> None:
    """UserError that names the first tensor that does not fit, for another base's adapter. Loads no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(load_config(model))
    modules, parameters = dict(skeleton.named_modules()), dict(skeleton.named_parameters())
    for name, shape in tensor_shapes(adapter / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if not part:
            expected = list(parameters[layer].shape) if layer in parameters else None
        elif layer not in modules or not hasattr(modules[layer], "in_features"):
            expected = None
        else:
            wide, long, r = modules[layer].in_features, modules[layer].out_features, min(shape)
            expected = {"A": [r, wide], "B": [long, r], "m": [long]}.get(part[0], shape)
        if expected != shape:
            need = (
                f"is {_times(shape)} where {model} takes {_times(expected)}" if expected else f"is no layer of {model}"
            )
            base = adapter_facts(adapter)["base"] or "another base"
            raise UserError(f"{adapter}: {name} {need}; it was trained on {base}: name that with MODEL=")


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def load_config(model: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model}: cannot be loaded ({_first_line(error)}); give a folder, or a hub id with HF_TOKEN set"
        ) from error


def load_tokenizer(model: str, adapter: Path | None, prompt: str):
    """The tokenizer saved beside the adapter, else the base's, with the prompt wanted as its chat template."""
    from transformers import AutoTokenizer

    beside = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    source = str(adapter) if beside else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # every file format has errors of its own
        raise UserError(f"{source}: its tokenizer cannot be loaded ({_first_line(error)})") from error
    if prompt not in prompts():
        raise UserError(f"PROMPT={prompt}: there are {', '.join(prompts())}")
    if prompt != "saved":
        tokenizer.chat_template = (PROMPTS / f"{prompt}.jinja").read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UserError(f"{source}: its tokenizer has no chat template; choose a prompt: PROMPT={prompts()[1]} or raw")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: str, bits: int, keep_quantised: bool = False):
    """The base model in evaluation mode, on the GPU where there is one, in bfloat16 (float32 on a CPU).

    bits: 8 and 4 quantise the linear layers as the recipes do (LLM.int8 rows; NF4 with double quantisation).
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from fastdora import peft_int8, products

    peft_int8.mend()
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            quantization_config=products.quantisation(bits, dtype),
            device_map={"": "cuda:0" if gpu else "cpu"},
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(f"{model}: does not fit on the GPU; free it, or set BITS=4 KEEP_QUANTISED=1") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{model}: cannot be loaded ({_first_line(error)}); fetch it again") from error
    if bits != 16 and not keep_quantised:
        loaded = loaded.dequantize(dtype=dtype)
    return loaded.eval()


def attach(model, adapter: Path):
    """The model with its adapter merged; on layers that are still quantised attached, with DoRA's norms cached.

    Raises UserError unless every tensor of the file, magnitudes included, is found in the model afterwards: adapters
    that are loaded another way lose them without a word.
    """
    import torch
    from peft import PeftModel
    from peft.helpers import DoraCaching
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = PeftModel.from_pretrained(model, adapter).eval()
    loaded = get_peft_model_state_dict(adapted)
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if name not in loaded or not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise UserError(f"{adapter}: {name} did not reach the model; it would be scored without it")
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    if any(not layer.get_base_layer().weight.is_floating_point() for layer in layers):
        DoraCaching()(enabled=True)
        return adapted
    for layer in layers:
        weight = layer.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge()
        weight.data = weight.data.to(dtype)
    return adapted.unload()


def harness(model, tokenizer, batch_tokens: int | None = None):
    """lm-eval's model around ours; `tokens` maps a prompt to its tokens, its answer's, and whether the answer ended.

    Prompts go in order of length, as many at a time as `batch_tokens` tokens take, fewer where memory does not suffice.
    lm-eval's own "auto" tries out full-length batches first, which takes 100 times as long as a short prompt's answer.
    """
    import logging

    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= known:  # an adapter's tokenizer may have one of its own; no token attends to it
        tokenizer.pad_token = tokenizer.eos_token

    class Model(HFLM):
        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            asked = [request.args for request in requests]
            ids = tokenizer([prompt for prompt, _ in asked], add_special_tokens=False)["input_ids"]
            if (largest := max(map(max, ids))) >= known:
                raise UserError(
                    f"the tokenizer has a token {largest:,} and the model {known:,} tokens: they do not belong "
                    "together; name the adapter's own base with MODEL="
                )
            answers = [""] * len(asked)
            left = sorted(range(len(asked)), key=lambda place: (json.dumps(asked[place][1]), -len(ids[place])))
            tokens = batch_tokens or _batch_tokens(model)
            with tqdm(total=len(asked), desc="answers", disable=disable_tqdm) as bar:
                while left:
                    given = asked[left[0]][1]
                    options = normalize_gen_kwargs(given)
                    longest = len(ids[left[0]]) + options["max_gen_toks"]
                    if longest > self.max_length:
                        raise UserError(
                            f"a prompt and its answer take {longest:,} tokens and the model {self.max_length:,}; leave "
                            "the set out with TASKS="
                        )
                    batch = [place for place in left[: _batch_size(tokens, longest)] if asked[place][1] == given]
                    try:
                        found = _answers(model, tokenizer, [ids[place] for place in batch], options)
                    except torch.OutOfMemoryError:
                        if len(batch) == 1:
                            raise
                        found = None
                    if found is None:  # out of the except block, which holds on to the tensors
                        tokens = longest * len(batch) // 2
                        torch.cuda.empty_cache()
                        continue
                    for place, (text, length, ended) in zip(batch, found, strict=True):
                        answers[place] = text
                        self.tokens[asked[place][0]] = len(ids[place]), length, ended
                        self.cache_hook.add_partial("generate_until", asked[place], text)
                    bar.update(len(batch))
                    left = left[len(batch) :]
            return answers

        def _detect_batch_size(self, *_, **__) -> int:
            return 0  # so that the schedule below decides, for likelihoods

        def _batch_scheduler(self, position: int, requests: tuple) -> int:
            if position == 0 or position == self.next_batch:
                longest = len(self.tok_encode("".join(requests[position][0])))
                self.size = _batch_size(batch_tokens or _batch_tokens(model, logits=True), longest)
                self.next_batch = position + self.size
            return self.size

    lm = Model(pretrained=model, tokenizer=tokenizer, batch_size="auto", backend="causal")
    lm.tokens = {}
    return lm


def _answers(model, tokenizer, ids: list[list[int]], options: dict[str, Any]) -> list[tuple[str, int, bool]]:
    """Greedy answers to tokenised prompts: text, tokens with the end, and whether there was one (else it was cut).

    What all prompts begin with, an instruction mostly, is computed once. `options` are lm-eval's: max_gen_toks, until.
    """
    import torch
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from transformers import DynamicCache

    width = max(map(len, ids))
    shared = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1) if len(ids) > 1 else 0
    gaps = [width - len(row) for row in ids]
    rows = [row[:shared] + [tokenizer.pad_token_id] * gap + row[shared:] for row, gap in zip(ids, gaps, strict=True)]
    there = [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps]
    inputs = {
        "input_ids": torch.tensor(rows, device=model.device),
        "attention_mask": torch.tensor(there, device=model.device),
    }
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    until = options["until"]
    with torch.no_grad():
        if shared:
            cache = DynamicCache(config=model.config)
            model(inputs["input_ids"][:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(ids))
            inputs["past_key_values"] = cache
        out = model.generate(
            **inputs,
            max_new_tokens=options["max_gen_toks"],
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=stop_sequences_criteria(tokenizer, until, width, len(ids)) if until else None,
        )
    found = []
    for row in out[:, width:].tolist():
        length = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        stops = [place for place in map(text.find, until) if place >= 0]
        found.append((text[: min(stops, default=None)], length, row[length - 1] in ends or bool(stops)))
    return found


def _batch_size(tokens: int, longest: int) -> int:
    return max(1, min(LARGEST_BATCH, tokens // longest))


def _batch_tokens(model, logits: bool = False) -> int:
    """Prompt tokens that fit at once: half of the free memory, for keys and values, a layer's activations, logits."""
    import torch

    if not torch.cuda.is_available():
        return CPU_BATCH_TOKENS
    torch.cuda.empty_cache()
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cached = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 2
    passing = (10 * config.hidden_size + 3 * config.intermediate_size + 3 * logits * config.vocab_size) * 2
    return max(1024, int(torch.cuda.mem_get_info()[0] / 2 / (cached + passing)))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def resolve_adapter(adapter: str) -> Path:
    """The folder of an adapter that is given as a folder or as a hub id (configuration, weights and tokenizer only)."""
    if Path(adapter).exists() or adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(adapter, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"ADAPTER={adapter}: is neither a folder nor to be had from the hub ({_first_line(error)})"
        ) from error


def template_sha256(tokenizer) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()
