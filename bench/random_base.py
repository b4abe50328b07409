"""A checkpoint with the shape of Llama-3.1-8B and random weights, for measuring speed and memory where the real one
is not at hand: python -m bench.random_base <tokenizer> <folder to write> (16 GB; a minute on a GPU).

The tokenizer is Llama-3's own, of the package llama-models, where `llama-3` is said or a tokenizer.model named, else a
folder's. --tiny keeps tokenizer and chat template and makes the model small enough for a CPU. Six channels of each norm
weigh 20, as in real checkpoints, whose outlier channels LLM.int8 spends time on.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finlora.core.errors import UserError, run
from finlora.data import tokens
from finlora.train.tiny import as_llama

OUTLIERS = [11, 402, 977, 1903, 2650, 3777]
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def read_tokenizer(name: str):
    """Llama-3's tokenizer (`llama-3`, or its tokenizer.model), or that of a folder. UserError where there is none."""
    if name != "llama-3" and not name.endswith(".model"):
        return AutoTokenizer.from_pretrained(name)
    path = tokens.tokenizer_of(tokens.LLAMA) if name == "llama-3" else Path(name)
    if path is None:
        raise UserError("llama-3: the package llama-models is not here; pip install it, or name a folder")
    tokenizer = as_llama(tokens.read_tokenizer(path))
    tokenizer.model_max_length = 131072
    # What the recipes train with. Llama-3.1's own on the Hub puts a system turn with dates before it.
    from axolotl.utils.chat_templates import get_chat_template

    tokenizer.chat_template = get_chat_template("llama3")
    return tokenizer


def make_base(tokenizer: str, out: Path, layers: int = 32, tiny: bool = False) -> None:
    """Write a model and its tokenizer into a folder."""
    tokenizer = read_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=128256,
        num_hidden_layers=2 if tiny else layers,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(TINY if tiny else SHAPE),
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.normal_(0, 0.02)
        elif "layernorm" in name:
            weight.data[[channel % config.hidden_size for channel in OUTLIERS]] = 20.0
    model.save_pretrained(out, max_shard_size="4GB")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tokenizer", help="llama-3, a tokenizer.model, or a folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a model small enough for a CPU")
    options = parser.parse_args()
    make_base(options.tokenizer, options.out, options.layers, options.tiny)


if __name__ == "__main__":
    run(main)
