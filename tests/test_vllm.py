"""The vllm backend: refused in one line where it is not installed, and what it is asked where it is (a stand-in here)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from world import make_world, write_rows

from lora_null.adapters.plain import CONFIG_FILE, state_of
from lora_null.adapters.saved import read_adapter
from lora_null.adapters.truncate import MOST_LOST, lost_in_16_bits
from lora_null.eval_harness.lm_eval.model import BlankLM
from lora_null.eval_harness.lm_eval.vllm import check_vllm, open_vllm
from lora_null.recipes.__main__ import main
from lora_null.recipes.measure import _as_it_is_served
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_safetensors


@pytest.fixture
def engine(monkeypatch):
    """Stand in for lm-eval's engine; return the arguments it was made with."""
    asked = []

    class VLLM(BlankLM):
        def __init__(self, **options):
            super().__init__()
            served = Path(options.get("lora_local_path", "none"))  # a copy may be gone after the evaluation
            pairs = read_adapter(served).pairs() if (served / CONFIG_FILE).is_file() else {}
            asked.append(options | {"pairs": pairs})

    module = ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "vllm" or found(name, *rest))
    return asked


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_refused_where_it_is_not_installed(tmp_path, capsys):
    recipe = str(make_world(tmp_path))
    capsys.readouterr()  # a progress bar for writing the model
    assert main([recipe, "eval.backend=vllm"]) == 2
    assert (
        capsys.readouterr().err
        == "error: eval.backend: vllm is not installed here; eval.backend=hf evaluates without it\n"
    )
    assert not (tmp_path / "out").exists()


def test_lm_evals_tasks_run_on_the_saved_adapter(tmp_path, engine):
    gsm = write_rows(tmp_path / "g.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)])
    task = {"task": "gsm8k", "path": str(gsm), "num_fewshot": 0, "metric": "flexible-extract"}
    numbers = {"answers": "numbers", "path": str(tmp_path / "numbers.jsonl"), "limit": 4}
    recipe = make_world(tmp_path, eval={"task": [task, numbers], "backend": "vllm", "cache": False})
    keys = ["eval.vllm.max_model_len=512", "eval.vllm.memory_share=0.5"]
    assert main([str(recipe), "--method", "lora,lora-null-v1", "training.save_strategy=no", *keys]) == 0
    out = tmp_path / "out"
    assert [options.get("lora_local_path") for options in engine[:2]] == [None, str(out / "lora" / "adapter")]
    saved, served = read_adapter(out / "lora-null-v1" / "adapter").pairs(), engine[2]["pairs"]
    assert served.keys() == saved.keys()  # factors that 16 bits hold, of the same products
    for name, (A, B) in served.items():
        assert lost_in_16_bits(A, B) <= MOST_LOST
        product = saved[name][1].double() @ saved[name][0].double()
        assert torch.allclose(B.double() @ A.double(), product, atol=1e-5 * product.norm())
    assert {options["trust_remote_code"] for options in engine} == {False}
    assert all(Path(options["tokenizer"]).name == "tokenizer" for options in engine)
    assert {options["pretrained"] for options in engine} == {str(tmp_path / "model")}
    assert [options.get("max_lora_rank") for options in engine] == [None, 8, 8]
    assert {
        (made["tensor_parallel_size"], made["max_model_len"], made["gpu_memory_utilization"]) for made in engine
    } == {(1, 512, 0.5)}
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows[2]["metrics"]["gsm8k/flexible-extract"]["value"] == pytest.approx(1 / 3)  # it always says 0
    assert rows[2]["metrics"]["numbers nll"]["n"] == 4
    assert json.loads((out / "lora" / "eval.json").read_text())["settings"]["backend"] == "vllm"


def test_an_adapter_whose_products_cancel_is_measured_as_16_bits_hold_it(tmp_path):
    torch.manual_seed(0)
    A0, B0 = torch.randn(4, 32), torch.randn(24, 4)
    pair = torch.cat([A0 + 1e-3, A0]), torch.cat([B0 + 1e-3, -B0], dim=1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_safetensors(
        folder / "adapter_model.safetensors", state_of({"model.layers.0.mlp.up_proj": pair}), {"base": "x"}
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    (tmp_path / "scratch").mkdir()
    served = _as_it_is_served(folder, tmp_path / "scratch")
    (A, B), metadata = read_adapter(served).pairs()["model.layers.0.mlp.up_proj"], read_adapter(served).metadata
    assert served != folder and metadata["base"] == "x" and (served / "adapter_config.json").is_file()
    assert torch.allclose(B.double() @ A.double(), pair[1].double() @ pair[0].double(), atol=1e-6)
    balanced = {"model.layers.0.mlp.up_proj": (A, B)}
    write_safetensors(folder / "adapter_model.safetensors", state_of(balanced), {})
    assert _as_it_is_served(folder, tmp_path) == folder


def test_its_keys_are_not_for_another_engine(tmp_path, capsys):
    assert main([str(make_world(tmp_path)), "eval.vllm.tensor_parallel=2"]) == 2
    assert "eval: vllm is for backend: vllm" in capsys.readouterr().err


def test_ranks(engine, tmp_path):
    check_vllm()
    with pytest.raises(UserError, match=r"eval.vllm.tensor_parallel: asks for 64 GPUs, and \d are here"):
        check_vllm(64)
    options = {"dtype": "bfloat16", "revision": None}
    open_vllm("m", tmp_path, rank=256, **options)
    open_vllm("m", tmp_path, rank=257, **options)
    assert [made["max_lora_rank"] for made in engine] == [256, 320]
    with pytest.raises(UserError, match="up to rank 512, this adapter saves 513"):
        open_vllm("m", tmp_path, rank=513, **options)
