"""Trains with TRL's SFTTrainer or with Unsloth, as bench/peers.py asks: python -m bench.sft <settings.yaml>.

It imports everything and then waits for its turn, a line on its standard input. The settings: tool (trl or unsloth),
bits (16, 8 or 4), dora, base, rows and output_dir (paths), steps, Unsloth's tokens of a pack or TRL's batch of rows.
What is not set here is the tool's default. Dropout is 0: Unsloth's kernels want it, and PEFT's DoRA saves a matmul.
"""

import os
import sys
from pathlib import Path
from typing import Any

import yaml

LONGEST = 4096  # tokens, of a row; none is as long
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def main() -> None:
    settings = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if settings["tool"] == "unsloth":
        import unsloth  # noqa: F401  before all that it patches
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    from bench.clock import clock

    sys.stdin.readline() or sys.exit(1)
    trainer = {"trl": of_trl, "unsloth": of_unsloth}[settings["tool"]](settings)
    bos, pad = trainer.processing_class.bos_token_id, trainer.processing_class.pad_token_id

    def count(inputs: dict[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"]
        return torch.stack([(ids == bos).sum(), (ids != pad).sum()])  # a row begins with the only one it has

    trainer.add_callback(clock(trainer, count))
    trainer.train()


def of_trl(settings: dict[str, Any]):
    """Padded batches of rows of about one length: TRL warns of packing without the package flash-attn.

    The loss is TRL's default, which skips positions without a label, as Liger's does not; other kernels are Liger's.
    """
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTTrainer

    quantization = {
        16: None,
        8: BitsAndBytesConfig(load_in_8bit=True),
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    }[settings["bits"]]
    if torch.cuda.is_available():
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    model = AutoModelForCausalLM.from_pretrained(
        settings["base"],
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        quantization_config=quantization,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    return SFTTrainer(
        model,
        args=of_both(settings, **by_length(settings), gradient_checkpointing=False),
        train_dataset=rows(settings),
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
        peft_config=LoraConfig(**LORA, use_dora=settings["dora"], task_type="CAUSAL_LM"),
    )


def of_unsloth(settings: dict[str, Any]):
    """Packs, which Unsloth runs through torch's varlen attention, or padded batches where `batch` says of how many."""
    import torch
    from trl import SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        settings["base"],
        max_seq_length=settings.get("tokens", LONGEST),
        dtype=torch.bfloat16,
        load_in_4bit=settings["bits"] == 4,
        load_in_8bit=settings["bits"] == 8,
        load_in_16bit=settings["bits"] == 16,
        use_gradient_checkpointing=False,
    )
    adapter = LORA | ({"use_dora": True} if settings["dora"] else {})
    model = FastLanguageModel.get_peft_model(model, **adapter, bias="none", use_gradient_checkpointing=False)
    if "batch" in settings:
        config = of_both(settings, **by_length(settings), padding_free=False)
    else:
        config = of_both(settings, max_length=settings["tokens"], packing=True, per_device_train_batch_size=1)
    return SFTTrainer(model, args=config, train_dataset=rows(settings), processing_class=tokenizer)


def by_length(settings: dict[str, Any]) -> dict[str, Any]:
    """Padded batches of rows of about one length."""
    batch = {"per_device_train_batch_size": settings["batch"], "train_sampling_strategy": "group_by_length"}
    return batch | {"max_length": LONGEST}


def of_both(settings: dict[str, Any], **own: Any):
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=settings["output_dir"],
        max_steps=settings["steps"],
        learning_rate=1e-4,
        warmup_steps=10,
        optim="adamw_torch_fused",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        seed=42,
        **own,
    )


def rows(settings: dict[str, Any]):
    """Conversations as TRL takes them, prompt and completion; the loss is then on the completion."""
    from datasets import load_dataset

    loaded = load_dataset("json", data_files=settings["rows"], split="train", cache_dir=os.environ["HF_DATASETS_CACHE"])
    return loaded.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns=["messages"]
    )


if __name__ == "__main__":
    main()
