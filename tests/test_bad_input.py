"""Damaged files, impossible values and crossed runs, each through the command in a process of its own.

Every case ends with one line, no traceback, the status that the line stands for, and the user's files as they were.
"""

import hashlib
import json
import os
import shutil

import pytest
import torch
import yaml
from kill_harness import run
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from world import make_world

METHOD = "lora-null-v1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: a model, data, a recipe, an output folder with an initialization and checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_world(folder, method={"name": METHOD, "rank": 4})
    assert run(recipe, folder / "out", "eval.cache=false") == 0, (folder / "log.txt").read_text()[-3000:]
    return folder


def weights(folder):
    return folder / "model" / "model.safetensors"


def cut(path, size=100):
    os.truncate(path, size)


def change_weights(folder, change):
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def nan_weights(folder):
    change_weights(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))


def lost_weights(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def other_models_weights(folder):
    save_tiny(folder / "other", hidden_size=64)
    shutil.copy(folder / "other" / "model.safetensors", weights(folder))


def data(text):
    def write(folder):
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "numbers.jsonl").write_bytes(content)

    return write


GOOD = '{"question": "what is 1+1", "answer": "it is 2"}\n'


def link_loop(folder):
    (folder / "numbers.jsonl").unlink()
    (folder / "numbers.jsonl").symlink_to(folder / "numbers.jsonl")


def folder_of_nothing(folder):
    (folder / "numbers.jsonl").unlink()
    (folder / "numbers.jsonl").mkdir()


def unfinished(folder):
    for path in (*(folder / "out").glob("re*.*"), folder / "out" / METHOD / "row.json"):
        if path.name != "recipe.yaml":
            path.unlink()


def resumed(damage):
    def prepare(folder):
        unfinished(folder)
        damage(folder / "out")

    return prepare


def init_folder(damage):
    """A finished initialization in `init`, damaged."""

    def prepare(folder):
        shutil.copytree(folder / "out" / METHOD / "init", folder / "init")
        damage(folder / "init")

    return prepare


def swap_parts(init):
    first, second = (init / f"factors.model.layers.{i}.safetensors" for i in (0, 1))
    first.write_bytes(second.read_bytes())


def other_base(init):
    report = json.loads((init / "layers.json").read_text())
    (init / "layers.json").write_text(json.dumps(report | {"base": "0" * 16}))


def planted_pickle(out):
    shutil.rmtree(out / METHOD / "checkpoint-4")
    path = out / METHOD / "checkpoint-2" / "optimizer.pt"
    torch.save({"a": json.JSONDecoder}, path)
    seal = path.with_name("complete.json")
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {"optimizer.pt": path.stat().st_size}))


def nothing(_):
    pass


