"""Our values for a saved adapter are those of the lm_eval command line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_null.eval_harness import TASK_FILES, LmEvalTask, evaluate
from lora_null.eval_harness.code.jails import find_jail
from lora_null.eval_harness.lm_eval.model import ShardedLM
from lora_null.utils.errors import UserError

TASKS = Path(lm_eval.tasks.__file__).parent
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def model_and_tokenizer(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, saved / "adapter"), AutoTokenizer.from_pretrained(saved / "model")


@pytest.fixture(scope="module")
def half_right_nq(write_once, model_and_tokenizer):
    """Questions of which the model answers about half exactly right: their answers are its own."""
    from lm_eval.api.instance import Instance

    model, tokenizer = model_and_tokenizer
    questions = [f"who is number {i}" for i in range(10)]
    stop = {"until": ["\n", ".", ","], "do_sample": False, "temperature": 0.0}
    prompts = [f"Answer these questions:\n\nQ: {question}?\nA:" for question in questions]
    requests = [Instance("generate_until", {}, (p, stop), 0, ("t", i, 1)) for i, p in enumerate(prompts)]
    answers = ShardedLM(model.eval(), tokenizer, BATCH_SIZE).generate_until(requests, disable_tqdm=True)
    rows = [
        {"question": q, "answer": [a.strip() if i % 2 else "no"]} for i, (q, a) in enumerate(zip(questions, answers))
    ]
    return write_once("half.jsonl", rows)


def run_lm_eval(saved, folder, files, *options):
    """Run the command line over local copies of tasks; return its results."""
    for name, (yaml, splits, path) in files.items():
        data_files = "".join(f"    {split}: {path}\n" for split in splits)
        (folder / f"{name}.yaml").write_text(
            f"include: {TASKS / yaml}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n{data_files}"
        )
    model = f"pretrained={saved / 'model'},peft={saved / 'adapter'},dtype=float32"
    command = [
        sys.executable,
        Path(__file__).parents[1] / "lm_eval_command.py",
        "--model",
        "hf",
        "--model_args",
        model,
        "--tasks",
        ",".join(files),
        "--include_path",
        folder,
        "--batch_size",
        str(BATCH_SIZE),
        "--device",
        "cpu",
        "--output_path",
        folder / "out",
        *options,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").glob("**/results_*.json")
    return json.loads(results.read_text())["results"]


@pytest.fixture(scope="module")
def documents(write_once):
    """GSM8K, and HumanEval with comments that the model goes on with: harmless until it starts another line, so about half of
    them pass."""
    rows = [
        {
            "task_id": str(i),
            "prompt": f"def f():\n    return {i}\n# {'why ' * i}",
            "entry_point": "f",
            "test": f"def check(f):\n    assert f() == {i}\n",
        }
        for i in range(8)
    ]
    gsm = write_once("gsm.jsonl", [{"question": f"what is {i}?", "answer": f"#### {i}"} for i in range(4)])
    return gsm, write_once("code.jsonl", rows)


def lacks_jail():
    """Return why the command has no consent to run programs here, None where it has."""
    try:
        find_jail()
    except UserError as error:
        return str(error).partition("; eval.code")[0]


@pytest.fixture(scope="module")
def expected(saved, tmp_path_factory, half_right_nq, sciq_file, lambada_file, documents):
    """What one call of the command says of all tasks."""
    files = {
        "my_nq": ("nq_open/nq_open.yaml", ["train", "validation"], half_right_nq),
        "my_sciq": ("sciq/sciq.yaml", ["train", "validation", "test"], sciq_file),
        "my_lambada": ("lambada/lambada_openai.yaml", ["test"], lambada_file),
        "my_gsm8k": (TASK_FILES / "math" / "metamath_gsm8k.yaml", ["test"], documents[0]),
    }
    if not lacks_jail():
        code = TASK_FILES / "code" / "sandbox_humaneval_completion.yaml"
        files["my_humaneval"] = (code, ["test"], documents[1])
    return run_lm_eval(saved, tmp_path_factory.mktemp("lm_eval"), files, "--confirm_run_unsafe_code")


def test_values_equal_the_command_line(expected, model_and_tokenizer, half_right_nq, sciq_file, lambada_file):
    ours = evaluate(
        *model_and_tokenizer,
        [
            LmEvalTask("nq_open", path=half_right_nq),
            LmEvalTask("sciq", path=sciq_file),
            LmEvalTask("lambada_openai", path=lambada_file),
        ],
        batch_size=BATCH_SIZE,
    ).metrics
    pairs = {
        "nq_open": ("my_nq", "exact_match", "remove_whitespace"),
        "sciq/acc": ("my_sciq", "acc", "none"),
        "sciq/acc_norm": ("my_sciq", "acc_norm", "none"),
        "lambada_openai/perplexity": ("my_lambada", "perplexity", "none"),
        "lambada_openai/acc": ("my_lambada", "acc", "none"),
    }
    assert set(ours) == set(pairs)
    for name, (task, metric, filter_) in pairs.items():
        value = expected[task][f"{metric},{filter_}"]
        if metric == "perplexity":  # exp of a float32 sum, whose last bits depend on the number of threads
            assert math.log(ours[name].value) == pytest.approx(math.log(value), rel=1e-6), name
        else:
            assert ours[name].value == value, name
            assert ours[name].stderr == expected[task][f"{metric}_stderr,{filter_}"], name
    assert 0 < ours["nq_open"].value < 1 and 0 < ours["sciq/acc"].value < 1
    assert ours["lambada_openai/perplexity"].unit == "perplexity"


def test_the_noise_of_a_perplexity_is_none_of_its_documents(model_and_tokenizer, lambada_file, tmp_path):
    """Its documents have log-likelihoods, in another unit than its value."""
    task = LmEvalTask("lambada_openai", path=lambada_file)
    found = evaluate(*model_and_tokenizer, [task], limit=2, reference_dir=tmp_path, record_reference=True)
    assert set(found.samples) == set(found.metrics) and set(found.noise) == {"lambada_openai/acc"}


def test_our_task_files_run_through_the_command(expected, model_and_tokenizer, documents):
    if reason := lacks_jail():
        pytest.skip(reason)
    gsm, code = documents
    tasks = [
        LmEvalTask("metamath_gsm8k", path=gsm),
        LmEvalTask("sandbox_humaneval_completion", path=code, name="humaneval", confirm_run_unsafe_code=True),
    ]
    ours = evaluate(*model_and_tokenizer, tasks, batch_size=BATCH_SIZE).metrics
    assert ours["humaneval"].value == expected["my_humaneval"]["pass@1,none"]
    assert ours["humaneval"].stderr == expected["my_humaneval"]["pass@1_stderr,none"]
    assert ours["metamath_gsm8k/exact_match"].value == expected["my_gsm8k"]["exact_match,none"]
    assert ours["metamath_gsm8k/metamath_rule"].value == expected["my_gsm8k"]["metamath_rule,none"]
    assert 0 < ours["humaneval"].value < 1
