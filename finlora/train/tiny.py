"""A Llama small enough for a CPU, built from nothing but text: tokenizer, shape, and a little language modelling.

It stands in for the 8B base wherever a recipe is tried without a GPU. Same architecture, same special tokens and chat
template as Llama-3.1-Instruct, so that every line of a recipe but its sizes is exercised.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from finlora.core.errors import UserError
from finlora.core.paths import ROOT, SAMPLE
from finlora.core.progress import progress

CACHE = ROOT / ".cache"
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, CONTEXT = 4096, 256, 4, 4, 2, 16384
STEPS, BATCH, LENGTH, LEARNING_RATE = 150, 8, 128, 2e-3


def sample_texts() -> list[str]:
    """The prompts of all sample train rows, without their answers."""
    files = sorted((SAMPLE / "train").glob("*.jsonl"))
    return [json.loads(line)["context"] for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def build(texts: list[str]) -> Path:
    """The folder of the tiny base model for these texts; built once, then found again by their content.

    Deterministic on one machine. Raises UserError when there is no text to learn from.
    """
    if not texts:
        raise UserError("no text to build the tiny base model from; give rows with a context")
    digest = hashlib.sha256(Path(__file__).read_bytes() + "\0".join(texts).encode()).hexdigest()[:12]
    folder = CACHE / f"tiny-{digest}"
    if folder.is_dir():
        return folder
    print(f"building the tiny base model in {os.path.relpath(folder)} (once)", file=sys.stderr, flush=True)
    CACHE.mkdir(exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=CACHE, prefix=".tiny-"))
    try:
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(beside)
        _train_model(tokenizer, texts).save_pretrained(beside)
        beside.chmod(0o755)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else: another process built the same model meanwhile
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def link(folder: Path) -> None:
    """Point `.cache/tiny`, the base model that the demo recipe names, at this folder."""
    beside = CACHE / f".tiny-link-{os.getpid()}"
    beside.symlink_to(folder.name)
    beside.replace(CACHE / "tiny")


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY):
    """A byte-level BPE tokenizer of these texts with Llama-3.1's special tokens, at most `vocabulary` tokens in all."""
    # Late, as torch below: the model is mostly there already, and each takes a second or more.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return as_llama(tokenizer)


def as_llama(tokenizer):
    """A `tokenizers.Tokenizer` that has Llama-3.1's special tokens as transformers takes it, used as Llama uses it."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def _train_model(tokenizer, texts: list[str]):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).train()
    turns = [f"{SPECIAL[2]}user{SPECIAL[3]}\n\n{text.strip()}{SPECIAL[4]}" for text in texts]
    rows = [ids[: 4 * LENGTH] for ids in tokenizer(turns)["input_ids"]]
    stream = torch.tensor([token for row in rows for token in row])
    stream = stream.repeat(-(-(LENGTH + 2) // len(stream)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    with progress("tiny base model", "step") as show:
        for step in range(STEPS):
            starts = torch.randint(0, len(stream) - LENGTH, (BATCH,))
            batch = torch.stack([stream[start : start + LENGTH] for start in starts])
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            show(step + 1, STEPS, f"loss {loss.item():.2f}")
    return model.eval()


def main() -> None:
    folder = build(sample_texts())
    link(folder)
    print(folder)


if __name__ == "__main__":
    main()
