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
