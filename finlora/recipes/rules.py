"""What a recipe must say beyond axolotl's own schema, and the keys that are refused (docs/refused.md lists them)."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from finlora.core.errors import UserError

ONLY_SFT = "only supervised fine-tuning of a language model is checked, evaluated and merged here; remove it"
NO_UPLOAD = "nothing is uploaded while training; remove it, and run `make publish` afterwards"
ONE_RANK = "every adapted layer has the same rank and alpha here; remove it and set lora_r and lora_alpha"
NOT_MERGED = "it trains weights that merging would lose; remove it"
NOT_UNDONE = "it changes the base's weights, which merging cannot undo; remove it"
ONE_BASE = "evaluation and merging load the base as it is published, which would be another model; remove it"
ONE_QUANTIZATION = "evaluation and merging quantize as load_in_8bit and load_in_4bit say; remove it"
ONE_VOCABULARY = "the embeddings keep their size; remove it and use tokens that the tokenizer has"
ONE_TOKENIZER = "evaluation and merging use the base's own tokenizer; remove it"
ALL_ROWS = "every row of a file must train; remove it and take rows out of the file instead"
# Keys that axolotl would obey, too late, or into a model that is not this adapter on its base; and what to do instead.
REFUSED = {
    "rl": ONLY_SFT,
    "reward_model": ONLY_SFT,
    "process_reward_model": ONLY_SFT,
    "num_labels": ONLY_SFT,
    "pretraining_dataset": "rows are chat messages, under datasets; `make data FILE=` writes such rows",
    "streaming": "rows are read whole, so that each is accounted for; remove it",
    "val_set_size": "remove it and name validation rows under test_datasets; `make data FILE=` makes that file",
    "dataset_exact_deduplication": ALL_ROWS,
    "dataset_shard_num": ALL_ROWS,
    "min_sample_len": ALL_ROWS,
    "default_system_message": "axolotl writes it into no template; write it into the rows or a template of your own",
    "hub_model_id": NO_UPLOAD,
    "push_dataset_to_hub": NO_UPLOAD,
    "lora_target_linear": "list the modules in lora_target_modules and remove it",
    "lora_target_parameters": "list linear layers in lora_target_modules and remove it",
    "lora_rank_pattern": ONE_RANK,
    "lora_alpha_pattern": ONE_RANK,
    "peft_trainable_token_indices": NOT_MERGED,
    "unfrozen_parameters": NOT_MERGED,
    "fix_untrained_tokens": NOT_UNDONE,
    "relora": NOT_UNDONE,
    "peft": NOT_UNDONE,  # LoftQ
    "reinit_weights": ONE_BASE,
    "peft_layer_replication": ONE_BASE,
    "base_model_config": ONE_BASE,
    "cls_model_config": ONE_BASE,
    "model_config": ONE_BASE,
    "model_kwargs": ONE_BASE,
    "scaling_softmax": ONE_BASE,
    "model_revision": "evaluation and merging take the latest; fetch the revision to a folder, for base_model",
    "gptq": ONE_QUANTIZATION,
    "bnb_config_kwargs": ONE_QUANTIZATION,
    "model_quantization_config": ONE_QUANTIZATION,
    "qat": ONE_QUANTIZATION,
    "quantization": ONE_QUANTIZATION,
    "tokens": ONE_VOCABULARY,
    "resize_token_embeddings_to_32x": ONE_VOCABULARY,
    "shrink_embeddings": ONE_VOCABULARY,
    "tokenizer_config": ONE_TOKENIZER,
    "tokenizer_type": ONE_TOKENIZER,
    "tokenizer_use_mistral_common": ONE_TOKENIZER,
}
REFUSED_OF_ROWS = {  # in an entry of datasets or test_datasets
    "shards": ALL_ROWS,
    "preprocess_shards": ALL_ROWS,
    "data_files": "name one file with path, and each further one in an entry of its own",
    "message_property_mappings": "a message has role and content here; `make data FILE=` writes such rows",
}
# PEFT's that leave the base as it is. PiSSA, OLoRA, CorDA and LoftQ subtract from its weights what A and B begin with.
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal")
MOST_LAYERS = 200  # of any Llama; a base model of unknown sizes may have so many


def must(hold: Callable[[Any], Any], remedy: str) -> AfterValidator:
    """Refuse a value for which `hold` is false. remedy: how the error goes on after `key 'x' is 0; `."""

    def check(value: Any) -> Any:
        if not hold(value):
            raise ValueError(remedy)
        return value

    return AfterValidator(check)


def one_of(*values: Any, remedy: str) -> AfterValidator:
    return must(lambda value: value in values, remedy)


AboveZero = Annotated[float, must(lambda number: number > 0, "give it a value above 0")]
Share = Annotated[float, must(lambda share: 0 <= share < 1, "give it a value of at least 0 and below 1")]
Kernel = Annotated[
    bool | None, one_of(False, remedy="axolotl's LoRA kernels train DoRA with a stale norm (0.19.0); set it to false")
]


class Rows(BaseModel):
    """An entry of `datasets` or `test_datasets`: a file of conversations, one a line."""

    path: str
    type: Annotated[Any, one_of("chat_template", remedy="`make data FILE=` writes any rows for type: chat_template")]
    ds_type: Annotated[Any, one_of(None, "json", remedy="rows are lines of JSON; `make data FILE=` writes them")] = None
    split: Annotated[Any, one_of(None, "train", remedy=ALL_ROWS)] = None
    field_messages: Annotated[Any, one_of(None, "messages", remedy="call that field messages in the rows")] = None


class Keys(BaseModel):
    """What checks, evaluation and merging read. Axolotl has a default for most; a recipe states them."""

    load_in_8bit: bool
    load_in_4bit: bool
    adapter: str
    peft_use_dora: bool
    peft_use_rslora: bool
    output_dir: str
    dataset_prepared_path: str
    lora_r: AboveZero
    lora_alpha: AboveZero
    lora_dropout: Share
    lora_target_modules: Any
    peft_init_lora_weights: Annotated[Any, one_of(*INITIALISATIONS, remedy=NOT_UNDONE)] = None
    lr_groups: Any = None
    chat_template: Any = None
    chat_template_jinja: Any = None
    datasets: list[Rows]
    test_datasets: list[Rows] | None = None
    sequence_len: AboveZero
    micro_batch_size: AboveZero
    gradient_accumulation_steps: AboveZero
    num_epochs: AboveZero
    learning_rate: AboveZero

    @field_validator("load_in_4bit")
    @classmethod
    def one_precision(cls, four_bit: bool, info: ValidationInfo) -> bool:
        if four_bit and info.data.get("load_in_8bit"):
            raise ValueError("load_in_8bit is true as well; keep one")
        return four_bit

    @field_validator("adapter")
    @classmethod
    def adapter_for_bits(cls, adapter: str, info: ValidationInfo) -> str:
        # With load_in_4bit and `adapter: lora` axolotl (0.19.0) trains a base that is not quantized.
        if adapter != (expected := "qlora" if info.data.get("load_in_4bit") else "lora"):
            raise ValueError(f"set {expected}: it is qlora with load_in_4bit: true and lora without")
        return adapter

    @field_validator("lora_target_modules")
    @classmethod
    def layers_of_the_base(cls, targets: Any, info: ValidationInfo) -> list[str]:
        if not isinstance(targets, list) or not targets:
            raise ValueError("write a list, as in [q_proj, v_proj]")
        layers = info.context["layers"]
        for number, target in enumerate(targets):
            if target in targets[:number]:
                raise ValueError(f"{target} is listed twice; keep one")
            if layers and target not in layers:
                raise ValueError(f"{target} is none of {', '.join(layers)}")
        return targets

    @field_validator("chat_template_jinja")
    @classmethod
    def template_that_is_read(cls, template: Any, info: ValidationInfo) -> Any:
        if template and info.data.get("chat_template") not in (None, "jinja"):
            raise ValueError(f"axolotl takes chat_template: {info.data['chat_template']} instead; set that to jinja")
        return template

    @field_validator("lr_groups")
    @classmethod
    def groups_of_trained_parameters(cls, groups: Any, info: ValidationInfo) -> Any:
        """Axolotl ignores a module of `lr_groups` that no trained parameter has in its name."""
        targets, dora = info.data.get("lora_target_modules", []), info.data.get("peft_use_dora")
        parts = ["lora_A", "lora_B", *["lora_magnitude_vector"] * bool(dora)]
        blocks = [f"layers.{layer}.{module}" for layer in range(MOST_LAYERS) for module in ("self_attn", "mlp")]
        trained = [
            f"base_model.model.model.{block}.{target}.{part}.default.weight"
            for block in blocks
            for target in targets
            for part in parts
        ]
        for module in (module for group in groups or [] for module in group["modules"]):
            if not any(module in name for name in trained):
                if "magnitude" in module and not dora:
                    raise ValueError(f"LoRA has no {module}; take a recipe with DoRA")
                raise ValueError(
                    f"{module} is in the name of nothing that is trained; take a part of {trained[0]}, say "
                    f"{', '.join([*targets, *parts])}"
                )
        return groups


class DoraKeys(Keys):
    """With DoRA axolotl's own kernels must be off; left out, it switches them on by itself."""

    model_config = ConfigDict(validate_default=True)

    lora_qkv_kernel: Kernel = None
    lora_mlp_kernel: Kernel = None
    lora_o_kernel: Kernel = None
    lora_embedding_kernel: Kernel = None


