"""Every mistake of a user: exit status 2, one line on stderr, nothing written, no model loaded."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig
from world import make_world, write_rows

from lora_null.eval_harness.lm_eval.vllm import max_lora_rank
from lora_null.recipes import measure
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.models import bases
from lora_null.recipes.models.plan import MethodPlan, plan_methods
from lora_null.recipes.sequence import check_stages
from lora_null.utils.errors import UserError
from lora_null.utils.startup import exit_status


@pytest.fixture
def recipe(tmp_path):
    return make_world(tmp_path)


@pytest.fixture
def fails(recipe, monkeypatch, capsys):
    """Run the command and return its one line; a model load or an output folder fails the test."""

    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measure, "base_to_run", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*words, name=None):
        assert main([name or str(recipe), *words]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return call


CASES = [
    (["modle.dtype=float32"], "no key 'modle' (did you mean 'model'?)"),
    (["model.dtyp=float32"], "no key 'model.dtyp' (did you mean 'dtype'?)"),
    (["training.learning_rat=1"], "training has no key 'learning_rat' (did you mean 'learning_rate'?)"),
    (["training.seed=3"], "training.seed is decided by the recipe's own keys, use seed"),
    (["training.hub_token=hf_x"], "use HF_TOKEN in the environment"),
    (["training.completion_only_loss=false"], "decided by the recipe's own keys, use those of data"),
    (["model.dtype=float31"], "model.dtype: input should be 'float32'"),
    (["method.rank=0"], "method.rank: input should be greater than or equal to 1"),
    (["method.rank=x", "seed=-1"], "seed: input should be greater than or equal to 0"),
    (["--method", "lora-null-v3"], "no method 'lora-null-v3' (did you mean 'lora-null-v"),
    (
        ["--method", "nb-lora", "method.options.nb-lora.null_multiple=0.5"],
        "nb-lora.null_multiple: N needs r directions",
    ),
    (["--method", "nb-lora", "method.options.nb-lora.null_energy=99"], "nb-lora.null_energy: a share between 0 and 1"),
    (
        ["--method", "nb-lora", "method.options.nb-lora.start=zeros"],
        "nb-lora.start: 'zeros' is not one of zero, residual",
    ),
    (
        ["--method", "nb-lora", "method.options.nb-lora.null_multiple=9"],
        "null_multiple: 9 r are 36 directions, more than",
    ),
    (["method.decay_to_start=true"], "method.decay_to_start: there is no residual base to go back to"),
    (
        ["--method", "lora-null-v1", "method.decay_to_start=true"],
        "method.decay_to_start: there is no decay, weight_decay",
    ),
    (
        ["--method", "lora,lora-null-v1", "training.weight_decay=0.1", "training.optim=adafactor"],
        "method.decay_to_start: is defined for AdamW, not for adafactor",
    ),
    (
        ["calibration.self=data", "calibration.max_length=16"],
        "every prompt is longer than half of max_length (16 tokens)",
    ),
    (
        [
            "calibration.max_length=128",
            "calibration.sources=[self, {path: {0}/facts.jsonl, field: question, weight: 0.001}]",
        ],
        "calibration.samples: 60 windows leave none for",
    ),
    (["--method", "lora,lora"], "a method is named twice"),
    (["method.rank=33"], "r: 33 is larger than model.layers.0.self_attn.q_proj allows (min(d_in, d_out) = 32)"),
    (["method.target_modules=[q_prj]"], "no module matches 'q_prj' (did you mean 'q_proj'?)"),
    (["method.target_modules=[q_proj, lm_head]"], "target_modules: TRL's loss reads the weights of lm_head"),
    (
        ["method.target_modules=[q_proj, embed_tokens]"],
        "target_modules: model.embed_tokens is no linear, and lora is for",
    ),
    (["method.target_modules=[q_proj, v_porj]"], "no module matches 'v_porj' (did you mean 'v_proj'?)"),
    (["method.target_modules=q_proj,v_porj"], "no module matches 'v_porj' (did you mean 'v_proj'?)"),
    (["method.target_modules='('"], "method.target_modules: a pattern is no regular expression (missing )"),
    (
        ["--method", "full", "method.target_modules='('"],
        "target_modules: a pattern is no regular expression (missing )",
    ),
    (
        ["--method", "oft", "method.target_modules=[mlp]"],
        "method.target_modules: a LlamaMLP is no linear, PEFT puts no adapter on it",
    ),
    (
        ["method.rank_pattern={q_porj: 2}"],
        "method.rank_pattern: no adapted module matches 'q_porj' (did you mean",
    ),
    (["training.weight_decay=-1"], "training.weight_decay: must be a number of at least 0, not -1"),
    (["training.weight_decay=.nan"], "training.weight_decay: must be a number of at least 0, not nan"),
    (["training.max_grad_norm=.nan"], "training.max_grad_norm: must be a number of at least 0, not nan"),
    (
        ["training.label_smoothing_factor=5"],
        "training.label_smoothing_factor: must be a number between 0 and 1, not 5",
    ),
    (["calibration.template=''"], "calibration.template: the data has no field ''"),
    (["data.system=''"], "data.system: string should have at least 1 character"),
    (["data.path=nowhere.jsonl"], "data.path: no file or folder nowhere.jsonl"),
    (["data.prompt=qestion"], "data.prompt: the data has no field 'qestion' (did you mean 'question'?)"),
    (
        ["data.prompt=", "data.text=answer", "data.template=qa"],
        "data.text is learned as it stands, without data.template: qa",
    ),
    (["data.rejected=answer"], "data.rejected: is for trainer: dpo"),
    (["data.template=alpacca"], "no template 'alpacca' (did you mean 'alpaca'?)"),
    (["calibration.field=txt"], "calibration.field: the data has no field 'txt'"),
    (["calibration.samples=1"], "calibration: only 32 tokens, at least 256 are needed"),
    (["calibration.path=./empty.jsonl"], "calibration.path: no file or folder ./empty.jsonl"),
    (["eval.task=[gsm9k]"], "gsm9k"),
    (["eval.task=[{answers: n, path: nowhere.jsonl}]"], "eval.task.path: no file or folder nowhere.jsonl"),
    (["data.path={0}/sets"], "sets holds 'train' in main and socratic; name one of these folders"),
    (["data.path={0}/sets", "data.subset=man"], "data.subset: no folder 'man' in {0}/sets (did you mean 'main'?)"),
    (
        ["data.path={0}/paragraphs.jsonl", "data.text=text"],
        "2 'text' is a list of several texts, not one text (rows 1, 2)",
    ),
    (["training.save_strategy=best"], "training.save_strategy: 'best' has no rows to evaluate while it trains"),
    (
        ["training.dataloader_drop_last=true", "data.limit=1"],
        "training.dataloader_drop_last: 1 rows fill no batch of 2, so that none is left to train on",
    ),
    (["training.total_batch_size=3"], "total_batch_size: 3 is not a multiple of per_device_train_batch_size"),
    (
        ["training.total_batch_size=4", "training.auto_find_batch_size=true"],
        "auto_find_batch_size: takes smaller batches",
    ),
    (["training.optim=sdg"], "training: "),
    (["training.learning_rate=-1"], "training.learning_rate: must be a number greater than 0, not -1"),
    (["trainer=dpo", "training.label_smoothing=0.1"], "label_smoothing: is not read by the loss sigmoid; by aot, "),
    (
        ["trainer=dpo", "training.loss_type=robust", "training.label_smoothing=0.9"],
        "training.label_smoothing: must be at least 0 and below 0.5, not 0.9",
    ),
    (
        ["trainer=dpo", "training.sync_ref_model=true"],
        "training.sync_ref_model is not taken: it moves the reference, which no",
    ),
    (["trainer=dpo", "training.beta=0"], "training.beta: must be a number greater than 0, not 0"),
    (["model.name_or_path=./nomodel"], "model.name_or_path: no folder ./nomodel"),
    (["model.name_or_path=some/model"], "not a local folder, and the hub does not give it"),
    (['training.bf16="perhaps"'], "training.bf16: must be true or false, not 'perhaps'"),
    (["training.learning_rate=true"], "training.learning_rate: must be a number, not true"),
    (["training.max_steps=0"], "training.max_steps: trains nothing with 0"),
    (["--resume", "--overwrite"], "--resume: goes on with the run that --overwrite removes; give one of the two"),
    (["grid.keep_weights=false"], "keep_weights: a single run keeps its weights; give seeds or sweep"),
    (["training=3"], "training: input should be a valid dictionary"),
    (["eval=3"], "eval: holds keys, such as eval.retention, not 3"),
    (["method=lora"], "method: holds keys, such as method.name, not 'lora'"),
    (["grid.seeds=3"], "grid.seeds: is a list, such as [3]"),
    (["training.fp16=true"], "training.fp16: there is no accelerator here, and a CPU trains in float32"),
    (["method=lora", "--method", "lora"], "'method' holds a value, not keys"),
    (["rank"], "argument 'rank': expected key.subkey=value"),
    (["eval.probe.every=often"], "eval.probe.every: input should be a valid integer"),
    (["method.target_modules=3"], "method.target_modules: "),
    (["data.limit=[1"], "the value is not valid YAML"),
    (["seed=1", "seed.x=1"], "holds a value, not keys"),
    (["eval.task=[gsm8k]", "eval.task.0.limit=5"], "'task' is a list: give all of it"),
    ([f"method.alpha={'9' * 400}"], "(line 1: 99999999999999999999 is beyond 2^63)"),
    (["--dry-run", "--output-dir", "none/" + "x" * 300], f"output_dir: a name of 300 bytes in none/{'x' * 300}, and"),
    (["data.path=" + "x" * 300], f"no file or folder has a name as long as {'x' * 300}"),
    (["model.name_or_path=" + "x" * 300], f"no file or folder has a name as long as {'x' * 300}"),
]


@pytest.mark.parametrize("words, message", CASES, ids=[" ".join(words)[:80] for words, _ in CASES])
def test_said_in_one_line_before_a_model_loads(fails, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))  # before retrying
    write_rows(tmp_path / "paragraphs.jsonl", [{"text": ["a", "b"]}] * 2)
    for name in ("main", "socratic"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        write_rows(tmp_path / "sets" / name / "train-0.jsonl", [{"question": name, "answer": "a"}] * 8)
    assert message.replace("{0}", str(tmp_path)) in fails(*(word.replace("{0}", str(tmp_path)) for word in words))
    assert not (tmp_path / "out").exists()


def test_ranks_that_vllm_does_not_take():
    """As they are saved: those of a sequence's tasks add up."""
    assert max_lora_rank(300, "lora") == 320
    with pytest.raises(UserError, match="vllm takes adapters up to rank 512, this adapter saves 600; use hf"):
        max_lora_rank(600, "this adapter")
    recipe = load_recipe(
        "quickstart", ["eval.backend=vllm", "method.rank_pattern={q_proj: 512}"], methods="lora-null-v1"
    )
    with pytest.raises(UserError, match="up to rank 512, lora-null-v1 saves 1024; use hf"):
        plan_methods(recipe, LlamaConfig(hidden_size=1024, num_hidden_layers=1))
    plans = [MethodPlan("lora", 8, 0, 0, "adapter", rank, 0, 0, 0, 0) for rank in (200, 400)]
    with pytest.raises(UserError, match="up to rank 512, lora saves 600; use hf"):
        check_stages(load_recipe("sequence", ["eval.backend=vllm"]), [SimpleNamespace(plans=[plan]) for plan in plans])


