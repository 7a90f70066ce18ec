"""`lora-null init`, through the real command: whole or from files, continued, and continued by others."""

import errno
import json
from contextlib import contextmanager

import engine_worlds
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import load_initialization, logits, save_tiny
from world import base, write_rows

from lora_null import LoraNullConfig
from lora_null.__main__ import main
from lora_null.checkpoint_reader import WeightFiles
from lora_null.layer import adapted_layers
from lora_null.recipes import caches


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    save_tiny(folder / "model", num_hidden_layers=3)
    write_rows(
        folder / "facts.jsonl", [{"question": f"who was king {i} of the {'old ' * (i % 3)}land"} for i in range(60)]
    )
    return folder


def init(world, out, *words):
    usual = {"--model": world / "model", "--calibration": world / "facts.jsonl", "--out": out}
    usual |= {"--dtype": "float32", "--rank": 4, "--max-length": 64, "--device": "cpu"}
    given = (word for option, value in usual.items() if option not in words for word in (option, str(value)))
    return main(["init", *given, *words])


def test_v2_is_a_plain_adapter_that_changes_nothing_yet(world, tmp_path, capsys):
    assert init(world, tmp_path / "out") == 0
    assert "leakage at most" in capsys.readouterr().out
    plain = PeftModel.from_pretrained(base(world), tmp_path / "out" / "adapter").eval()
    assert torch.equal(logits(plain), logits(base(world)))
    state = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) == ("lora_A" in name) for name, tensor in state.items())


