"""Generation by vLLM: seconds for the same documents that generation.py asks, through lm-eval's engine for vLLM.

python tests/gpu/served.py --model FOLDER --gsm8k test.jsonl --out DIR
"""

import argparse
import json
import time
from pathlib import Path

from generation import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_null.eval_harness import LmEvalTask, evaluate
from lora_null.eval_harness.lm_eval.vllm import open_vllm

LIMIT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    make_adapter(given.model, given.out / "adapter", "bfloat16")
    engine = open_vllm(given.model, given.out / "adapter", dtype="bfloat16", revision=None, rank=32)
    live = AutoModelForCausalLM.from_pretrained(given.model)  # asks for nothing: every answer comes from the engine
    task = LmEvalTask("gsm8k", path=given.gsm8k, num_fewshot=0)
    began = time.perf_counter()
    found = evaluate(live, AutoTokenizer.from_pretrained(given.model), [task], lm=engine, limit=LIMIT)
    seconds = time.perf_counter() - began
    scores = {name: metric.value for name, metric in found.metrics.items()}
    result = {"seconds": seconds, "own_clock": found.seconds, "documents": LIMIT, "scores": scores}
    (given.out / "served.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