def validate(source: str, keys: dict[str, Any], layers: list[str]) -> None:
    """Raise UserError for the first key that is refused, missing, or has a value that would not train as it says.

    source: what the error begins with, a recipe's path or a sweep's file and point. layers: those of one block of the
    base model, which an adapter may target; none where they are not known.
    """
    refused = [(key, remedy) for key, remedy in REFUSED.items() if keys.get(key)]
    for kind in ("datasets", "test_datasets"):
        for number, entry in enumerate(keys.get(kind) or []):
            refused += [(f"{kind}.{number}.{key}", remedy) for key, remedy in REFUSED_OF_ROWS.items() if entry.get(key)]
    for key, remedy in refused:
        raise UserError(f"{source}: key '{key}': {remedy}")
    model = DoraKeys if keys.get("peft_use_dora") else Keys
    try:
        model.model_validate(keys, context={"layers": layers})
    except ValidationError as error:
        raise UserError(f"{source}: {_sentence(error.errors(include_url=False)[0])}") from None


def _sentence(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"key '{key}' is missing; give it a value"
    value, remedy = json.dumps(error["input"], default=str), error["msg"].removeprefix("Value error, ")
    return f"key '{key}' is {value}; {remedy}" if len(value) < 60 else f"key '{key}': {remedy}"
