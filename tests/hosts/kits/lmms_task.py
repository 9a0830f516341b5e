"""lmms-eval's own command with a task of three local questions: the entry point is found, answers are scored."""

import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset, Features, Image, Value

TASK = """task: own_tiny
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function own.visual
doc_to_text: !function own.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, num_beams: 3}}
process_results: !function own.score
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
def visual(doc): return [doc["image"].convert("RGB")]
def text(doc, lmms_eval_specific_kwargs=None): return doc["question"]
def score(doc, results): return {"right": float(doc["answer"] in results[0].lower())}
"""
path, place = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
(place / "task").mkdir(parents=True, exist_ok=True)
rows = {
    "image": [str(path)] * 3,
    "question": ["What animal is this?", "Is there a panda?", "What animal is this?"],
    "answer": ["panda", "yes", "zebra"],
}
kinds = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
Dataset.from_dict(rows, features=kinds).to_parquet(str(place / "tiny.parquet"))
(place / "task" / "own_tiny.yaml").write_text(TASK.format(data=place / "tiny.parquet"))
(place / "task" / "own.py").write_text(FUNCTIONS)
out = place / "out"
sys.argv = f"lmms_eval --model unilip --tasks own_tiny --include_path {place / 'task'} --output_path {out}".split()
sys.argv += ["--log_samples", "--batch_size", "2"]
try:
    runpy.run_module("lmms_eval", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
results = json.loads(max(out.rglob("*_results.json")).read_text())["results"]["own_tiny"]
samples = [json.loads(line) for line in max(out.rglob("*_samples_*.jsonl")).read_text().splitlines()]
answers = ["".join(one["filtered_resps"]) for one in samples]
right = next(value for name, value in results.items() if name.startswith("right,"))
print(json.dumps({"version": version("lmms-eval"), "answer": answers, "right": right}))
