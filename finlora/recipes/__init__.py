"""Recipes: their names, strict loading, base models, memory, and what holds across all of them."""
