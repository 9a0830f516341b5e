"""Training: objectives, and one loop that runs a recipe. Importing this package loads nothing heavy."""
