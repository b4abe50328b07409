"""Folders as `make train` leaves them, with adapters that nobody had to train: B and magnitudes are drawn at random.

tests/test_readme.py merges one that axolotl trained.
"""

import json
from pathlib import Path

import yaml
from test_eval_models import make_adapter

from finlora.core.files import sha256
from finlora.core.provenance import git_state, versions
from finlora.recipes import load as recipes
from finlora.recipes import names as recipe_names

RECIPES = {16: "sentiment_bf16_r8_dora", 8: "sentiment_r8_dora", 4: "sentiment_4bit_r4_lora"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def finished_run(outputs: Path, name: str, base: Path) -> Path:
    """outputs/<name> for one of the recipes, on the tiny base; its rows stand beside it."""
    from transformers import AutoTokenizer

    recipe, parts = recipes.load(recipe_names.RECIPES / f"{name}.yaml").keys, recipe_names.parse_name(name)
    out = outputs / name
    make_adapter(base, out, parts["method"], parts["r"], recipe["lora_target_modules"], parts["alpha"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    rows = outputs / "rows.jsonl"
    turns = [(f"Shares of company {i} rose {i} percent.", "up" if i % 2 else "down") for i in range(20)]
    lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for key in ("datasets", "test_datasets"):
        recipe[key] = [recipe[key][0] | {"path": str(rows)}]
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"base_model": str(base)}), encoding="utf-8")
    record = {
        "recipe": name,
        "tiny": True,
        "base_model": str(base),
        "args": [],
        "adapter": {
            "file": f"outputs/{name}/adapter_model.safetensors",
            "sha256": sha256(out / "adapter_model.safetensors"),
        },
        "data": {str(rows): sha256(rows)},
        "data_from": "own",
        "metrics": {"steps": 12, "seconds": 3.5, "final_loss": 2.5, "final_eval_loss": 2.75},
        "versions": versions(),
        "git": git_state(),
        "device": "a CPU",
    }
    (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return out
