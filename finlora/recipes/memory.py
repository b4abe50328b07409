"""The GPU memory that a recipe takes, and what to set so that it fits."""

from typing import Any

from finlora.core.machine import GIB
from finlora.recipes import bases

# Bytes, where the recipe's own bits do not decide them.
HALF = 2  # a bfloat16 weight or activation
TRAINED = 16  # a trained parameter in float32: itself, its gradient, and Adam's two moments
WHOLE = 8  # one of lora_modules_to_save, which axolotl (0.19.0) trains in bfloat16: the same four
LOGITS = 10  # a logit: in bfloat16, in float32 for the loss, and the float32 gradient
NF4_BITS = 4.13  # 4 bits and an absmax for 64 weights, quantized itself to 8 bits (arXiv 2305.14314, section 3)
# One token in so many is taken to have a label, for every task; the estimate is within 5% of the measured runs with it.
TOKENS_PER_LABEL = 32
# MLP widths that one layer's backward pass holds besides what was kept: gradients of gate, up and their product.
BACKWARD_WIDTHS = 3
QK_NORMS = ("qwen3",)  # architectures with norms of queries and keys
CARDS = (16, 24, 40, 48, 80, 141, 180)  # GB that GPUs have
SPARE = 0.93  # of a card's memory: the driver, the libraries and fragments take the rest
SHORTEST_PACK = 512  # tokens: no shorter pack is proposed
# What a process that keeps a part of the weights holds whole at a time. FSDP2: the embeddings and head, and of the
# layers the one that computes and the next. ZeRO-3: so many weights (DeepSpeed's stage3_max_live_parameters).
FSDP_LAYERS = 2
ZERO_LIVE = 1e9


def weight_bytes(recipe: dict[str, Any], shape: dict[str, Any]) -> tuple[float, float]:
    """Of the layers at their bits, and of embeddings and head in 16 bits."""
    bits = 8 if recipe.get("load_in_8bit") else NF4_BITS if recipe.get("load_in_4bit") else 16
    return bases.linear_parameters(shape) * bits / 8, bases.embedding_parameters(shape) * HALF


def gathered_bytes(recipe: dict[str, Any], shape: dict[str, Any]) -> float:
    """Of weights that a process which keeps a part of them holds whole at a time."""
    layers, embeddings = weight_bytes(recipe, shape)
    if recipe.get("fsdp_config"):
        return embeddings + layers * min(1, FSDP_LAYERS / shape["num_hidden_layers"])
    parameters = bases.linear_parameters(shape) + bases.embedding_parameters(shape)
    return (layers + embeddings) * min(1, ZERO_LIVE / parameters)


