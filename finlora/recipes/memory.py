"""The GPU memory that a recipe takes, and what to set so that it fits."""

from typing import Any

from finlora.core.machine import GIB
from finlora.recipes import bases


def memory_parts(recipe: dict[str, Any], shape: dict[str, Any]) -> dict[str, float]:
    """GiB that training takes on one GPU at its peak, by what takes them; their sum is `memory_estimate`.

    weights: at their bits, embeddings and head in 16 bits. adapter: with gradients and two moments in float32.
    activations: in 16 bits what each layer keeps for the backward pass (or its input alone, with gradient
    checkpointing, and one layer in full), and what one layer's backward pass needs besides. logits: of answers, taken
    as one token in 32.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    linears = bases.linear_layers(shape)
    bits = 8 if recipe.get("load_in_8bit") else 4.13 if recipe.get("load_in_4bit") else 16
    tables = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    linear = sum(i * o for i, o in linears.values()) * layers
    tokens = recipe["sequence_len"] * recipe["micro_batch_size"]
    targets = recipe["lora_target_modules"]
    # Kept: two norms' inputs, the first one's output, q, k, v, the attention's output, gate and up; by adapters the
    # inputs that nothing else keeps, and under DoRA each product before it is scaled.
    one_layer = 5 * hidden + 2 * linears["k_proj"][1] + 2 * inner
    one_layer += hidden * bool({"gate_proj", "up_proj"} & set(targets)) + inner * ("down_proj" in targets)
    if recipe.get("peft_use_dora"):
        one_layer += sum(linears[name][1] for name in targets)
    kept = one_layer + hidden * layers if recipe.get("gradient_checkpointing") else one_layer * layers
    positions = tokens / 32 if recipe.get("fastdora_answers_only") else tokens
    parts = {
        "weights": linear * bits / 8 + tables * 2,
        "adapter": bases.trainable_parameters(recipe, shape) * 16,
        "activations": tokens * (kept + 3 * inner) * 2,
        "logits": positions * shape["vocab_size"] * 10,
    }
    return {name: size / GIB for name, size in parts.items()}


def memory_estimate(recipe: dict[str, Any], shape: dict[str, Any]) -> float:
    """GiB that training takes on one GPU at its peak; within 5% of finlora/plan/train_throughput.json."""
    return sum(memory_parts(recipe, shape).values())


def what_fits(
    recipe: dict[str, Any],
    shape: dict[str, Any],
    free: float,
    written: dict[str, Any] | None = None,
    longest: int = 0,
) -> str:
    """The keys to set so that the recipe takes at most `free` GiB: recomputation, then shorter packs, more a step.

    written: the recipe as its file has it, where `recipe` is what several GPUs make of it; a step keeps its tokens.
    longest: the longest row's tokens, where they are known; a shorter pack would be refused it.
    """
    changes: dict[str, Any] = {"gradient_checkpointing": True}
    length, written = recipe["sequence_len"], written or recipe
    a_step = written["sequence_len"] * written["gradient_accumulation_steps"]
    while memory_estimate(recipe | changes, shape) > free and length // 2 >= max(512, longest):
        length //= 2
        changes |= {"sequence_len": length, "gradient_accumulation_steps": a_step // length}
    new = {key: value for key, value in changes.items() if written.get(key) != value}
    if memory_estimate(recipe | changes, shape) > free:
        return "take a recipe of fewer bits"
    return "set " + " and ".join(f"{key}: {str(value).lower()}" for key, value in new.items())


def on_cpu(shape: dict[str, Any]) -> bool:
    """Whether a base model of this shape is small enough to train on a CPU."""
    matrices = sum(inputs * outputs for inputs, outputs in bases.linear_layers(shape).values())
    return matrices * shape["num_hidden_layers"] < 100_000_000
