"""Recipes: one training stage as a record (``record``), and every stage by name (``catalog``). Loads nothing heavy."""
