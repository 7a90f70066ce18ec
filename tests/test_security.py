"""What a run leaves holds no secret, no code that runs on reading, and nothing outside its folder."""

import pickletools
import zipfile

import pytest
from kill_harness import run
from safetensors import safe_open
from world import make_world

SECRETS = {"HF_TOKEN": "hf_9f8e7d6c5b4a", "OPENAI_API_KEY": "sk-1a2b3c4d5e6f", "WANDB_API_KEY": "w0a1n2d3b4"}
# What torch needs to rebuild tensors and numpy's random state; weights_only loads these and refuses any other name.
HARMLESS = ("torch._utils ", "torch ", "torch.serialization ", "collections OrderedDict", "numpy", "_codecs encode")


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run with secrets in its environment and names that try to leave its folder."""
    folder = tmp_path_factory.mktemp("world")
    facts = str(folder / "facts.jsonl")
    entries = [{"answers": name, "path": facts, "limit": 4} for name in ("../../escaped", "/absolute", "..")]
    recipe = make_world(folder, method={"name": "lora,roselora,lora-null-v1", "rank": 4}, description="d")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        before = set(folder.iterdir())
        assert run(recipe, folder / "out", f"eval.retention={entries}") == 0, (folder / "log.txt").read_text()[-3000:]
    return folder, set(folder.iterdir()) - before


def test_no_secret_in_any_file(left):
    files = [path for path in left[0].rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


def test_nothing_is_written_outside_the_output_folder(left):
    folder, new = left
    assert {path.name for path in new} == {"out", "log.txt", "writes.txt"}
    assert not (folder.parent / "escaped").exists()


def test_weights_are_safetensors_and_nothing_runs_on_reading(left):
    out = left[0] / "out"
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert list(file.keys())
    pickled = [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")]
    assert {path.name for path in pickled} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in pickled:
        with zipfile.ZipFile(path) as archive:
            code = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        names = [argument for opcode, argument, _ in pickletools.genops(code) if opcode.name == "GLOBAL"]
        assert all(name.startswith(HARMLESS) for name in names), (path, names)
