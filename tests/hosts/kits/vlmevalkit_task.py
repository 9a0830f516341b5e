"""A checkout of VLMEvalKit: its own run.py, through ours, on three local questions with answers to choose from."""

import base64
import json
import os
import sys
from pathlib import Path

import pandas

path, place = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
(place / "data").mkdir(parents=True, exist_ok=True)
os.environ["LMUData"] = str(place / "data")  # noqa: SIM112 the kit spells it so
picture = base64.b64encode(path.read_bytes()).decode()
rows = {
    "index": [0, 1, 2], "image": [picture] * 3, "question": ["What is in the picture?"] * 3,
    "A": ["a panda", "a car", "a panda"], "B": ["a car", "a panda", "a star"], "answer": ["A", "B", "A"],
    "category": ["animals"] * 3,
}  # fmt: skip
pandas.DataFrame(rows).to_csv(place / "data" / "OwnTiny.tsv", sep="\t", index=False)

sys.path.insert(0, os.getcwd())  # as `python -m unilip.eval.vlmevalkit` does in the checkout
from unilip.eval.vlmevalkit import main  # noqa: E402  after the kit's environment is set

main(f"--data OwnTiny --model UniLIP --work-dir {place / 'out'} --judge exact_matching".split())
answers = pandas.read_excel(max((place / "out").rglob("UniLIP_OwnTiny.xlsx")))["prediction"].tolist()
scores = pandas.read_csv(max((place / "out").rglob("*_acc.csv"))).iloc[0].to_dict()
print(json.dumps({"version": "checkout", "answer": answers, "right": float(scores["Overall"])}))
