"""The emoji world of the embedded models: art, scenes with exact ground truth, captions, questions, edits, riddles.

Goes in: three npm packages of emoji drawings (see ``art.prepare``). Comes out: deterministic, indexable datasets
(``dataset``), a tokenizer (``tokenizer``), and an evaluation (``score``) whose judge no network trains (``judge``).
Importing this package is cheap: it loads neither torch nor the art.
"""
