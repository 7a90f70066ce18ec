"""A dry run tells every mistake that the run would end with: one line, exit status 2, no weights, nothing written."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from world import make_world, write_rows

from lora_null.eval_harness import AnswerTask
from lora_null.eval_harness.likelihood import REFERENCE_BYTES, tokenize_pairs
from lora_null.recipes import checks, measure, output
from lora_null.recipes.__main__ import main

OTHERS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"  # a chat template without an end


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A world, with what some of the mistakes need beside it."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    write_rows(folder / "half.jsonl", [{"question": f"q{i}", "answer": "a" if i % 2 else ""} for i in range(20)])
    write_rows(folder / "empty_answer.jsonl", [{"question": "q", "answer": "  "}])
    write_rows(folder / "mt.jsonl", [{"question_id": 1, "category": "math", "turns": ["a", "b"]}])
    write_rows(folder / "pairs.jsonl", [{"prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(8)])
    for name in ("unweighted", "damaged", "endless", "unended"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "unweighted" / "model.safetensors").unlink()
    with open(folder / "damaged" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    unended = tiny_tokenizer()
    unended.eos_token = None
    unended.save_pretrained(folder / "unended")
    (folder / "endless" / "chat_template.jinja").write_text(OTHERS)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=36, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        folder / "short"
    )
    tiny_tokenizer().save_pretrained(folder / "short")
    (folder / "used").mkdir()
    (folder / "used" / "thesis.tex").write_text("years of work")
    return folder


@pytest.fixture
def fails(base, monkeypatch, capsys):
    """Return the one line of a dry run that has to fail before it loads weights."""
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(*words):
        assert main([str(base / "tiny.yaml"), "--dry-run", *(word.format(base) for word in words)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and not (base / "out").exists()
        return lines[0]

    return call


JUDGED = "eval.task=[{{mt_bench: mt, path: {0}/mt.jsonl}}]"
DPO = ["trainer=dpo", "data.path={0}/pairs.jsonl", "data.prompt=prompt", "data.response=chosen", "eval.task="]
MISTAKES = [
    (["calibration.field=txt"], "calibration.field: the data has no field 'txt'"),
    (["calibration.template='Q: {{qestion}}'"], "no field 'qestion' (did you mean 'question'?)"),
    (["calibration.path=./nowhere.jsonl"], "calibration.path: no file or folder ./nowhere.jsonl"),
    (["calibration.samples=1"], "calibration: only 32 tokens, at least 256 are needed"),
    (["data.prompt=qestion"], "data.prompt: the data has no field 'qestion' (did you mean 'question'?)"),
    (["data.path={0}/half.jsonl"], "10 of 20 rows cannot be used: 10 empty 'answer' (rows 1, 3, 5, 7, 9, …)"),
    (["training.max_length=4"], "rows cannot be used: 40 prompt longer than max_length (4 tokens)"),
    (
        ["training.max_length=4", "training.packing=true"],  # whose strategy cuts rows as no packing does
        "rows cannot be used: 40 prompt longer than max_length (4 tokens)",
    ),
    (["model.name_or_path={0}/endless", "data.template=chat"], "the end token '</s>' is in no label"),
    (["model.name_or_path={0}/unended"], "the tokenizer names no end token, so the model would never learn to stop"),
    ([*DPO, "model.name_or_path={0}/unended", "preflight=off"], "model.eos_token: the tokenizer has no end token"),
    (["data.template=chat"], "data.template"),
    (
        ["eval.task=[{{answers: n, path: {0}/numbers.jsonl, template: chat}}]"],
        "eval.task.template: 'chat' needs a model with a chat template",
    ),
    (["model.eos_token=<end>"], "model.eos_token: the tokenizer of"),
    (["model.name_or_path={0}/unweighted"], "holds a configuration but no weights (model.safetensors is missing)"),
    (["model.name_or_path={0}/damaged"], "damaged are damaged (model.safetensors: "),
    (
        ["model.name_or_path={0}/short"],
        "training.max_length: a row of 39 tokens is too long, GPT2LMHeadModel takes 36",
    ),
    (
        ["model.name_or_path={0}/short", "training.max_length=36", "calibration.max_length=40", "eval={{}}"],
        "calibration.max_length: 40 tokens are too",
    ),
    (["model.attn_implementation=flash_attention_2"], "model.attn_implementation: flash"),
    (["method.rank=33"], "r: 33 is larger than model.layers.0.self_attn.q_proj allows"),
    (["method.init={0}/model"], "holds no complete initialization (layers.json is missing)"),
    (["eval.task=[gsm9k]"], "unknown lm-eval task 'gsm9k' (did you mean 'gsm8k'"),
    (["eval.task=[{{task: nq_open, path: {0}/mt.jsonl}}]"], "mt.jsonl has no field 'question'; its fields"),
    (["eval.task=[{{answers: n, path: {0}/nowhere.jsonl}}]"], "nowhere.jsonl"),
    (
        ["eval.task=[{{answers: n, path: {0}/numbers.jsonl, prompt: q}}]"],
        "eval.task.prompt: the data has no field 'q'",
    ),
    (["eval.retention=[{{answers: n, path: {0}/empty_answer.jsonl}}]"], "1 empty 'answer' (row 1)"),
    (["eval.task=[sandbox_humaneval]", "data.template=alpaca"], "consent with --allow-code-execution"),
    (["eval.backend=vllm"], "eval.backend: vllm is not installed here"),
    (
        [JUDGED, "eval.judge.model=j"],
        "judge: https://api.openai.com/v1 needs a key in the environment variable OPENAI",
    ),
    ([JUDGED, "eval.judge={{model: j, base_url: 'http://127.0.0.1:9/v1'}}"], "http://127.0.0.1:9/v1 does not answer"),
    ([JUDGED, "eval.judge={{model: judje, base_url: 'STUB'}}"], "has no 'judje' (did you mean 'judge'?)"),
    (["training.report_to=trackiooo"], "training.report_to: trackiooo is not supported"),
    (["training.report_to=swanlab"], "training.report_to: swanlab is not installed; pip install swanlab"),
    (["training.push_to_hub=true"], "training.push_to_hub has only checkpoints to upload"),
    (["training.optim=lomo"], "training.optim: You need to install `lomo_optim`"),
    (["training.lr_scheduler_type=cosine_with_min_lr"], "fails: One of min_lr or min_lr_rate should be set"),
    (["training.loss_type=nnl"], "training: one step on a stand-in for the model fails: Invalid `loss_type`"),
    (["training.packing=true", "training.max_length="], "When packing is enabled, `max_length` can't be `None`"),
    ([*DPO, "training.loss_type=[sigmoidd]"], "sigmoidd"),
    ([*DPO, "method.target_modules=[q_proj, lm_head]"], "target_modules: TRL's loss reads the weights of lm_head"),
    (
        [*DPO, "method.name=full", "training.precompute_ref_log_probs=true", "model.dtype=bfloat16"],
        "training.precompute_ref_log_probs: full trains in float32, and the references would be computed in bfloat16",
    ),
    (["training.gradient_accumulation_steps=3", "training.total_batch_size=4"], "3 × 2 sequences are not total_batch"),
    (["--sweep", "training.lr_scheduler_type=cosine,cosine_with_min_lr"], "min_lr or min_lr_rate should be set"),
    (["--sweep", "data.prompt=question,qestion"], "data.prompt: the data has no field 'qestion'"),
    (["--output-dir", "{0}/used"], "holds other files (thesis.tex); choose an empty folder"),
    (["--output-dir", "{0}/tiny.yaml/out"], "cannot write to"),
    (["FULL"], "has 0.0 GB free, this run needs about 0.1 GB"),
]


@pytest.fixture(scope="module")
def stub():
    class Models(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"object": "list", "data": [{"id": "judge", "object": "model"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.mark.parametrize("words, message", MISTAKES, ids=[" ".join(words)[:70] for words, _ in MISTAKES])
def test_told_in_one_line_before_anything_is_spent(fails, stub, monkeypatch, words, message):
    if words == ["FULL"]:
        monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        words = []
        message = message.replace("0.1 GB", "")
    assert message in fails(*(word.replace("STUB", stub) for word in words))


@pytest.mark.parametrize("samples", [20, 999])
def test_the_plan_counts_the_windows_that_there_are(base, capsys, samples):
    assert main([str(base / "tiny.yaml"), "--dry-run", f"calibration={{mode: separate, samples: {samples}}}"]) == 0
    out = capsys.readouterr().out
    (count,) = re.findall(r"checked: .* (\d+) calibration windows", out)
    told = "20 windows" if samples == 20 else f"{count} of 999 windows (the texts hold no more)"
    assert int(count) == 20 if samples == 20 else 20 < int(count) < 999
    assert re.search(
        rf"^calibrate   \S+facts\.jsonl, {re.escape(told)} of at most \d+ tokens, each alone$", out, re.M
    ), out


def test_a_sound_recipe_passes_and_leaves_nothing(base, monkeypatch, capsys):
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("weights were loaded"))
    before = sorted(base.rglob("*"))
    assert main([str(base / "tiny.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "checked: 40 training rows, 60 calibration windows" in out and "one training step of a stand-in" in out
    assert re.search(r"covers      \S+facts.jsonl: 60 windows, [0-9,]+ tokens", out), out
    assert "measure     facts, numbers\n" in out and "probe  " not in out and "budget  " not in out
    words = ["--max-forgetting", "0.1", "eval.probe={every: 3}", f"eval.retention=[{base}/facts.jsonl]"]
    assert main([str(base / "tiny.yaml"), "--dry-run", *words]) == 0
    out = capsys.readouterr().out
    assert "probe       facts, numbers, every 3 steps\n" in out
    assert re.search(r"budget      facts kl at most 0.1 on \d+ rows that no probe uses, then scale", out), out
    assert sorted(base.rglob("*")) == before
    assert "not checked" not in out
    assert main([str(base / "tiny.yaml"), "--dry-run", "preflight=off"]) == 0
    out = capsys.readouterr().out
    assert "not checked: one training step of a stand-in, with preflight=off or several processes" in out


def test_the_plan_counts_the_rows_that_will_train(base, capsys):
    words = [
        "data.path={0}/half.jsonl",
        "data.on_bad_row=skip",
        "training.max_steps=-1",
        "training.num_train_epochs=1",
    ]
    assert main([str(base / "tiny.yaml"), "--dry-run", *(word.format(base) for word in words)]) == 0
    out = capsys.readouterr().out
    assert "left out 10 of 20 training rows" in out and re.search(r"learn +\S+half.jsonl, 10 rows", out), out
    assert "checked: 20 training rows" in out


def test_the_run_itself_looks_too(base, monkeypatch, capsys):
    """Whoever forgets --dry-run is told the same, before weights are loaded."""
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("weights were loaded"))
    assert main([str(base / "tiny.yaml"), "training.loss_type=nnl"]) == 2
    assert "Invalid `loss_type`" in capsys.readouterr().err and not (base / "out").exists()


def test_a_finding_of_the_rehearsal_can_be_a_warning(base, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(checks, "raise_or_warn", lambda mode, line: asked.append((mode, line)))
    words = ["--dry-run", "training.loss_type=nnl", "preflight=warn"]
    assert main([str(base / "tiny.yaml"), *words]) == 0
    assert asked[0][0] == "warn" and main([str(base / "tiny.yaml"), *words[:2], "preflight=off"]) == 0
    assert len(asked) == 1


def test_no_more_disk_is_asked_for_than_a_reference_may_take():
    shape = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=2**28))
    tasks = [AnswerTask("a", [("say", " a b c d e")], kl=kl) for kl in (True, False)]
    tokens = sum(len(p.ids) - p.start for p in tokenize_pairs(tiny_tokenizer(), tasks[0].pairs, "a", None))
    assert 4 * 2**28 * tokens > REFERENCE_BYTES == checks.reference_bytes(tasks, tiny_tokenizer(), None, shape)
    shape = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=64))
    assert checks.reference_bytes(tasks, tiny_tokenizer(), None, shape) == 4 * 64 * tokens
