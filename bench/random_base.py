"""A checkpoint with the shape of Llama-3.1-8B and random weights, for measuring speed and memory where the real one
is not at hand: python -m bench.random_base <tokenizer folder> <folder to write> (16 GB; a minute on a GPU).

Six channels of each norm weigh 20, as in real checkpoints, whose outlier channels LLM.int8 spends time on.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

OUTLIERS = [11, 402, 977, 1903, 2650, 3777]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=options.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.normal_(0, 0.02)
        elif "layernorm" in name:
            weight.data[OUTLIERS] = 20.0
    model.save_pretrained(options.out, max_shard_size="4GB")
    for file in options.tokenizer.glob("*token*"):
        shutil.copy(file, options.out)


if __name__ == "__main__":
    main()