def test_v1_is_a_plain_adapter_of_rank_2r(world, tmp_path):
    assert init(world, tmp_path / "out", "--variant", "v1") == 0
    expected = logits(base(world))
    plain = PeftModel.from_pretrained(base(world), tmp_path / "out" / "adapter").eval()
    assert (logits(plain) - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_weights_left_in_their_files_give_the_same_bits(world, tmp_path, variant):
    assert init(world, tmp_path / "whole", "--variant", variant, "--no-cache") == 0
    assert init(world, tmp_path / "files", "--variant", variant, "--no-cache", "--low-memory") == 0
    whole, files = (
        load_file(tmp_path / form / "adapter" / "adapter_model.safetensors") for form in ("whole", "files")
    )
    assert whole.keys() == files.keys() and all(torch.equal(whole[key], files[key]) for key in whole)


def test_any_run_starts_from_what_it_wrote(world, tmp_path):
    assert init(world, tmp_path / "out", "--low-memory") == 0
    peft_model = get_peft_model(base(world), LoraNullConfig(r=4, variant="v1"))
    report, _ = load_initialization(tmp_path / "out" / "init", peft_model)
    assert len(report.layers) == 21
    assert (logits(peft_model.eval()) - logits(base(world))).abs().max() < 1e-4


def test_a_null_basis_lies_in_the_folder_and_serves_a_run(world, tmp_path, capsys):
    options = ["--variant", "nb", "--null-multiple", "2"]
    assert init(world, tmp_path / "whole", *options, "--no-cache") == 0
    assert init(world, tmp_path / "files", *options, "--no-cache", "--low-memory", "--start", "residual") == 0
    models = [get_peft_model(base(world), LoraNullConfig(r=4, variant="nb", null_multiple=2)) for _ in range(2)]
    for model, folder in zip(models, ("whole", "files")):
        load_initialization(tmp_path / folder / "init", model)
    one, other = (adapted_layers(model) for model in models)
    for name, layer in one.items():
        assert torch.equal(layer.bases["default"].vectors, other[name].bases["default"].vectors)
    plain = PeftModel.from_pretrained(base(world), tmp_path / "files" / "adapter").eval()
    assert (logits(plain) - logits(base(world))).abs().max() < 1e-4
    assert init(world, tmp_path / "v2", "--null-multiple", "2") == 2
    assert "error: --null-multiple: is of variant 'nb', this one is 'v2'" in capsys.readouterr().err


def test_a_second_init_is_reused_from_the_cache(world, tmp_path, capsys):
    assert init(world, tmp_path / "one", "--samples", "7") == 0
    assert init(world, tmp_path / "two", "--samples", "7", "--variant", "v1") == 0
    assert "reused, model, calibration and settings are the same" in capsys.readouterr().err


def test_two_processes_give_the_factors_of_one(world, tmp_path):
    words = ["--calibration", str(world / "facts.jsonl"), "--dtype", "float32", "--rank", "4", "--max-length", "64"]
    words += ["--model", str(world / "model"), "--out", str(tmp_path / "two"), "--device", "cpu", "--no-cache"]
    said = tmp_path / "said.txt"
    ended = engine_worlds.world(2, ["init", *words], said, run=main)
    assert ended == [0, 0], said.read_text()[-2000:]
    assert said.read_text().count("written:") == 1
    assert init(world, tmp_path / "one", "--no-cache") == 0
    one, two = (load_file(tmp_path / form / "adapter" / "adapter_model.safetensors") for form in ("one", "two"))
    for key in one:  # a forward pass on one thread rounds otherwise than on two, by 2e-5 of a factor's entries
        assert (one[key] - two[key]).norm() <= 1e-4 * one[key].norm(), key


SELF = ("--calibration", "self")  # for which the model would be loaded


@pytest.mark.parametrize(
    "words, line",
    [
        (["--rank", "33"], "r: 33 is larger than model.layers.0.self_attn.q_proj allows"),
        (["--field", "qestion"], "--field: the data has no field 'qestion' (did you mean 'question'?)"),
        ([*SELF, "--rank", "33"], "r: 33 is larger than model.layers.0.self_attn.q_proj allows"),
        (
            [*SELF, "--target-modules", "q_porj"],
            "error: --target-modules: no module matches 'q_porj' (did you mean 'q_proj'?)",
        ),
        ([*SELF, "--null-energy", "0.9"], "error: --null-energy: is of variant 'nb'"),
        ([*SELF, "--device", "gpu"], "--device"),
        (["--residual"], "no option '--residual'"),
        (["--samples", "0"], "error: --samples: input should be greater than or equal to 1"),
        (["--template", "{qestion}"], "error: --template: the data has no field 'qestion' (did you mean 'question'?)"),
        (["--template", "{question"], "a { without its partner"),
        (["--quantization", "nf4", "--low-memory"], "--quantization: not with --low-memory"),
        (["--device", "gpu"], "--device"),
        (["--model", "/nowhere"], "no folder /nowhere"),
        (["--samples", "1"], "at least 256 are needed"),
        (["--out", "{tmp}/file"], "--out: cannot write to"),
        (["--target-modules", ""], "--target-modules: No `target_modules` passed"),
        (
            ["--target-modules", "q_porj"],
            "error: --target-modules: no module matches 'q_porj' (did you mean 'q_proj'?)",
        ),
        (["--target-modules", "("], "error: --target-modules: a pattern is no regular expression (missing )"),
        (["--calibration", "self", "--field", "text"], "calibration: 'field' goes with a path"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, capsys, monkeypatch, words, line):
    monkeypatch.setattr(caches, "written_windows", lambda *_: pytest.fail("the model writes"))
    (tmp_path / "file").touch()
    assert (
        init(world, tmp_path / "out", *(word.format(tmp=tmp_path) if "tmp" in word else word for word in words)) == 2
    )
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "adapter").exists()


def test_each_option_is_named_once(capsys):
    assert main(["check", "x", "--zzz"]) == 2
    assert "no option '--zzz' (choose from: --base, --help, --trust-remote-code)" in capsys.readouterr().err


def test_an_existing_adapter_is_not_overwritten(world, tmp_path, capsys):
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    assert init(world, tmp_path / "out") == 2
    assert "holds an adapter already" in capsys.readouterr().err


def test_an_init_that_a_full_disk_ended_is_given_again(world, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(LoraConfig, "save_pretrained", full)
        assert init(world, tmp_path / "out") == 1
    assert "give the command again (`train` with --resume)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists() and init(world, tmp_path / "out") == 0


def test_one_layer_at_a_time_has_its_weights(world, tmp_path, monkeypatch):
    loaded, whole = [], WeightFiles.loaded

    @contextmanager
    def watched(self, module, name):
        with whole(self, module, name):
            loaded.append(module)
            assert not any(p.is_meta for p in module.parameters())
            assert all(p.is_meta for m in loaded[:-1] for n, p in m.named_parameters() if "lora_" not in n)
            yield

    monkeypatch.setattr(WeightFiles, "loaded", watched)
    assert init(world, tmp_path / "out", "--low-memory", "--no-cache") == 0
    assert len(loaded) == 3
