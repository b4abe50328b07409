"""What ends an answer, and that training's prompt is the served one: with axolotl's own prompt strategies."""

import json
import os
from pathlib import Path

import pytest
from failures import refuses

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault

from fastdora.plugin import prompts
from fastdora.plugin.keys import RecipeError

pytestmark = pytest.mark.xdist_group("axolotl")

LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]"]
ROW = [{"role": "user", "content": "Sales rose."}, {"role": "assistant", "content": "positive"}]
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def make_tokenizer(special: list[str], eos: str, bos: str | None = None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(["Sales rose. positive negative neutral user assistant"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token=bos, eos_token=eos)


def configured(tokenizer, file: Path, **keys) -> DictDefault:
    """A recipe of one file of rows as axolotl has it; the tokenizer gets its template, as from axolotl's loader."""
    entry = {"path": str(file), "type": "chat_template", "ds_type": "json"} | keys.pop("entry", {})
    cfg = DictDefault({"datasets": [entry], "sequence_len": 512} | keys)
    tokenizer.chat_template = get_chat_template_from_config(cfg=cfg, tokenizer=tokenizer)
    return cfg


@pytest.fixture
def rows(tmp_path):
    def write(*conversations: list[dict[str, str]]) -> Path:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations or [ROW]))
        return file

    return write


