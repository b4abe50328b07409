"""Training a recipe: checks, the run's folder, distributed launch, tracking."""