def test_an_engine_under_which_a_method_does_not_train(fails, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    words = ["--method", "lora,clora", "training.use_cpu=false"]  # accelerate takes FSDP for GPUs alone
    assert "fsdp_version: 1 cuts across the layers of an adapter" in fails(*words)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert "clora needs whole weights while it trains; use DDP or ZeRO-2 for it" in fails(*words)


def test_the_subset_of_a_folder_is_the_folder_in_it(recipe, tmp_path, capsys):
    for name in ("main", "socratic"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        write_rows(tmp_path / "sets" / name / "train-0.jsonl", [{"question": name, "answer": "a"}] * 8)
    words = [f"data.path={tmp_path / 'sets'}", "data.subset=socratic", "method.target_modules=q_proj, up_proj"]
    assert main([str(recipe), *words, "--show-samples", "20"]) == 0
    assert "main" not in (shown := capsys.readouterr().out) and shown.count("Question: socratic") == 8
    assert main([str(recipe), *words, "--method", "lora", "--dry-run"]) == 0  # of modules a list, separated by commas


def test_unknown_recipe(fails):
    assert "none is called 'quikstart' (did you mean 'quickstart'?)" in fails(name="quikstart")
    assert "no file nowhere.yaml" in fails(name="nowhere.yaml")


def test_all_mistakes_of_a_recipe_at_once(fails):
    line = fails("method.rank=0", "nonsense=1", "eval.batch_size=0")
    assert "method.rank" in line and "nonsense" in line and "eval.batch_size" in line


def test_empty_data(fails, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in fails(f"data.path={tmp_path / 'empty.jsonl'}")
    (tmp_path / "blank.jsonl").write_text(json.dumps({"question": "", "answer": ""}) + "\n")
    assert "1 of 1 rows cannot be used: 1 empty 'question' (row 1)" in fails(f"data.path={tmp_path / 'blank.jsonl'}")


def test_broken_yaml(fails, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: [")
    assert "not valid YAML (line 1: expected the node content" in fails(name=str(tmp_path / "broken.yaml"))
    (tmp_path / "broken.yaml").write_text("model:\n  dtype: a\n\trevision: b\n")
    assert "not valid YAML (line 3: found character '\\t'" in fails(name=str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    assert "a recipe is a mapping" in fails(name=str(tmp_path / "list.yaml"))


def test_output_folder_in_use(fails, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "holds other files (thesis.tex)" in fails()
    (out / "recipe.yaml").write_text("method: {name: [lora]}")
    assert "unfinished run; --resume continues it" in fails()
    assert "has another recipe: name was null" in fails("--resume")
    (out / "report.html").write_text("done")
    (out / "results.json").write_text('{"schema": 1, "recipe": "tiny", "model": "m", "rows": [{"method": "base"}]}')
    assert "finished run; --overwrite replaces it" in fails()
    assert (out / "thesis.tex").read_text() == "years of work"


def test_output_that_cannot_be_written(fails, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file" in fails("--output-dir", str(tmp_path / "file"))
    with monkeypatch.context() as patch:
        patch.setenv("LORA_NULL_CACHE", str(tmp_path / "file" / "cache"))
        for words in ([], ["--dry-run"]):
            assert "LORA_NULL_CACHE: cannot write to" in fails(*words)
            assert not (tmp_path / "out").exists()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "cannot write to" in fails() and "No space left on device" in fails()


def test_what_is_closed_to_the_user(fails, tmp_path, monkeypatch, capsys):
    def opened(path, *rest, **more):
        if path.name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *rest, **more)

    def walked(top, onerror, **_):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return ()

    monkeypatch.setattr("pathlib.Path.open", opened)
    closed = ["model.safetensors"]
    assert f"model.name_or_path: cannot read {tmp_path / 'model' / closed[0]} (Permission denied)" in fails()
    closed.clear()
    monkeypatch.setattr("os.walk", walked)
    assert f"cannot read or write {tmp_path} (Permission denied)" in fails(f"data.path={tmp_path}")
    monkeypatch.undo()
    for number in (1, 13, 30):
        refused = OSError(number, "x", "/a/file")

        def wrapped(refused=refused):
            raise ValueError("a data set that cannot be made") from refused

        assert exit_status(wrapped) == 2 and "error: cannot read or write /a/file (" in capsys.readouterr().err
    with pytest.raises(PermissionError):
        exit_status(lambda: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))


def test_gated_model(fails, monkeypatch):
    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo. 401 Client Error")

    monkeypatch.setattr(bases.AutoConfig, "from_pretrained", gated)
    assert "gated: ask for access on its hub page" in fails("model.name_or_path=meta-llama/Llama-2-7b-hf")


@pytest.mark.parametrize("name", ["somebody/tiny-401m", "somebody/a-gated-repo", "/scratch/403/model"])
def test_a_name_that_sounds_as_if_gated(fails, name):
    said = fails(f"model.name_or_path={name}")
    assert "gated: ask" not in said and "model.name_or_path: " in said


def test_an_exception_that_says_nothing(fails, monkeypatch):
    def silent(*_, **__):
        raise OSError

    monkeypatch.setattr(bases.AutoConfig, "from_pretrained", silent)
    assert "(OSError); model.name_or_path also takes a local folder" in fails()


def test_through_the_real_command(recipe):
    command = [sys.executable, "-m", "lora_null.recipes", str(recipe), "--method", "loar"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("error: ") and "did you mean 'lora'" in run.stderr
    assert "Traceback" not in run.stderr and run.stdout == ""
