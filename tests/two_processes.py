"""One process of eval_harness/test_distributed.py."""

import json
import os
import sys
from pathlib import Path

import datasets
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lora_null.eval_harness import AnswerTask, LmEvalTask, MTBenchTask, PreferenceTask, evaluate
from lora_null.eval_harness.code.jails import UNSAFE
from lora_null.eval_harness.likelihood import tokenize_pairs

computed = []


def count(name):
    """Let lm-eval's method note the requests that it gets on this process."""
    method = getattr(HFLM, name)

    def counted(self, requests, disable_tqdm=False):
        computed.extend(f"{name} {request.task_name} {request.doc_id} {request.idx}" for request in requests)
        return method(self, requests, disable_tqdm=disable_tqdm)

    setattr(HFLM, name, counted)


def main(words: list[str]) -> int:
    folder, index = Path(words[0]), int(os.environ.get("RANK", 0))
    os.dup2(os.open(folder / f"said-{index}.txt", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    disable_progress_bar()
    for name in ("generate_until", "loglikelihood"):
        count(name)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pairs = json.loads((folder / "pairs.json").read_text())
    base.register_forward_hook(lambda module, args, kwargs, out: computed.append(len(out.logits)), with_kwargs=True)
    tokenized = tokenize_pairs(tokenizer, pairs, "p", None)
    preferences = PreferenceTask("p", tokenized[:3], tokenized[3:6])
    questions = [{"question_id": i, "category": "math", "turns": [str(i), "why?"], "reference": []} for i in range(5)]
    talk = MTBenchTask("talk", questions, lambda before, asked: f"{before}{asked}", max_new_tokens=6)
    answers = [AnswerTask("a", pairs, kl=True)]
    references = folder / f"references-{os.environ.get('WORLD_SIZE', 1)}"
    before = evaluate(base, tokenizer, answers, batch_size=2, reference_dir=references, record_reference=True)
    scored = sum(n for n in computed if isinstance(n, int))
    evaluate(base, tokenizer, [preferences], batch_size=2, reference_dir=references, record_reference=True)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    tasks = [
        *answers,
        preferences,
        talk,
        LmEvalTask("nq_open", path=str(folder / "nq.jsonl")),
        LmEvalTask("sciq", path=str(folder / "sciq.jsonl")),
        LmEvalTask("nq_open", path=str(folder / "nq.jsonl"), limit=1, name="fewer than processes"),
        LmEvalTask(
            "sandbox_humaneval_completion",
            path=str(folder / "code.jsonl"),
            confirm_run_unsafe_code=True,
            jail=UNSAFE,
        ),
    ]
    out = folder / f"out-{os.environ.get('WORLD_SIZE', 1)}"
    after = evaluate(model, tokenizer, tasks, batch_size=2, reference_dir=references, output_dir=out)
    result = {"before": before.to_json(), "after": after.to_json(), "scored": scored}
    result["requests"] = [key for key in computed if isinstance(key, str)]
    (folder / f"process{index}-of-{os.environ.get('WORLD_SIZE', 1)}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        check_sharded(base, tokenizer, pairs)
        check_failures(index, model, tokenizer)
        dist.destroy_process_group()
    return 0


def check_sharded(model, tokenizer, pairs) -> None:
    """With sharded parameters (here: ZeRO-3's mark) forward passes are collective, so both processes compute all."""
    computed.clear()
    next(model.parameters()).ds_id = 0
    evaluate(model, tokenizer, [AnswerTask("a", pairs)])
    assert sum(computed) == len(pairs), computed


def check_failures(index, model, tokenizer) -> None:
    """A failure on one process ends all of them."""
    if index == 1:
        model.forward = None
    try:
        evaluate(model, tokenizer, [AnswerTask("a", [("Q:", " a"), ("Q:", " b")])])
    except Exception as error:
        assert index == 1 or str(error).startswith("process 1 failed: "), error
    else:
        raise AssertionError("no failure")
