"""What axolotl trains on: the tokens and the loss mask of prepared rows, through axolotl's own loader and recipes.

The expected tokens are put together here by hand from the chat format, not by a template.
"""

import json
import os
from itertools import islice
from pathlib import Path

import pytest
import yaml

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from finlora.data.prepare import Options, prepare
from finlora.data.rows import read_rows
from finlora.data.tasks import load_tasks

pytestmark = pytest.mark.xdist_group("axolotl")

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"
SHARED = ROOT.parent / "shared" / "finlora" / "data"
REAL = {"financebench": 86, "formula": 800}  # train rows that could be had
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]
# How Llama-3 cuts text before byte-pair encoding; a blank line and the word after it are never one token.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FILES = {"datasets": "train.jsonl", "test_datasets": "validation.jsonl"}
FEW = ["ner", "reporting_multi"]  # a task and a mixture; the others' recipes say the same (tested below)
AWKWARD = [
    ("Is it up?", "yes"),
    ("Profit of 5 € – «Société Générale» 📈 株価", "増加 📈"),
    ("How much? Answer: ", "15092.44"),
    ("How many?", "0"),
    ("First line\n\nsecond line\n\n", "A: one\n\nB: two"),
    ("Repeat: yes", "Repeat: yes"),
    ("assistant", "yes"),
    ("Who asks?", "user"),
    ("[INST] Is it up? [/INST]", "[INST]"),
    ("{{ messages }} {% raw %}", "{{ bos_token }}"),
    ('Quote "this" \\ and\tthat', '"'),
    ("us-gaap tags, in order.", "DebtInstrumentFaceAmount,Revenues,,LeaseCost"),
    ("long " * 900, "word " * 300 + "end"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer with Llama-3's words and special tokens, saved beside a model's shape."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row.context for path in sorted(SAMPLE.glob("train/*.jsonl")) for row in read_rows(path)]
    bare.train_from_iterator([*texts, "\n\n" * 50], trainer)
    bare.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], bare.token_to_id(SPECIAL[0]))]
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaConfig(vocab_size=3000, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", model_max_length=131072
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def recipe(task: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / f"{task}_r8_dora.yaml").read_text(encoding="utf-8"))


def load(tokenizer, folder: Path, sources: dict[str, tuple[str, dict]]) -> dict[str, dict]:
    """Per prepared folder its rows as axolotl loads, tokenises and filters them: {folder name: {file name: rows}}.

    One call for all of them, each with its recipe's dataset entry: axolotl starts a process pool for every file saved.
    """
    from axolotl.loaders.tokenizer import load_tokenizer
    from axolotl.utils.config import validate_config
    from axolotl.utils.data import prepare_datasets
    from axolotl.utils.dict import DictDefault

    settings, entries = {}, {"datasets": [], "test_datasets": []}
    for name, (task, options) in sources.items():
        raw = options.pop("raw", None)
        prepare(task, raw, folder / name, Options(**options))
        settings = recipe(task)
        for key, file in FILES.items():
            entries[key].append(settings[key][0] | {"path": str(folder / name / file)})
    settings |= entries
    settings["base_model"] = settings["base_model_config"] = settings["tokenizer_config"] = tokenizer.name_or_path
    settings["dataset_prepared_path"] = str(folder / "tokenised")
    settings["sequence_len"] = 65536  # this small tokenizer needs more tokens than Llama-3's; nothing may be cut
    del settings["plugins"]  # they change layers, and no model is loaded here
    # Packing only decides which rows share a batch; without it the rows come back one by one and in order.
    settings |= {"sample_packing": False, "eval_sample_packing": False, "shuffle_merged_datasets": False}
    # The recipe is for one such GPU; this loads no model, so it needs none.
    gpu = {"n_gpu": 1, "n_node": 1, "compute_capability": "sm_80", "bf16": True, "tf32": True}
    checked = validate_config(DictDefault(settings), capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})
    checked.dataset_num_proc = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXOLOTL_IS_PREPROCESS", "1")  # as `axolotl preprocess` does: no count of steps, which needs a GPU
        train, validation, _, _ = prepare_datasets(checked, load_tokenizer(checked))

    loaded = {}
    for file, dataset in ("train.jsonl", iter(train)), ("validation.jsonl", iter(validation)):
        for name in sources:
            count = len((folder / name / file).read_text(encoding="utf-8").splitlines())
            loaded.setdefault(name, {"folder": folder / name})[file] = list(islice(dataset, count))
        assert next(dataset, None) is None
    return loaded


def expected(tokenizer, context: str, target: str) -> tuple[list[int], list[int]]:
    """Prompt and answer tokens of the Llama-3 chat format, whose template trims both texts."""
    prompt = (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{context.strip()}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    answer = f"{target.strip()}<|eot_id|>"
    return (
        tokenizer.encode(prompt, add_special_tokens=False),
        tokenizer.encode(answer, add_special_tokens=False),
    )


def check(tokenizer, prepared: dict) -> None:
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for name in "train.jsonl", "validation.jsonl":
        with open(prepared["folder"] / name, encoding="utf-8") as file:
            messages = [[message["content"] for message in json.loads(line)["messages"]] for line in file]
        assert len(prepared[name]) == len(messages) > 0
        for row, (context, target) in zip(prepared[name], messages, strict=True):
            prompt, answer = expected(tokenizer, context, target)
            assert row["input_ids"] == prompt + answer
            assert row["labels"] == [-100] * len(prompt) + answer
            assert row["labels"][-1] == end and row["labels"].count(end) == 1
            assert tokenizer.decode(answer[:-1]) == target.strip()  # the whole answer, and nothing else, is learnt


def chat(number: int) -> list[dict[str, str]]:
    texts = "Be brief.", f"What is {number}?", f"{number} itself", "And twice?", str(2 * number)
    roles = "system", "user", "assistant", "user", "assistant"
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@pytest.fixture(scope="module")
def trained_on(tokenizer, tmp_path_factory):
    """A few tasks' sample rows, the awkward ones, and the real ones where they are at hand."""
    folder = tmp_path_factory.mktemp("tokens")
    own = folder / "own.jsonl"
    rows = [{"context": context, "target": target} for context, target in AWKWARD]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = {task: (task, {"raw": SAMPLE}) for task in FEW}
    sources["awkward"] = "cfa", {"file": str(own), "any_label": True}
    chats = folder / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": chat(number)}) + "\n" for number in range(10)), encoding="utf-8")
    sources["chats"] = "cfa", {"file": str(chats), "any_label": True}
    if SHARED.is_dir():
        sources["real"] = "financebench", {"raw": SHARED}
    return load(tokenizer, folder, sources)


@pytest.mark.parametrize("task", FEW)
def test_sample_rows(task, tokenizer, trained_on):
    check(tokenizer, trained_on[task])


@pytest.mark.slow
def test_all_rows_at_hand(tokenizer, tmp_path):
    sources = {task: (task, {"raw": SAMPLE}) for task in load_tasks()}
    if SHARED.is_dir():
        sources |= {f"real {task}": (task, {"raw": SHARED}) for task in REAL}
    loaded = load(tokenizer, tmp_path, sources)
    for rows in loaded.values():
        check(tokenizer, rows)
    for task in REAL:
        if f"real {task}" in loaded:
            assert sum(len(loaded[f"real {task}"][file]) for file in FILES.values()) == REAL[task]


def test_every_tasks_recipe_reads_its_prepared_rows_in_the_same_way():
    ways = set()
    for task in load_tasks():
        settings = recipe(task)
        for key, file in FILES.items():
            (entry,) = settings[key]
            assert entry.pop("path") == f"data/prepared/{task}/{file}"
        whole = {key: settings.get(key) for key in (*FILES, "chat_template", "chat_template_jinja", "train_on_inputs")}
        ways.add(json.dumps(whole, sort_keys=True))
    assert len(ways) == 1


def test_real_rows(tokenizer, trained_on):
    if not SHARED.is_dir():
        pytest.skip("FinLoRA's files are not beside the project")
    assert sum(len(trained_on["real"][file]) for file in FILES.values()) == REAL["financebench"]
    check(tokenizer, trained_on["real"])


def test_awkward_rows(tokenizer, trained_on):
    rows = trained_on["awkward"]
    assert len(rows["train.jsonl"]) + len(rows["validation.jsonl"]) == len(AWKWARD)
    check(tokenizer, rows)


def test_a_chat_trains_on_each_of_its_answers(tokenizer, trained_on):
    rows = trained_on["chats"]
    for name in FILES.values():
        with open(rows["folder"] / name, encoding="utf-8") as file:
            chats = [json.loads(line)["messages"] for line in file]
        assert len(chats) == len(rows[name]) > 0
        for row, turns in zip(rows[name], chats, strict=True):
            ids, labels = tokenizer.encode("<|begin_of_text|>", add_special_tokens=False), [-100]
            for turn in turns:
                head = f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n"
                head, text = (
                    tokenizer.encode(part, add_special_tokens=False) for part in (head, f"{turn['content']}<|eot_id|>")
                )
                ids += head + text
                labels += [-100] * len(head) + (text if turn["role"] == "assistant" else [-100] * len(text))
            assert (row["input_ids"], row["labels"]) == (ids, labels)
