"""The emoji world of the embedded models: art, scenes with exact ground truth, captions, questions, edits, riddles.

In: three npm packages of emoji drawings (`art.prepare`). Out: deterministic, indexable datasets (`dataset`), a
tokenizer (`tokenizer`), and an evaluation (`score`) whose judge no network trains (`judge`).
"""
