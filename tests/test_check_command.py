"""`lora-null check`: each thing that can be wrong with an adapter is found, and a loader like vLLM's agrees."""

import codecs
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import logits, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_null.__main__ import main
from lora_null.adapters import base_hash
from lora_null.adapters.inspection import VLLM_RANKS, vllm_rank
from lora_null.adapters.plain import save_plain_adapter
from lora_null.recipes.card import license_of, write_run_card
from lora_null.recipes.commands.arguments import build_parser
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.run_folder import MARK
from lora_null.recipes.results import Budget, Results, Row, write_row
from lora_null.recipes.trained import find_trained
from lora_null.utils.errors import UserError

Q, K = (f"base_model.model.model.layers.0.self_attn.{name}_proj" for name in "qk")

OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("check") / "model")


@pytest.fixture
def adapter(base, tmp_path):
    """A sound adapter as a run saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    save_plain_adapter(get_peft_model(model, config), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def cut(rank):
    def change(tensors):
        tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"][:rank].contiguous()
        tensors[f"{Q}.lora_B.weight"] = tensors[f"{Q}.lora_B.weight"][:, :rank].contiguous()

    return change


def swap(tensors):
    A, B = tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"]
    tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"] = B.clone(), A.clone()


def half(tensors):
    tensors[f"{K}.lora_B.weight"] = tensors[f"{K}.lora_B.weight"].half()


def spoil(tensors):
    tensors[f"{K}.lora_B.weight"][0, 0] = math.nan


def silence(which):
    return lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if f"lora_{which}" in key]


def drop(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


def add(key, shape=(4,)):
    return lambda tensors: tensors.update({key: torch.ones(shape)})


WRONG = {
    "swapped A and B": (swap, {}, "lora_A is (32, 8), the base needs (r, 32)"),
    "mixed rank": (cut(5), {}, "has rank 5, the config says r = 8"),
    "config's rank": (None, {"r": 16}, "has rank 8, the config says r = 16"),
    "rank pattern": (cut(5), {"rank_pattern": {"q_proj": 5}}, "rank_pattern is set: vLLM drops it"),
    "alpha pattern": (None, {"alpha_pattern": {"q_proj": 5}}, "alpha_pattern is set: vLLM drops it"),
    "rank without room": (None, {"r": 600}, "vLLM serves at most 512"),
    "prefix": (rename(f"{Q}.lora_A.weight", f"{Q[17:]}.lora_A.weight"), {}, "without the prefix servers give the bare base"),
    "adapter's name": (rename(f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight"), {}, "the adapter's name does not belong"),
    "half a pair": (drop(f"{Q}.lora_B.weight"), {}, "model.layers.0.self_attn.q_proj: has no lora_B"),
    "missing target": (drop(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"), {}, "is named by target_modules, but the file has"),
    "no such module": (rename(f"{Q}.lora_A.weight", f"{Q}x.lora_A.weight"), {}, "the base has no such module"),
    "no linear": (add("base_model.model.model.norm.lora_A.weight", (8, 32)), {}, "model.norm: is no linear layer"),
    "saved module": (add("base_model.model.lm_head.weight"), {}, "base_model.model.lm_head.weight: is not named"),
    "modules_to_save": (None, {"modules_to_save": ["lm_head"]}, "modules_to_save is set, which vLLM does not serve"),
    "bias": (None, {"bias": "all"}, "bias is 'all': vLLM serves no bias"),
    "DoRA": (None, {"use_dora": True}, "use_dora is set"),
    "aLoRA": (None, {"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is set, which vLLM does not serve"),
    "bias of B": (None, {"lora_bias": True}, "lora_bias is set, which vLLM does not serve"),
    "other tuner": (None, {"peft_type": "LOHA"}, "peft_type is 'LOHA', must be 'LORA'"),
    "not targeted": (None, {"target_modules": ["q_proj"]}, "self_attn.k_proj: has A and B, but target_modules does not name"),
    "PiSSA": (None, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', so its A and B are no change"),
    "no pattern": (None, {"target_modules": "["}, "PEFT does not accept it (unterminated character set"),
    "no targets": (None, {"target_modules": None}, "target_modules is missing"),
    "PEFT refuses": (None, {"layers_pattern": "h", "layers_to_transform": None}, "PEFT does not accept it"),
    "mixed dtypes": (half, {}, "mixes dtypes: float16, float32"),
    "NaN": (spoil, {}, f"{K}.lora_B.weight: holds NaN"),
    "without effect": (silence("A"), {}, "changes nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(adapter, capsys, case):
    tensors, config, line = WRONG[case]
    if tensors:
        change_tensors(adapter, tensors)
    if config:
        change_config(adapter, **config)
    assert main(["check", str(adapter)]) == 1
    said = capsys.readouterr()
    assert line in said.out and "not sound" in said.out and "serve:" not in said.out and not said.err


def test_a_sound_adapter_and_its_serve_command(adapter, base, capsys):
    assert main(["check", str(adapter)]) == 0
    sound, serve = capsys.readouterr().out.splitlines()
    assert sound == f"sound: 14 modules, rank 8, scaling 0.5, float32, 0.0M parameters, for {base}"
    assert serve == (
        f"serve: vllm serve {base} --enable-lora --max-lora-rank 8 --dtype float32 "
        f"--lora-modules {adapter.parent.name}={adapter}"
    )


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_is_saved_without_the_head(tmp_path, capsys, tied, bias):
    base = save_tiny(tmp_path / "model", tie_word_embeddings=tied, attention_bias=True)
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # noqa: E731
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, bias=bias)
    live = get_peft_model(load(), config)
    save_plain_adapter(live, tmp_path / "adapter")
    assert main(["check", str(tmp_path / "adapter")]) == (bias == "all")
    assert "lm_head" not in capsys.readouterr().out
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(key.endswith("q_proj.base_layer.bias") for key in keys) == (bias == "all")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")), logits(live))


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_by_peft_holds_a_copy_of_the_head(tmp_path, capsys, tied):
    base = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live = get_peft_model(live, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    live.save_pretrained(tmp_path / "a")
    file, copied = tmp_path / "a" / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(file)
    assert copied in tensors
    assert main(["check", str(tmp_path / "a")]) == 0
    assert main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    assert copied not in load_file(tmp_path / "out" / "adapter_model.safetensors")
    tensors[copied][0, 0] += 0.01
    save_file(tensors, file)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "a")]) == 1
    assert f"{copied}: is another weight than {base} has" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "other")]) == 2
    assert f"{copied}: is another weight than" in capsys.readouterr().err


def test_the_folder_of_a_run_and_an_adapter_of_another_kind(base, tmp_path, capsys):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), OFTConfig(r=4, oft_block_size=0))
    model.save_pretrained(tmp_path / "run" / "oft" / "adapter")
    (tmp_path / "run" / "recipe.yaml").write_text(f"{MARK}model: {{}}\n")
    assert main(["check", str(tmp_path / "run" / "oft")]) == 2
    assert "holds an adapter of PEFT's OFT, no LoRA; merge_and_unload() of PEFT" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "run")]) == 2
    assert "a run; give one of its methods (choose from: oft)" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run"), "--resume"]) == 2
    assert f"is the folder of a run; give {tmp_path / 'run' / 'recipe.yaml'}" in capsys.readouterr().err


def test_a_method_on_another_disk_is_one_of_the_run_that_links_to_it(adapter, base, tmp_path):
    run = tmp_path / "run"
    for folder in (run, tmp_path / "disk"):
        folder.mkdir()
    (run / "recipe.yaml").write_text(MARK + json.dumps({"model": {"name_or_path": str(base)}}))
    adapter.rename(tmp_path / "disk" / "adapter")
    (run / "lora").symlink_to(tmp_path / "disk")
    (tmp_path / "best").symlink_to(run / "lora")
    for named in (run / "lora", run / "lora" / "adapter"):
        found = find_trained(named)
        assert (found.run, found.method, found.folder) == (run, "lora", run / "lora" / "adapter")
    (run / "lora").unlink()
    (tmp_path / "disk").rename(run / "lora")
    assert find_trained(tmp_path / "best").run == run


def test_why_a_method_has_no_weights(tmp_path):
    for name in ("out", "out/cells/seed=0"):
        (tmp_path / name / "lora").mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text(MARK + "model: {name_or_path: x}")
    run, cell = tmp_path / "out" / "lora", tmp_path / "out" / "cells" / "seed=0" / "lora"
    for row, folder, told in (
        (None, run, "neither an adapter nor a model yet; finish the run with --resume"),
        (Row(method="lora", diverged=2), run, "diverged at step 2 and left no weights"),
        (Row(method="lora"), run, "finish the run with --resume"),
        (Row(method="lora"), cell, r"the grid kept none \(grid.keep_weights\), or they were removed"),
    ):
        if row is not None:
            write_row(folder, row)
        with pytest.raises(UserError, match=told):
            find_trained(folder)


def test_a_base_with_code_of_its_own(adapter, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", None)  # nobody is asked
    own = shutil.copytree(base, tmp_path / "own")
    (own / "own.py").write_text(OWN_MODEL)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((own / "config.json").read_text()) | {"model_type": "own", "auto_map": code}
    (own / "config.json").write_text(json.dumps(config))
    change_config(adapter, base_model_name_or_path=str(own))
    for command in (["check"], ["dial", "--keep", "x"], ["export", "--out", str(tmp_path / "out")]):
        assert main([*command, str(adapter)]) == 2
        assert "once you have read that, --trust-remote-code runs it" in capsys.readouterr().err
        arguments = build_parser()[0].parse_args([*command, str(adapter), "--trust-remote-code"])
        assert arguments.trust_remote_code
    assert main(["check", str(adapter), "--trust-remote-code"]) == 0
    assert "--trust-remote-code" in capsys.readouterr().out.partition("serve: ")[2]
    assert find_trained(adapter, trust=True).base.empty
    adapter.rename((tmp_path / "run" / "lora").mkdir(parents=True) or tmp_path / "run" / "lora" / "adapter")
    recipe = {"model": {"name_or_path": str(own), "trust_remote_code": False}}
    (tmp_path / "run" / "recipe.yaml").write_text(MARK + json.dumps(recipe))
    assert main(["check", str(tmp_path / "run" / "lora")]) == 2
    assert find_trained(tmp_path / "run" / "lora", trust=True).base.empty
    (tmp_path / "run" / "recipe.yaml").write_text(MARK + json.dumps(recipe).replace("false", "true"))
    assert main(["check", str(tmp_path / "run" / "lora")]) == 0


@pytest.mark.parametrize(
    ("quantized", "name"),
    [
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
        (BitsAndBytesConfig(load_in_8bit=True), "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_an_adapter_of_a_quantized_base_says_so(base, tmp_path, capsys, quantized, name):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.quantization_config = quantized
    live = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    save_plain_adapter(live, tmp_path / "adapter")
    assert main(["check", str(tmp_path / "adapter")]) == 0
    note = f"note: trained on the base quantized to {name}; on the base as it is, figures differ"
    assert capsys.readouterr().out.splitlines()[0] == note
    own = shutil.copytree(base, tmp_path / "own")  # whose files are quantized: nothing is to be said
    config = json.loads((own / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (own / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path / "adapter"), "--base", str(own)]) == 0
    assert "note:" not in capsys.readouterr().out


def test_the_card_of_a_run_on_a_quantized_base_under_a_license_with_a_name(tmp_path):
    head = {"license": "other", "license_name": "some-research", "license_link": "https://some.where/LICENSE"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n")
    words = ["model.quantization=nf4", f"model.name_or_path={tmp_path / 'base'}"]
    plan = SimpleNamespace(name="lora", saves="adapter")
    write_run_card(tmp_path / "run" / "lora", load_recipe("quickstart", words), plan, None)
    card = ModelCard.load(tmp_path / "run" / "lora" / "README.md")
    assert "`lora-null train RUN/recipe.yaml --resume` goes on" in card.text and str(tmp_path) not in card.text
    assert card.data.to_dict() | head == card.data.to_dict()
    assert "The base is under some-research, which" in card.text
    assert "Trained on the base quantized to nf4; on the base as it is, figures differ." in card.text
    (tmp_path / "base" / "README.md").write_text("---\nlicense: llama3\nlicense_link: LICENSE\n---\n")
    assert license_of("base", tmp_path / "base" / "README.md") == {"license": "llama3"}


def test_the_cards_of_a_run_tell_of_the_budget_and_of_no_folder_of_this_machine(tmp_path):
    home, plan = tmp_path / "run" / "lora", SimpleNamespace(name="lora", saves="adapter")
    (home / "adapter").mkdir(parents=True)
    held = {"measure": "a_b kl", "at_most": 0.1, "then": "scale", "step": 9, "steps": 9, "value": 0.0, "n": 9}
    for strength, again in ((0.0865, False), (0.0, True)):
        rows = [Row(method="base"), Row(method="lora", budget=Budget(strength=strength, kept=True, **held))]
        write_run_card(home, load_recipe("quickstart", []), plan, Results(recipe="r", model="m", rows=rows))
        cards = [(folder / "README.md").read_text() for folder in (home, home / "adapter")]
        for card, where in zip(cards, ("`adapter/`", "this folder")):
            assert f"The adapter is in {where}; `lora-null export RUN/lora --out DIR`" in card
            assert f"(strength {strength:g})" in card and r"a\_b" in card and str(tmp_path) not in card
            assert ("LoRA is the base again: the budget left nothing of its training." in card) == again
            assert "The budget of forgetting: " in card and "NOT kept" not in card
    rows[1].budget.kept = False
    write_run_card(home, load_recipe("quickstart", []), plan, Results(recipe="r", model="m", rows=rows))
    assert "The budget of forgetting is NOT kept: " in (home / "README.md").read_text()
    repaired = Row(method="lora-repaired", budget=rows[1].budget.model_copy(update={"weight": 0.1, "kept": True}))
    write_row(tmp_path / "run" / "lora-repaired", repaired)
    write_run_card(
        home, load_recipe("quickstart", []), plan, Results(recipe="r", model="m", rows=[rows[0], Row(method="lora")])
    )
    assert (
        "This adapter is beyond the run's budget of forgetting; lora-repaired keeps it."
        in (home / "README.md").read_text()
    )


def test_a_card_names_a_relative_path_as_the_whole_one_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "facts.jsonl").write_text('{"text": "a"}')
    plan, cards = SimpleNamespace(name="lora", saves="adapter"), []
    for path in ("t/facts.jsonl", str(tmp_path / "t" / "facts.jsonl")):
        write_run_card(tmp_path / "lora", load_recipe("quickstart", [f"calibration.path={path}"]), plan, None)
        cards.append((tmp_path / "lora" / "README.md").read_text())
    assert cards[0] == cards[1] and "measured on facts.jsonl" in cards[0]


def test_the_hash_of_another_revision_is_left_out(base, tmp_path, monkeypatch):
    """The hub's cache holds `main`, and no one can say which revision the live model was loaded from."""
    other = save_tiny(tmp_path / "other", seed=1)
    monkeypatch.setattr(base_hash, "try_to_load_from_cache", lambda name, file, revision=None: str(base / file))
    for folder, dtype, revision, known in (
        (base, torch.float32, None, True),
        (base, torch.bfloat16, None, True),
        (other, torch.float32, None, False),
        (other, torch.float32, "v1", True),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        config = LoraConfig(target_modules=["q_proj"], revision=revision)
        live = get_peft_model(model, config)
        live.peft_config["default"].base_model_name_or_path = "org/model"
        for _ in range(2):
            assert (base_hash.FINGERPRINT in base_hash.base_metadata(live)) is known
            live.resize_token_embeddings(120)  # tokens were added
            live.float()


def test_the_serve_command_names_the_revision_of_the_base(adapter, capsys):
    change_config(adapter, revision="v1")
    assert main(["check", str(adapter)]) == 0
    assert "--max-lora-rank 8 --revision v1 --dtype float32" in capsys.readouterr().out


def test_the_serve_command_of_the_folder_one_stands_in(adapter, capsys, monkeypatch):
    named = adapter.rename(adapter.parent / "my adapter")
    monkeypatch.chdir(named)
    assert main(["check", "."]) == 0
    assert capsys.readouterr().out.strip().endswith("--lora-modules 'my adapter=.'")


def test_an_initialization_is_sound_and_said_to_be_untrained(adapter, capsys):
    change_tensors(adapter, silence("B"))
    assert main(["check", str(adapter)]) == 0
    *notes, sound, _ = capsys.readouterr().out.splitlines()
    assert notes[-1].startswith("note: not trained yet") and sound.startswith("sound: ")


def test_another_base_is_found(adapter, tmp_path, capsys):
    save_tiny(tmp_path / "weights", seed=1)
    save_tiny(tmp_path / "shape", hidden_size=64)
    assert main(["check", str(adapter), "--base", str(tmp_path / "weights")]) == 1
    assert "trained on another base" in capsys.readouterr().out
    assert main(["check", str(adapter), "--base", str(tmp_path / "shape")]) == 1
    assert "lora_A is (8, 32), the base needs (r, 64)" in capsys.readouterr().out


def test_a_pickle_beside_it_is_found(adapter, capsys):
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert main(["check", str(adapter)]) == 1
    assert "adapter_model.bin: a pickle" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, line",
    [
        (["{base}"], "holds no adapter (adapter_config.json is missing)"),
        (["{base}/nowhere"], "no such folder"),
        (["{adapter}", "--base", "/nowhere"], "no folder /nowhere"),
    ],
)
def test_mistakes_are_one_line(adapter, base, capsys, words, line):
    assert main(["check", *(word.format(base=base, adapter=adapter) for word in words)]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_a_base_that_was_moved_is_told_by_who_names_it(adapter, capsys):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/model"}))
    assert main(["check", str(adapter)]) == 2
    told = "the base that the adapter's config names: no folder /nowhere/model; --base names the right one"
    assert capsys.readouterr().err == f"error: {told}\n"
    assert main(["export", str(adapter), "--out", str(adapter / "out")]) == 2
    assert capsys.readouterr().err == f"error: {adapter}: {told}\n"


def test_damaged_files_are_one_line(adapter, capsys):
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-10])
    assert main(["check", str(adapter)]) == 2
    assert "damaged" in capsys.readouterr().err
    config = adapter / "adapter_config.json"
    config.write_bytes(codecs.BOM_UTF8 + config.read_bytes())
    assert main(["check", str(adapter)]) == 2
    told = "begins with a byte order mark, which PEFT and transformers do not read; save it as UTF-8 without one"
    assert capsys.readouterr().err == f"error: {config}: {told}\n"
    config.write_text("{")  # whose only copy it may be
    assert main(["check", str(adapter)]) == 2
    assert f"{config}: damaged, not valid JSON (Expecting property name" in (err := capsys.readouterr().err)
    assert "remove it" not in err


