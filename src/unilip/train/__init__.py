"""Training: recipes (records), objectives, and one loop. Importing this package loads nothing heavy."""
