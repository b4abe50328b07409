"""The plugin's own recipe keys, typed, for axolotl's schema."""

from typing import Literal

from pydantic import BaseModel, Field


class FastDoraArgs(BaseModel):
    """Keys of `plugins: [fastdora.FastDoraPlugin]`."""

    fastdora_layers: Literal["fast", "peft"] = Field(
        default="fast",
        json_schema_extra={"description": "fast: fastdora's LoRA and DoRA layers; peft: PEFT's own, for comparison"},
    )
    fastdora_fp8: bool = Field(
        default=False,
        json_schema_extra={"description": "Multiply 8-bit weights and activations in e4m3 with row scales (Hopper)"},
    )
    fastdora_answers_only: bool = Field(
        default=True, json_schema_extra={"description": "Apply the head and the loss where a label is, and only there"}
    )
    fastdora_graphs: bool = Field(
        default=False,
        json_schema_extra={
            "description": "Run the decoder as two CUDA graphs, forward and backward (packs, no gradient checkpointing)"
        },
    )
    fastdora_shared_prefixes: bool = Field(
        default=False,
        json_schema_extra={"description": "Compute a prefix that rows of a pack share, such as an instruction, once"},
    )
    fastdora_rows_per_prefix: int | None = Field(
        default=None,
        json_schema_extra={
            "description": "Rows of one prefix that are drawn together, and the most in a pack; null: rows are drawn "
            "as if they shared nothing, and share where they meet"
        },
    )
