"""Checkpoints on disk, of our own kind and of others: find, read, write, convert, and their tokenizers."""
