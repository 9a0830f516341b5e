"""A checkout of VLMEvalKit: its own run.py, through ours, on three local questions with answers to choose from.

The embedded model never learned to choose, so it is asked plainly and the kit finds the option that its words name.
The third question's answer is wrong on purpose: two of three are right.
"""

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
    "index": [0, 1, 2], "image": [picture] * 3, "category": ["animals"] * 3,
    "question": ["What is in the picture?", "What animal is this?", "Is there a panda?"],
    "A": ["a panda", "a frog", "no"], "B": ["a car", "a panda", "yes"], "answer": ["A", "B", "A"],
}  # fmt: skip
pandas.DataFrame(rows).to_csv(place / "data" / "OwnTiny.tsv", sep="\t", index=False)

sys.path.insert(0, os.getcwd())  # as `python -m unilip.eval.vlmevalkit` does in the checkout
from unilip.eval.vlmevalkit import main  # noqa: E402  after the kit's environment is set

main(f"--plain --data OwnTiny --model UniLIP --work-dir {place / 'out'} --judge exact_matching".split())
answers = pandas.read_excel(max((place / "out").rglob("UniLIP_OwnTiny.xlsx")))["prediction"].tolist()
scores = pandas.read_csv(max((place / "out").rglob("*_acc.csv"))).iloc[0].to_dict()
print(json.dumps({"version": "checkout", "answer": answers, "right": float(scores["Overall"])}))