def test_ranks():
    assert [vllm_rank(r) for r in (1, 2, 8, 257, 512, 513)] == [1, 8, 8, 320, 512, None] and len(VLLM_RANKS) == 9


def loaded_as_vllm_does(folder, model, max_lora_rank):
    """Add an adapter to a model by vLLM's rules: one rank and one scaling, names by their last part, zeros elsewhere."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys() and config["r"] <= max_lora_rank
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    served = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for key in tensors:
        *module, which, last = key.removeprefix("base_model.model.").split(".")
        assert key.startswith("base_model.model.") and which in ("lora_A", "lora_B") and last == "weight"
        assert module[-1] in served
    for name, linear in model.named_modules():
        A = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if A is not None:
            slot_A, slot_B = torch.zeros(max_lora_rank, A.shape[1]), torch.zeros(len(linear.weight), max_lora_rank)
            slot_A[: len(A)] = A
            slot_B[:, : len(A)] = tensors[f"base_model.model.{name}.lora_B.weight"] * scaling
            linear.weight.data += slot_B @ slot_A
    return model


def test_a_loader_like_vllms_gives_what_peft_gives(base, tmp_path):
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # noqa: E731
    config = LoraConfig(
        r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear", init_lora_weights=False,
        rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 9},
    )  # fmt: skip
    torch.manual_seed(0)
    live = get_peft_model(load(), config)
    save_plain_adapter(live, tmp_path / "plain")
    live.save_pretrained(tmp_path / "patterns")
    assert main(["check", str(tmp_path / "plain")]) == 0 and main(["check", str(tmp_path / "patterns")]) == 1
    served = logits(loaded_as_vllm_does(tmp_path / "plain", load(), 16))
    assert (served - logits(live)).abs().max() < 1e-4
    assert (logits(PeftModel.from_pretrained(load(), tmp_path / "plain")) - logits(live)).abs().max() < 1e-4
    wrong = logits(loaded_as_vllm_does(tmp_path / "patterns", load(), 16))  # what the check keeps users from
    assert (wrong - logits(live)).abs().max() > 1e-2


def test_no_weights_of_the_base_are_loaded(adapter, base, monkeypatch):
    def loaded(*words, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    assert main(["check", str(adapter)]) == 0
    assert isinstance(tiny_model().config, LlamaConfig)


def test_a_cached_configuration_is_no_checkpoint(tmp_path, monkeypatch):
    """As `lora-null check` itself leaves one of a base on the hub; shards have to be there, all of them."""
    (tmp_path / "config.json").write_text("{}")

    def cached(name, file, revision=None):
        return str(tmp_path / file) if (tmp_path / file).is_file() else None

    monkeypatch.setattr(base_hash, "try_to_load_from_cache", cached)
    assert base_hash.checkpoint_on_disk("org/model") is None
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert base_hash.checkpoint_on_disk("org/model") is None
    (tmp_path / "model-2.safetensors").touch()
    assert base_hash.checkpoint_on_disk("org/model") == tmp_path
