"""FinLoRA's fine-tuning runs: recipes, data, training, evaluation, export, and the `finlora` command."""