def memory_parts(recipe: dict[str, Any], shape: dict[str, Any], share: float = 1) -> dict[str, float]:
    """GiB that training takes on one GPU at its peak, by what takes them; their sum is `memory_estimate`.

    share: of the weights that each GPU keeps (distributed.weight_share). weights: what it keeps of them, and what it
    gathers. loading: what 8- and 4-bit weights take beyond the rest before they are shared out, since each process
    loads them all on its GPU. adapter: with gradients and two moments in float32.
    activations: what each layer keeps in 16 bits for the backward pass (or its input alone, with gradient
    checkpointing, and one layer in full), and what one layer's backward pass needs besides. logits: of answers, taken
    as one token in 32.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    linears, (query, kv) = bases.linear_layers(shape), bases.attention_widths(shape)
    whole = sum(weight_bytes(recipe, shape))
    tokens = recipe["sequence_len"] * recipe["micro_batch_size"]
    targets = bases.targets(recipe, shape)
    adapter = bases.adapter_parameters(recipe, shape).values()
    # Kept, in widths: 3 hidden (two norms' inputs and the first norm's output), q and the attention's output, k and v,
    # Qwen3's q and k before their norms, and 2 inner (gate and up). By adapters the inputs that nothing else keeps, and
    # under DoRA each matmul's output before the magnitude scales it.
    one_layer = 3 * hidden + 2 * query + 2 * kv + 2 * inner
    one_layer += (query + kv) * (shape.get("model_type") in QK_NORMS)
    one_layer += hidden * bool({"gate_proj", "up_proj", "gate_up_proj"} & set(targets)) + inner * (
        "down_proj" in targets
    )
    if recipe.get("peft_use_dora"):
        one_layer += sum(linears[name][1] for name in targets)
    kept = one_layer + hidden * layers if recipe.get("gradient_checkpointing") else one_layer * layers
    positions = tokens / TOKENS_PER_LABEL if recipe.get("fastdora_answers_only") else tokens
    parts = {
        "weights": min(whole, whole * share + gathered_bytes(recipe, shape)) if share < 1 else whole,
        "adapter": sum((one.a_and_b + one.magnitude) * TRAINED + one.whole * WHOLE for one in adapter),
        "activations": tokens * (kept + BACKWARD_WIDTHS * inner) * HALF,
        "logits": positions * shape["vocab_size"] * LOGITS,
    }
    if share < 1 and (recipe.get("load_in_8bit") or recipe.get("load_in_4bit")):
        parts["loading"] = max(0.0, whole - sum(parts.values()))
    return {name: size / GIB for name, size in parts.items()}


def memory_estimate(recipe: dict[str, Any], shape: dict[str, Any], share: float = 1) -> float:
    """GiB that training takes on one GPU at its peak; within 5% of finlora/plan/train_throughput.json."""
    return sum(memory_parts(recipe, shape, share).values())


def memory_line(recipe: dict[str, Any], shape: dict[str, Any]) -> str:
    """The comment at the top of a recipe that says what memory it takes, on the smallest card with SPARE to spare."""
    needs = [memory_estimate(recipe | changes, shape) for changes in ({}, {"gradient_checkpointing": True})]
    sizes = [next((f"{card} GB" for card in CARDS if need <= card * SPARE), "several GPUs") for need in needs]
    (most, least), (large, small) = (max(1, round(need)) for need in needs), sizes
    on = large if large == "several GPUs" else f"a GPU of {large}"
    return f"# Memory: about {most} GiB ({on}), {least} with gradient_checkpointing: true ({small})."


def what_fits(
    recipe: dict[str, Any],
    shape: dict[str, Any],
    free: float,
    written: dict[str, Any] | None = None,
    longest: int = 0,
    share: float = 1,
) -> str:
    """What to set so that the recipe takes at most `free` GiB: gradient checkpointing, then more, shorter packs a step.

    written: the recipe as in its file, where `recipe` is as distributed processes run it; a step keeps its tokens.
    longest: the longest row's tokens, where they are known; a shorter pack would be refused it. share: as in
    `memory_parts`.
    """
    changes: dict[str, Any] = {"gradient_checkpointing": True}
    length, written = recipe["sequence_len"], written or recipe
    a_step = written["sequence_len"] * written["gradient_accumulation_steps"]
    while memory_estimate(recipe | changes, shape, share) > free and length // 2 >= max(SHORTEST_PACK, longest):
        length //= 2
        changes |= {"sequence_len": length, "gradient_accumulation_steps": a_step // length}
    new = {key: value for key, value in changes.items() if written.get(key) != value}
    if memory_estimate(recipe | changes, shape, share) > free:
        is_quantized = recipe.get("load_in_8bit") or recipe.get("load_in_4bit")
        return "take a recipe of fewer bits" + ", or FSDP=2 on more GPUs" * (not is_quantized)
    return "set " + " and ".join(f"{key}: {str(value).lower()}" for key, value in new.items())


def on_cpu(shape: dict[str, Any]) -> bool:
    """Whether a base model of this shape is small enough to train on a CPU."""
    return bases.linear_parameters(shape) < 100_000_000
