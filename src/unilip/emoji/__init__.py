"""The emoji world of the embedded models: art, scenes with exact ground truth, captions, questions, edits, riddles."""
