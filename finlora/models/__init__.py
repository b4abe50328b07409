"""Base models and adapters, loaded and held against each other."""