INIT = ["method.init={0}/init"]
NEW = ["--output-dir", "{0}/new"]
# name: what is done to a copy of the finished run, more words of the command, the status, a part of the line
CASES = {
    "weights cut short": (lambda f: cut(weights(f)), NEW, 2, "weights of {0}/model are damaged"),
    "weights of another model": (other_models_weights, NEW, 2, "model.name_or_path: cannot load"),
    "weights that lack a tensor": (lost_weights, NEW, 2, "model.layers.1.mlp.up_proj.weight is missing"),
    "weights with NaN": (nan_weights, NEW, 2, "gives nan for facts"),
    "NaN met in calibration": (nan_weights, [*NEW, "eval.before=false"], 2, "model.layers.0.mlp.down_proj"),
    "empty config": (lambda f: (f / "model/config.json").write_text(""), NEW, 2, "model.name_or_path: cannot load"),
    "binary config": (lambda f: (f / "model/config.json").write_bytes(b"\x93\x00\xff"), NEW, 2, "cannot load"),
    "no tokenizer": (lambda f: (f / "model/tokenizer.json").unlink(), NEW, 2, "model.name_or_path: cannot load"),
    "an adapter beside the weights": (
        lambda f: (f / "model/adapter_config.json").write_text("{}"), NEW, 2, "model holds an adapter too"
    ),
    "no config": (lambda f: (f / "model/config.json").unlink(), NEW, 2, "holds no model (config.json is missing)"),
    "empty data": (data(""), NEW, 2, "is empty"),
    "binary data": (data(b"\x00\x93NUMPY\xff" * 50), NEW, 2, "not UTF-8 at byte 1 (row 1)"),
    "NaN for text": (data(GOOD + '{"question": NaN, "answer": "x"}\n'), NEW, 2, "1 'question' is NaN, not text (row 2)"),
    "half a line": (data(GOOD + '{"question": "wh'), NEW, 2, "1 of 2 rows cannot be used"),
    "latin-1": (data(GOOD.encode() + '{"question": "é", "answer": "ü"}\n'.encode("latin-1")), NEW, 2, "1 of 2 rows"),
    "a list for a row": (data(GOOD + "[1, 2]\n"), NEW, 2, "1 of 2 rows cannot be used"),
    "a huge row": (data(json.dumps({"question": "x" * 2_000_000, "answer": "y"}) + "\n"), NEW, 2, "1 of 1 rows"),
    "no such field": (data('{"q": "a", "a": "b"}\n'), NEW, 2, "the data has no field 'question'"),
    "link loop": (link_loop, NEW, 2, "data.path"),
    "empty folder for data": (folder_of_nothing, NEW, 2, "numbers.jsonl holds no data files"),
    "parquet cut short": (
        lambda f: (f / "cut.parquet").write_bytes(b"PAR1" + bytes(20)), [*NEW, "data.path={0}/cut.parquet"], 2, "cut.parquet"
    ),
    "calibration data cut away": (lambda f: (f / "facts.jsonl").write_text(""), NEW, 2, "facts.jsonl"),
    "rank 0": (nothing, [*NEW, "method.rank=0"], 2, "method.rank: input should be greater than or equal to 1"),
    "rank above a layer's": (nothing, [*NEW, "method.rank=999"], 2, "999 is larger than"),
    "negative learning rate": (nothing, [*NEW, "training.learning_rate=-1e-3"], 2, "greater than 0, not -0.001"),
    "NaN learning rate": (nothing, [*NEW, "training.learning_rate=.nan"], 2, "greater than 0, not nan"),
    "infinite learning rate": (nothing, [*NEW, "training.learning_rate=.inf"], 2, "greater than 0, not inf"),
    "unknown optimizer": (nothing, [*NEW, "training.optim=adamww"], 2, "training: "),
    "unknown schedule": (nothing, [*NEW, "training.lr_scheduler_type=cosin"], 2, "training: "),
    "max_length that leaves nothing": (nothing, [*NEW, "training.max_length=1"], 2, "rows cannot be used"),
    "init cut short": (
        init_folder(lambda i: cut(i / "factors.model.layers.0.safetensors")), [*NEW, *INIT], 2, "not a whole safetensors file"
    ),
    "init without report": (init_folder(lambda i: (i / "layers.json").unlink()), [*NEW, *INIT], 2, "no complete init"),
    "init with half a report": (init_folder(lambda i: cut(i / "layers.json", 9)), [*NEW, *INIT], 2, "not valid JSON"),
    "init with parts swapped": (init_folder(swap_parts), [*NEW, *INIT], 2, "other modules than this model adapts"),
    "init of another base": (init_folder(other_base), [*NEW, *INIT], 2, "was written for other base weights"),
    "init of another rank": (init_folder(nothing), [*NEW, *INIT, "method.rank=3"], 2, "asks for rank 3"),
    "finished folder": (nothing, [], 2, "holds a finished run; --overwrite replaces it"),
    "finished folder resumed": (nothing, ["--resume"], 2, "holds a finished run"),
    "unfinished folder": (resumed(nothing), [], 2, "--resume continues it"),
    "recipe changed on resume": (resumed(nothing), ["--resume", "seed=1"], 2, "seed was 0 and is 1"),
    "data changed name on resume": (resumed(nothing), ["--resume", "data.path={0}/facts.jsonl"], 2, "another recipe: data.path was"),
    "broken recipe on resume": (resumed(lambda o: (o / "recipe.yaml").write_text("{")), ["--resume"], 2, "is damaged"),
    "broken results of the base": (resumed(lambda o: cut(o / "base/eval.json", 9)), ["--resume"], 2, "not valid JSON"),
    "pickle in a checkpoint": (resumed(planted_pickle), ["--resume"], 2, "checkpoint-2: cannot be read"),
    "output below a file": (nothing, ["--output-dir", "{0}/tiny.yaml/out"], 2, "cannot write to"),
    "output below a link to nothing": (
        lambda f: (f / "link").symlink_to(f / "gone"), ["--output-dir", "{0}/link/out"], 2, "a link to what is not there"
    ),
    "output is a file": (nothing, ["--output-dir", "{0}/tiny.yaml"], 2, "is a file"),
    "output holds a thesis": (nothing, ["--output-dir", "{0}/model"], 2, "holds other files (config.json)"),
    "method file that does not compile": (
        lambda f: (f / "mine.py").write_text("def ("), [*NEW, "--method", "{0}/mine.py"], 2, "mine.py"
    ),
    "method file without a method": (
        lambda f: (f / "mine.py").write_text("x = 1"), [*NEW, "--method", "{0}/mine.py"], 2, "mine.py"
    ),
    "recipe that includes itself": (
        lambda f: (f / "loop.yaml").write_text("include: loop.yaml"), [*NEW, "include={0}/loop.yaml"], 2, "include"
    ),
    "python in a recipe": (
        lambda f: (f / "tiny.yaml").write_text("model: !!python/object/apply:os.mkdir [executed]"), NEW, 2, "not valid YAML"
    ),
}  # fmt: skip


def snapshot(folder):
    """Return a hash of every file that the command was not asked to write."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.relative_to(folder).parts[0] != "new"
        and path.name not in ("log.txt", ".lock", "writes.txt")
    }


@pytest.mark.parametrize("name", CASES)
def test_one_line_the_status_and_nothing_lost(finished, tmp_path, name):
    damage, words, status, message = CASES[name]
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text().replace(str(finished), str(folder)))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    saved = folder / "out" / "recipe.yaml"
    saved.write_text(saved.read_text().replace(str(finished), str(folder)))
    (folder / "log.txt").unlink()
    damage(folder)
    before = snapshot(folder)
    found = run(folder / "tiny.yaml", folder / "out", *(word.format(folder) for word in words), "eval.cache=false")
    log = (folder / "log.txt").read_text()
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert found == status and len(lines) == 1, log[-2000:]
    assert message.format(folder) in lines[0]
    assert "Traceback" not in log
    assert snapshot(folder) == before
    assert not (tmp_path / "executed").exists() and not os.path.exists("executed")


def test_there_are_forty():
    assert len(CASES) >= 40
