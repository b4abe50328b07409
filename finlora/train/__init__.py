"""Training a recipe: checks, the run's folder, several GPUs, tracking."""