INSTRUCT, BASE = (LLAMA, "<|eot_id|>", LLAMA[0]), (LLAMA, "<|end_of_text|>", LLAMA[0])
RIGHT = {
    "llama3, whose eos is its end of turn": (INSTRUCT, {"chat_template": "llama3"}, "<|eot_id|>"),
    "llama3 on the base model, told": (BASE, {"chat_template": "llama3", "eot_tokens": ["<|eot_id|>"]}, "<|eot_id|>"),
    "chatml": ((QWEN, "<|im_end|>"), {"chat_template": "chatml"}, "<|im_end|>"),
    "mistral": ((MISTRAL, "</s>", "<s>"), {"chat_template": "mistral_v3_tekken"}, "</s>"),
    "a template of ours": (
        INSTRUCT,
        {"chat_template": "jinja", "chat_template_jinja": str(RECIPES / "prompts" / "finlora_inst.jinja")},
        "<|eot_id|>",
    ),
    "the prompt's labels too": (INSTRUCT, {"chat_template": "llama3", "train_on_inputs": True}, "<|eot_id|>"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_trained_as_it_is_served_passes(case, rows):
    made, keys, end = RIGHT[case]
    tokenizer = make_tokenizer(*made)
    cfg = configured(tokenizer, rows(ROW, ROW + ROW, [{"role": "system", "content": "Be brief."}, *ROW][:3]), **keys)
    if "mistral" in case or "ours" in case:  # these have no place for a system message, or for two turns alike
        cfg = configured(tokenizer, rows(ROW, ROW + ROW), **keys)
    prompts.check(cfg, tokenizer, "mine.yaml")
    assert prompts.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.convert_tokens_to_ids(end) in prompts.end_of_turn_tokens(tokenizer)


WRONG = {
    "llama3 on the base model": (BASE, {"chat_template": "llama3"}, ["<|eot_id|>", "eot_tokens"]),
    "chatml on a base of Qwen's": ((QWEN, "<|endoftext|>"), {"chat_template": "chatml"}, ["<|im_end|>", "eot_tokens"]),
    "an end that is not trained": (
        INSTRUCT,
        {"chat_template": "llama3", "entry": {"train_on_eos": "none"}},
        ["<|eot_id|>", "train_on_eos"],
    ),
    "the end of another turn": (
        BASE,
        {"chat_template": "llama3", "eot_tokens": ["<|end_of_text|>"]},
        ["<|eot_id|>", "eot_tokens"],
    ),
    "chatml on Llama": (  # axolotl gives the entry this template
        INSTRUCT,
        {"chat_template": "chatml", "entry": {"chat_template": "tokenizer_default"}},
        ["no answer would end", "llama3"],
    ),
    "qwen3 on Llama": (INSTRUCT, {"chat_template": "qwen3"}, ["llama3"]),
    "qwen3": ((QWEN, "<|im_end|>"), {"chat_template": "qwen3"}, ["<think>", "choose a template", "chatml"]),
    "qwen3 with an argument that serving does not have": (
        (QWEN, "<|im_end|>"),
        {"chat_template": "qwen3", "chat_template_kwargs": {"enable_thinking": False}},
        ["<think>", "choose a template"],
    ),
    "rows with another template than the saved one": (
        (LLAMA + QWEN, "<|eot_id|>", LLAMA[0]),
        {"chat_template": "llama3", "eot_tokens": ["<|im_end|>"], "entry": {"chat_template": "chatml"}},
        ["<|im_start|>", "<|start_header_id|>", "choose a template"],
    ),
    "a template that needs a token": (
        (LLAMA, "<|eot_id|>"),
        {"chat_template": "llama3"},
        ["bos_token", "special_tokens"],
    ),
    "only the questions train": (
        INSTRUCT,
        {"chat_template": "llama3", "entry": {"roles_to_train": ["user"], "train_on_eos": "none"}},
        ["no token", "roles_to_train"],
    ),
}


KEYS = {  # the key that the error names, where it is not chat_template
    "llama3 on the base model": "eot_tokens",
    "chatml on a base of Qwen's": "eot_tokens",
    "the end of another turn": "eot_tokens",
    "an end that is not trained": "datasets.0.train_on_eos",
    "rows with another template than the saved one": "datasets.0.chat_template",
    "only the questions train": "datasets.0.roles_to_train",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_never_end_or_is_served_otherwise_is_refused(case, rows):
    made, keys, words = WRONG[case]
    tokenizer = make_tokenizer(*made)
    file = rows()
    cfg = configured(tokenizer, file, **keys)
    key = KEYS.get(case, "chat_template")
    with refuses(*words, error=RecipeError, file="mine.yaml", key=key) as error:
        prompts.check(cfg, tokenizer, "mine.yaml")
    assert f"mine.yaml: key '{key}': {file}:1: " in str(error.value)


@pytest.mark.parametrize("row", ['{"context": "a", "target": "b"}', '{"messages": []}', "5"])
def test_a_row_without_messages_is_named_with_the_key_that_has_them(row, rows):
    tokenizer = make_tokenizer(*INSTRUCT)
    file = rows()
    file.write_text(f"{row}\n")
    cfg = configured(tokenizer, file, chat_template="llama3")
    words = f"{file}:1", "'messages'", "list"
    with refuses(*words, error=RecipeError, file="mine.yaml", key="datasets.0.field_messages"):
        prompts.check(cfg, tokenizer, "mine.yaml")


def test_an_answer_whose_first_token_joins_the_prompt_is_named_with_its_line(rows):
    """Mistral's first template writes ' ' + answer: before a digit that space is a token which is never asked for."""
    tokenizer = make_tokenizer(MISTRAL, "</s>", "<s>")
    number = [ROW[0], {"role": "assistant", "content": "15.0"}]
    file = rows(ROW, number)
    cfg = configured(tokenizer, file, chat_template="mistral_v1")
    with refuses(
        f"{file}:2", "[/INST] ", "choose a template", error=RecipeError, file="mine.yaml", key="chat_template"
    ):
        prompts.check(cfg, tokenizer, "mine.yaml")


def test_the_tokens_that_end_an_answer_are_those_of_template_tokenizer_and_recipe():
    tokenizer = make_tokenizer([*LLAMA, "<|eom_id|>"], "<|end_of_text|>", LLAMA[0])
    ids = tokenizer.convert_tokens_to_ids
    assert prompts.end_of_turn_tokens(tokenizer) == [ids("<|end_of_text|>")]
    tokenizer.chat_template = get_chat_template_from_config(cfg=DictDefault({"chat_template": "llama3"}))
    assert prompts.end_of_turn_tokens(tokenizer) == [ids("<|end_of_text|>"), ids("<|eot_id|>")]
    assert prompts.end_of_turn_tokens(tokenizer, ["<|eom_id|>", "<|none|>"]) == [
        ids(token) for token in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    ]
    tokenizer.chat_template = "{{ raise_exception('no place') }}"
    assert prompts.end_of_turn_tokens(tokenizer) == [ids("<|end_of_text|>")]
