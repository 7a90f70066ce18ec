"""`lora-null export`, through the real command: every method, every form, against what the run itself saved."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import logits, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from world import base, make_world

import lora_null.adapters.gguf
from lora_null.__main__ import main
from lora_null.adapters.base_hash import base_fingerprint
from lora_null.adapters.merge import deltas_of, write_checkpoint
from lora_null.adapters.plain import state_of
from lora_null.adapters.saved import read_adapter
from lora_null.adapters.truncate import balanced_where_they_cancel, lost_in_16_bits, truncate
from lora_null.adapters.verify import compare
from lora_null.checkpoint_reader import WeightFiles
from lora_null.recipes.__main__ import main as recipes
from lora_null.recipes.commands import export as command
from lora_null.recipes.models import bases
from lora_null.recipes.results import Budget, Row, write_row
from lora_null.recipes.trained import Trained, find_trained
from lora_null.utils.errors import UserError
from lora_null.utils.files import beside, check_free, replacing_folder, write_safetensors

ADAPTERS = ("lora", "lora-fa", "pissa", "milora", "corda", "roselora", "lora-null-v1", "lora-null-v2")
ADAPTERS += ("mica", "eva", "lora-ga")
TWICE = ("pissa", "milora", "corda", "lora-null-v1", "lora-ga")
WHOLE = ("full", "osf")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    options = {"eva": {"rows": 16}, "lora-ga": {"rows": 4}}
    method = {"name": ", ".join(ADAPTERS + WHOLE), "rank": 4, "alpha": 8, "options": options}
    recipe = make_world(folder, method=method)
    small = ["training.max_steps=2", "training.save_strategy=no", "eval.retention=[]"]
    assert recipes([str(recipe), *small]) == 0
    return folder


def export(world, method, out, *words):
    return main(["export", str(world / "out" / method), "--out", str(out), *words])


def trained(world, method):
    return PeftModel.from_pretrained(base(world), world / "out" / method / "adapter")


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_method_as_an_adapter_and_merged(world, tmp_path, method):
    expected = logits(trained(world, method))
    assert (expected - logits(base(world))).abs().max() > 1e-3
    assert export(world, method, tmp_path / "adapter") == 0
    again = PeftModel.from_pretrained(base(world), tmp_path / "adapter")
    if method in TWICE:  # factors whose products cancel may be those of an SVD, see below
        assert (logits(again) - expected).abs().max() < 1e-4
    else:
        assert torch.equal(logits(again), expected)
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    if method != "eva":
        assert config.r == (8 if method in TWICE else 4)
    assert {
        len(A) for name, A in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "lora_A" in name
    } == {config.r}
    assert export(world, method, tmp_path / "merged", "--form", "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.float32 and (logits(merged) - expected).abs().max() < 1e-4
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (world / "model", tmp_path / "merged")
    )
    assert before == after  # as whatever wrote it: another version of transformers reads its own keys


def test_factors_that_cancel_are_written_so_that_16_bits_hold_their_product(world, tmp_path, capsys):
    """As vLLM and SGLang take them: what was trained is 99.9% A0 and B0, of which nothing is left in the sum."""
    own = read_adapter(world / "out" / "lora-null-v1" / "adapter")
    # after few steps: A = A0 + a little, by which its numbers are rounded otherwise
    few = tmp_path / "few"
    shutil.copytree(own.folder, few)
    pairs = own.pairs()
    torch.manual_seed(0)
    for A, B in pairs.values():
        r = len(A) // 2
        A[:r], B[:, :r] = (factor * (1 + 0.01 * torch.randn(factor.shape)) for factor in (A[r:], -B[:, r:]))
    save_file(
        {k: v.contiguous() for k, v in state_of(pairs).items()},
        few / "adapter_model.safetensors",
        own.metadata | {"format": "pt"},
    )
    assert main(["export", str(few), "--base", str(world / "model"), "--out", str(tmp_path / "out")]) == 0
    assert "Where those that were trained nearly cancel, the factors are those of ΔW" in capsys.readouterr().out
    written = read_adapter(tmp_path / "out").pairs()

    def lost(A, B, wanted):
        rounded = B.bfloat16().double() @ A.bfloat16().double()
        return float((rounded - wanted).norm() / wanted.norm())

    for name, (A, B) in pairs.items():
        wanted = B.double() @ A.double()
        assert lost(A, B, wanted) > 0.1 and lost(*written[name], wanted) < 0.01
        assert lost_in_16_bits(A, B) == pytest.approx(lost(A, B, wanted), rel=0.5)
    assert main(["check", str(few), "--base", str(world / "model")]) == 0
    assert "note: its factors nearly cancel" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "out"), "--base", str(world / "model")]) == 0
    assert "nearly cancel" not in capsys.readouterr().out


def test_only_factors_that_cancel_are_written_anew():
    """Of layers that have moved unevenly most lose nothing, and one nearly all."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((4, 32), (24, 4)))
    near = torch.cat([A, A + 1e-3 * torch.randn(4, 32, generator=generator)]), torch.cat([B, -B], 1)
    pairs = {"one": (A, B), "two": (2 * A, B), "three": near}
    found, lost = balanced_where_they_cancel(pairs)
    assert lost > 0.5 and all(found[name] is pairs[name] for name in ("one", "two"))
    wanted = near[1].double() @ near[0].double()
    assert torch.dist(found["three"][1].double() @ found["three"][0].double(), wanted) < 1e-5 * wanted.norm()
    assert lost_in_16_bits(*found["three"]) < 0.01


@pytest.mark.parametrize("d_out, d_in", [(4, 16), (16, 4), (4, 3)])
@pytest.mark.parametrize("k", [2, 6, 8])
def test_a_linear_narrower_than_the_rank_is_truncated(d_out, d_in, k):
    """A residual's factors have rank 2r, which may be more than a narrow layer's width: of SmolLM2's keys at rank 128."""
    torch.manual_seed(0)
    A, B = torch.randn(8, d_in), torch.randn(d_out, 8)
    A_k, B_k, error = truncate(A, B, k)
    U, S, Vh = np.linalg.svd((B.double() @ A.double()).numpy(), full_matrices=False)
    assert (A_k.shape, B_k.shape) == ((k, d_in), (d_out, k))
    assert np.allclose((B_k.double() @ A_k.double()).numpy(), U[:, :k] * S[:k] @ Vh[:k], atol=1e-5)
    assert error == pytest.approx(np.linalg.norm(S[k:]) / np.linalg.norm(S), abs=1e-12)


@pytest.mark.parametrize("method", ["lora", "lora-null-v1"])
def test_gguf_is_what_llama_cpp_adds_to_its_own_weights(world, tmp_path, method):
    """Its weights are the base's with the rows of q and k in its own order, its sum is W + alpha / r · B A."""
    gguf = pytest.importorskip("gguf")
    assert export(world, method, tmp_path / "out", "--form", "gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * 14
    merged = trained(world, method).merge_and_unload()
    for theirs, module, heads in (
        ("blk.1.attn_q", "self_attn.q_proj", 4),
        ("blk.1.attn_k", "self_attn.k_proj", 2),
        ("blk.1.attn_v", "self_attn.v_proj", None),
        ("blk.1.ffn_down", "mlp.down_proj", None),
    ):
        A, B = tensors[f"{theirs}.weight.lora_a"], tensors[f"{theirs}.weight.lora_b"]
        W, changed = (
            interleaved(model.get_parameter(f"model.layers.1.{module}.weight").detach().numpy(), heads)
            for model in (base(world), merged)
        )
        assert np.abs(W + fields["adapter.lora.alpha"] / len(A) * B @ A - changed).max() < 1e-5


def interleaved(weight, heads):
    """The rows of each head in rotary pairs, row by row."""
    if heads is None:
        return weight
    size = len(weight) // heads
    return np.stack([weight[h * size + i // 2 + (i % 2) * (size // 2)] for h in range(heads) for i in range(size)])


def test_truncated_to_a_rank_with_the_error_stated(world, tmp_path, capsys):
    assert export(world, "lora-null-v1", tmp_path / "out", "--rank", "3") == 0
    said = re.search(r"is ([\d.e-]+) in the mean of the layers, ([\d.e-]+) at most", capsys.readouterr().out)
    saved, cut = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (world / "out" / "lora-null-v1" / "adapter", tmp_path / "out")
    )
    errors = []
    for name in [key for key in saved if "lora_A" in key]:
        whole, near = (
            (state[name.replace("lora_A", "lora_B")].double() @ state[name].double()) for state in (saved, cut)
        )
        values = torch.linalg.svdvals(whole)
        errors.append(float((whole - near).norm() / whole.norm()))
        assert errors[-1] == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-3, abs=1e-6)
    assert float(said[1]) == pytest.approx(sum(errors) / len(errors), rel=0.06)
    assert float(said[2]) == pytest.approx(max(errors), rel=0.06)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert "What it learned" not in (tmp_path / "out" / "README.md").read_text()  # that was measured before


def test_patterns_and_rslora_become_one_rank_and_one_scaling(world, tmp_path):
    """vLLM drops rank_pattern and alpha_pattern: nothing but PEFT's own result must be left of them."""
    shutil.copytree(world / "out", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint*", "model"))
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", init_lora_weights=False,
        rank_pattern={"down_proj": 7, "q_proj": 2}, alpha_pattern={"k_proj": 3},
    )  # fmt: skip
    torch.manual_seed(3)
    live = get_peft_model(base(world), config)
    live.save_pretrained(tmp_path / "run" / "lora" / "adapter")
    assert main(["export", str(tmp_path / "run" / "lora"), "--out", str(tmp_path / "out")]) == 0
    assert main(["check", str(tmp_path / "run" / "lora" / "adapter")]) == 1
    assert main(["check", str(tmp_path / "out")]) == 0
    plain = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert plain["r"] == 7 and plain["rank_pattern"] == plain["alpha_pattern"] == {} and not plain["use_rslora"]
    again = PeftModel.from_pretrained(base(world), tmp_path / "out")
    assert (logits(again) - logits(live)).abs().max() < 1e-4


@pytest.mark.parametrize("method", WHOLE)
def test_whole_weights_are_exported_merged_and_no_other_way(world, tmp_path, method, capsys):
    assert export(world, method, tmp_path / "out", "--form", "merged") == 0
    saved, out = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (world / "out" / method / "model", tmp_path / "out")
    )
    assert torch.equal(logits(out), logits(saved)) and not torch.equal(logits(out), logits(base(world)))
    capsys.readouterr()
    assert export(world, method, tmp_path / "no") == 2
    said = capsys.readouterr().err
    assert f"{method} trains whole weights; only --form merged" in said and said.count("\n") == 1


def test_what_lies_in_an_adapter_and_its_card(world, tmp_path, capsys):
    assert export(world, "lora-null-v2", tmp_path / "out", "--base-name", "some/base", "--license", "mit") == 0
    said = capsys.readouterr().out
    assert "verified on a fresh base: max |Δ logit| 0," in said
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == base_fingerprint(world / "model")
        assert file.metadata()["base_dtype"] == "float32"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert (out / "adapter_model.safetensors").stat().st_mode & 0o777 == (out / "README.md").stat().st_mode & 0o777
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", "some/base", "mit")
    assert "base_model:adapter:some/base" in card.data.tags
    assert "| LoRA-Null-v2 |" in card.text and "| base |" in card.text and "| LoRA |" not in card.text
    assert "numbers (numbers.jsonl)" in card.text and "learning_rate: 0.01" in card.text
    assert str(world) not in card.content
    assert yaml.safe_load(re.search("```yaml\n(.*?)```", card.text, re.S)[1])["method"]["rank"] == 4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_ends_answers_and_is_looked_up_as_in_the_run(tmp_path, method, capsys):
    recipe = make_world(tmp_path, method={"name": method, "rank": 4})
    words = ["training.max_steps=1", "training.save_strategy=no", "eval.retention=[]", "eval.task=[]"]
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 8}')
    assert recipes([str(recipe), *words, "model.eos_token=?", "model.revision=v1"]) == 0
    before, end = (
        base(tmp_path).generation_config.eos_token_id,
        AutoTokenizer.from_pretrained(tmp_path / "model").encode("?")[-1],
    )
    assert end != before
    assert export(tmp_path, method, tmp_path / "merged", "--form", "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [end, before] and merged.config.eos_token_id == end
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "?"
    assert json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text()) == {"size": 8}
    if method == "lora":
        for words, revision in ([], "v1"), (["--base-name", "some/base"], None):
            assert export(tmp_path, method, tmp_path / f"{revision}", *words) == 0
            assert LoraConfig.from_pretrained(tmp_path / f"{revision}").revision == revision
            assert f"Answers end with '?': generate with eos_token_id={end}." in capsys.readouterr().out
            card = (tmp_path / f"{revision}" / "README.md").read_text()
            assert ('revision="v1"' in card.partition("## Recipe")[0]) == (revision == "v1")
        assert 'revision="v1"' in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merged_in_float32_or_more_and_cast_once_over_shards(tmp_path, dtype):
    save_tiny(tmp_path / "model")
    model = tiny_model()
    model.to(dtype).save_pretrained(tmp_path / "model")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    factors = {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in get_peft_model(tiny_model(), config).get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    deltas = deltas_of(factors, lambda name: 0.5, lambda name: False)
    untied = write_checkpoint(tmp_path / "model", tmp_path / "out", deltas, tiny_model(), shard_size="20KB")
    assert not untied and len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "out")
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict() for name in ("model", "out")
    )
    for key, tensor in after.items():
        A, B = factors.get(key.removesuffix(".weight"), (None, None))
        exact = before[key].double() if A is None else before[key].double() + 0.5 * B.double() @ A.double()
        assert tensor.dtype == dtype
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
        assert (tensor == exact.to(dtype)).double().mean() > 0.999  # float32 and float64 may part at a tie


@pytest.mark.parametrize("stored_twice", [False, True])
def test_a_tied_head_that_was_adapted_comes_apart(tmp_path, stored_twice):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    if stored_twice:
        weights = load_file(tmp_path / "model" / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    live = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    layer = live.get_base_model().lm_head
    pair = (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
    deltas = deltas_of({"lm_head": pair}, lambda name: layer.scaling["default"], lambda name: False)
    assert write_checkpoint(tmp_path / "model", tmp_path / "out", deltas, model)
    model.config.tie_word_embeddings = False
    model.config.save_pretrained(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(merged) - logits(live)).abs().max() < 1e-4


def test_weights_stored_as_d_in_by_d_out_without_the_inner_prefix(tmp_path):
    """GPT-2 on the hub: Conv1D, and keys that do not say `transformer.`."""

    def gpt2():
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=101, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=1, eos_token_id=2
            )
        )

    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    save_file(bare, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    live = get_peft_model(base(tmp_path), config)
    layers = {n: m for n, m in live.get_base_model().named_modules() if hasattr(m, "lora_A")}
    pairs = {n: (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach()) for n, m in layers.items()}
    deltas = deltas_of(pairs, lambda name: layers[name].scaling["default"], lambda name: True)
    write_checkpoint(tmp_path / "model", tmp_path / "out", deltas, gpt2())
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(merged) - logits(live)).abs().max() < 1e-4


def test_the_same_base_in_other_shards_has_the_same_fingerprint_and_no_other_has(tmp_path):
    tiny_model().save_pretrained(tmp_path / "one")
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    one, shards, bf16, other = (base_fingerprint(tmp_path / name) for name in ("one", "shards", "bf16", "other"))
    assert one == shards and len({one, bf16, other}) == 3


def test_quantized_weights_are_not_merged_into(tmp_path):
    model, name = tiny_model(), "model.layers.0.self_attn.q_proj"
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[f"{name}.weight"] = torch.zeros(512, 1, dtype=torch.uint8)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    deltas = deltas_of({name: (torch.ones(4, 32), torch.ones(32, 4))}, lambda name: 1.0, lambda name: False)
    with pytest.raises(
        UserError, match=r"q_proj.weight is stored as uint8, quantized; --base names the plain weights"
    ):
        write_checkpoint(tmp_path / "model", tmp_path / "out", deltas, model)


@pytest.fixture
def elsewhere(tmp_path):
    """An adapter as PEFT saves it, and its base."""
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model"), dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False),
    )
    live.save_pretrained(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_of_an_adapter_made_elsewhere_nothing_else_is_taken_along(elsewhere, tmp_path):
    """A trainer leaves its state beside it; a whole model has the base's tokenizer where there is no other."""
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "notes.csv"):
        (elsewhere / name).write_text("mine")
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert main(["export", str(elsewhere), "--out", str(tmp_path / "a")]) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == own
    assert main(["export", str(elsewhere), "--out", str(tmp_path / "m"), "--form", "merged"]) == 0
    texts = [AutoTokenizer.from_pretrained(tmp_path / name)("x = 1")["input_ids"] for name in ("m", "model")]
    assert texts[0] == texts[1] and not (tmp_path / "m" / "notes.csv").exists()


def test_a_merge_into_a_base_that_reads_its_weight_past_the_linear_is_one_line(
    elsewhere, tmp_path, capsys, monkeypatch
):
    """As Jamba reads its dt_proj: the live adapter does nothing there, the merged weight does."""
    monkeypatch.setattr(LoraLinear, "forward", lambda layer, x, **_: layer.base_layer(x))
    assert main(["export", str(elsewhere), "--out", str(tmp_path / "out"), "--form", "merged"]) == 2
    said = capsys.readouterr().err
    assert "--form merged: the export does not compute what" in said and said.endswith("; use --form adapter\n")
    assert not (tmp_path / "out").exists()


def test_a_merge_needs_safetensors_and_is_told_how_to_make_them(elsewhere, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bases, "load_base", lambda *_: pytest.fail("a model was loaded"))
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    assert main(["export", str(elsewhere), "--out", str(tmp_path / "out"), "--form", "merged"]) == 2
    assert "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), and" in capsys.readouterr().err


def test_an_adapter_that_gives_no_numbers_is_one_line(elsewhere, tmp_path, capsys):
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    (elsewhere / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1e300}))
    assert main(["export", str(elsewhere), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "gives NaN for logits" in said and said.count("\n") == 1


def test_no_error_is_accepted_that_is_no_number(elsewhere, tmp_path, monkeypatch):
    def broken(pairs, rank):
        return {name: (A[:rank] / 0, B[:, :rank]) for name, (A, B) in pairs.items()}, {"": 0.0}

    monkeypatch.setattr(command, "truncate_all", broken)
    with pytest.raises(RuntimeError, match="does not compute what"):
        main(["export", str(elsewhere), "--out", str(tmp_path / "out"), "--rank", "3"])


def test_another_base_is_refused(world, tmp_path, capsys):
    save_tiny(tmp_path / "other", seed=1)
    for form in ("adapter", "merged", "gguf"):
        assert export(world, "lora", tmp_path / "out", "--form", form, "--base", str(tmp_path / "other")) == 2
        assert "trained on another base than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_was_moved_is_the_one_that_the_adapter_names(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "moved")
    assert export(world, "lora", tmp_path / "out", "--base", str(tmp_path / "moved")) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


def test_an_export_that_computes_something_else_is_not_left(world, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(lora_null.adapters.gguf, "to_gguf_rows", lambda B, heads: B)
    with pytest.raises(RuntimeError, match="does not compute what"):
        export(world, "lora", tmp_path / "out", "--form", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_grids_folder_names_what_its_runs_have_finished(tmp_path, capsys):
    for method, mark in (
        ("lora", "adapter/adapter_config.json"),
        ("full", "model/tokenizer_config.json"),
        ("pissa", "x"),
    ):
        file = tmp_path / "grid" / "cells" / "rank=4" / "seed=0" / method / mark
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "grid" / "recipe.yaml").touch()
    assert main(["export", str(tmp_path / "grid"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.strip().endswith("(choose from: cells/rank=4/seed=0/full, cells/rank=4/seed=0/lora)")


@pytest.mark.parametrize(
    "words, line",
    [
        (["{world}/nowhere"], "no such folder"),
        (["{world}/out"], "a run; give one of its methods"),
        (["{world}/model"], "not a method of a run"),
        (["{world}/out/base"], "holds neither an adapter nor a model yet"),
        (["{world}/out/lora", "--form", "mergd"], "--form: 'mergd' is not one (did you mean 'merged'?)"),
        (["{world}/out/lora", "--rank", "5"], "--rank: 5 is not between 1 and the adapter's rank 4"),
        (
            ["{world}/out/lora", "--rank", "2", "--max-forgetting", "1"],
            "--rank: --max-forgetting measures the adapter at its full",
        ),
        (["{world}/out/lora", "--rank", "2", "--form", "merged"], "--rank: a merged model has no rank"),
        (["{world}/out/lora", "--dtype", "float32"], "--dtype: adapters are written as they were trained"),
        (["{world}/out/lora", "--base", "/nowhere"], "no folder /nowhere"),
        (["{world}/out/lora", "--out", "{world}/tiny.yaml/x"], "--out: cannot write to"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, capsys, words, line):
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["export", *out, *(word.format(world=world) for word in words)]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_overwritten(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    assert export(world, "lora", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
    monkeypatch.setattr(command, "evaluate_base", None)  # nothing is measured before
    for words in ([str(tmp_path), "--max-forgetting", "1"], [str(tmp_path / "new"), "--rank", "99"]):
        assert main(["export", str(world / "out" / "lora"), "--out", *words]) == 2
    assert "--rank: 99 is not between 1 and the adapter's rank 4" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_strength_that_llama_cpp_would_take_for_1_is_refused(world, tmp_path, capsys):
    """A budget within which nothing was kept saves an alpha of 0."""
    pytest.importorskip("gguf")
    shutil.copytree(world / "out", tmp_path / "run")
    config = tmp_path / "run" / "lora" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 0}))
    assert main(["export", str(tmp_path / "run" / "lora"), "--out", str(tmp_path / "out"), "--form", "gguf"]) == 2
    assert "--form gguf: the adapter's strength is 0, it is the base" in capsys.readouterr().err


def test_what_lies_beside_the_weights_is_copied_whatever_its_mode(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "out", run)
    adapter = run / "lora" / "adapter"
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (adapter / "tokenizer_config.json").chmod(0o444)
    relative = Path(os.path.relpath(world / "model", Path.cwd()))
    assert main(["export", str(run / "lora"), "--out", str(tmp_path / "out"), "--base", str(relative)]) == 0
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert os.stat(tmp_path / "out" / "tokenizer_config.json").st_mode & 0o200
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((world / "model").resolve())


def test_the_folder_in_a_methods_folder_is_the_method_and_a_later_tasks_checkpoint_is_refused(world, tmp_path):
    source = find_trained(world / "out" / "lora" / "adapter")
    assert source.home == (world / "out" / "lora").resolve() and source.recipe
    stage = tmp_path / "run" / "tasks" / "2-two"
    shutil.copytree(world / "out" / "lora" / "adapter", stage / "lora" / "checkpoint-4")
    shutil.copy(world / "out" / "recipe.yaml", stage / "recipe.yaml")
    with pytest.raises(UserError, match="a checkpoint of a later task, whose change it holds alone"):
        find_trained(stage / "lora" / "checkpoint-4")
    assert main(["check", str(stage / "lora" / "checkpoint-4")]) == 2


def test_of_a_folder_with_whole_weights_and_an_index_the_whole_are_read(world, tmp_path):
    folder = shutil.copytree(world / "model", tmp_path / "both")
    stale = {"weight_map": dict.fromkeys(WeightFiles(folder).file_of, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert set(WeightFiles(folder).file_of.values()) == {"model.safetensors"}


def test_gguf_says_what_it_misses(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert export(world, "lora", tmp_path / "out", "--form", "gguf") == 2
    assert "needs the package gguf; pip install gguf\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not know GPT2LMHeadModel, only LlamaForCausalLM"):
        lora_null.adapters.gguf.gguf_architecture(GPT2Config(architectures=["GPT2LMHeadModel"]))


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_of_an_output_layer_that_is_the_input_embedding_is_refused(tied, tmp_path, capsys):
    """llama.cpp holds it once, as token_embd.weight, and knows no output.weight that an adapter could be added to."""
    pytest.importorskip("gguf")
    base = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    asked = ["export", str(tmp_path / "adapter"), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*asked, "--form", "gguf"]) == (2 if tied else 0)
    told = "--form gguf: llama.cpp has no tensor for lm_head, which is the input embedding; use --form merged"
    assert (told in capsys.readouterr().err) == tied != (tmp_path / "out").exists()
    assert not tied or main([*asked, "--form", "merged"]) == 0


def test_pushed_only_where_asked(world, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options) or "the hub")
    there = ["README.md", "model.safetensors", "adapter_config.json", "old.gguf", "law/adapter_model.safetensors"]
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name: there)
    assert export(world, "lora", tmp_path / "one") == 0 and not calls
    assert export(world, "lora", tmp_path / "two", "--push-to-hub", "me/it") == 0
    assert calls[0] == ("me/it", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/it" and calls[1]["folder_path"] == tmp_path / "two"
    assert calls[1]["delete_patterns"] == there[1:4]  # of an earlier form; folders are of others
    names = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    assert (
        names[0]["base_model_name_or_path"] == str(world / "model") and names[1]["base_model_name_or_path"] == "model"
    )

    def refuse(self, name, **options):
        raise OSError("no token\nmore")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    capsys.readouterr()
    assert export(world, "lora", tmp_path / "three", "--push-to-hub", "me/it") == 2
    assert capsys.readouterr().err.startswith("error: --push-to-hub: me/it: no token; ")
    assert (tmp_path / "three" / "README.md").is_file()


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    metadata = {f"key {i}": "1" for i in range(9)}
    for i in range(3):
        write_safetensors(tmp_path / f"{i}.safetensors", {"é": torch.ones(3), "a": torch.zeros(2, 2)}, metadata)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(3)}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata} and file.get_tensor("é").sum() == 3


def test_a_token_that_both_models_rule_out_is_no_difference():
    torch.manual_seed(0)
    plain = torch.randn(3, 5, 7)
    ruled_out = plain.clone()
    plain[..., 3] = -1e4
    ruled_out[..., 3] = -torch.inf
    found, expected = (compare([a], [b], [c]) for a, b, c in (ruled_out, plain))
    assert (found.largest, found.kl, found.of_change) == pytest.approx(
        (expected.largest, expected.kl, expected.of_change)
    )
    ruled_out[1, :, 3] = 0  # the export gives it a chance
    assert compare(*[[t] for t in ruled_out]).largest == torch.inf


def test_in_bfloat16_a_small_change_is_a_result_and_a_merge_in_float32_keeps_it(tmp_path, capsys):
    """What moved by less than the base's rounding ended the run; a merge in float32 was compared in bfloat16."""
    recipe = make_world(tmp_path, method={"name": "lora", "rank": 4})
    words = ["model.dtype=bfloat16", "eval.retention=[]", "training.max_steps=2", "training.save_strategy=no"]
    small = ["training.learning_rate=1e-9", "--output-dir", str(tmp_path / "small")]
    assert recipes([str(recipe), *words, *small]) == 0
    assert "lora: on the first training row it predicts what the base does, bit for bit" in capsys.readouterr().err
    assert recipes([str(recipe), *words]) == 0
    assert "bit for bit" not in capsys.readouterr().err
    assert export(tmp_path, "lora", tmp_path / "f32", "--form", "merged", "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert "Merged in float32 and rounded once, to float32" in said and "Rounding lost" not in said
    assert float(re.search(r"relative ([\d.e-]+)", said)[1]) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.float32)
    assert (logits(merged) - logits(trained(tmp_path, "lora"))).abs().max() < 1e-4


def test_space_is_looked_for_before_anything_is_measured(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    monkeypatch.setattr(command, "_strength", None)
    assert export(world, "lora", tmp_path / "out", "--form", "merged") == 2
    assert f"--out: {tmp_path / 'out'} has 0.0 GB free, this run needs about" in capsys.readouterr().err


def test_a_base_in_another_format_than_safetensors(world, tmp_path, monkeypatch):
    """Its weights have no fingerprint, and an adapter is exported all the same."""

    def refuse(folder):
        raise UserError("no model.safetensors")

    monkeypatch.setattr(command, "base_fingerprint", refuse)
    shutil.copytree(world / "out" / "lora", tmp_path / "run" / "lora")
    weights = tmp_path / "run" / "lora" / "adapter" / "adapter_model.safetensors"
    write_safetensors(weights, load_file(weights), {})
    words = ["--base", str(world / "model"), "--out", str(tmp_path / "out")]
    assert main(["export", str(weights.parent), *words]) == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_merged_model_keeps_its_own_code(world, tmp_path):
    (tmp_path / "base").mkdir()
    for name in ("modeling_own.py", "preprocessor_config.json"):
        (tmp_path / "base" / name).write_text("{}")
    for trusted in (False, True):
        section = SimpleNamespace(trust_remote_code=trusted)
        source = SimpleNamespace(folder=tmp_path, base=SimpleNamespace(folder=tmp_path / "base", section=section))
        (tmp_path / f"{trusted}").mkdir()
        command._copy_what_reads_it(SimpleNamespace(source=source, form="merged", folder=tmp_path / f"{trusted}"))
        assert (tmp_path / f"{trusted}" / "preprocessor_config.json").is_file()
        assert (tmp_path / f"{trusted}" / "modeling_own.py").is_file() is trusted


@pytest.mark.parametrize(
    ("weight", "kept", "strength", "said"),
    [
        (0.1, True, 1.0, "keeps it"),
        (100, False, 1.0, "does not keep it either"),
        (0.1, True, 0.5, ""),
        (0, True, 1.0, ""),
    ],
)
def test_an_adapter_beyond_its_runs_budget_is_told_with_the_one_that_keeps_it(tmp_path, weight, kept, strength, said):
    held = {"measure": "a kl", "at_most": 0.1, "then": "repair", "step": 0, "steps": 0, "value": 0.0, "n": 9}
    held = Budget(**held, strength=1, weight=weight, kept=kept)
    write_row(tmp_path / "lora-repaired", Row(method="lora-repaired", budget=held))
    base = SimpleNamespace(section=SimpleNamespace(dtype="float32"))
    told = "This adapter is beyond the run's budget of forgetting"
    of_repaired = [f"{told}: a KL 0 nats per token, at most 0.1 allowed."] * (not kept)
    for method, notes in (("lora", [f"{told}; lora-repaired {said}."] * bool(said)), ("lora-repaired", of_repaired)):
        source = Trained(tmp_path, method, "adapter", {}, base)
        made = command.Export(source, "adapter", tmp_path / "out", "base", strength=strength)
        command._note_budget(made)
        assert made.notes == notes


def test_an_out_that_cannot_be_replaced_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with replacing_folder(tmp_path / "link") as folder:  # the folder behind it is replaced
        (folder / "a").write_text("b")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "a").read_text() == "b"
    with pytest.raises(UserError, match="out: exists already"), replacing_folder(tmp_path / "out"):
        (tmp_path / "out" / "of_another").mkdir(parents=True)
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(UserError, match="out: is a mount point, which cannot be replaced; give a folder inside it"):
        check_free(tmp_path / "out")


def test_what_a_killed_export_left_beside_its_folder_is_named(tmp_path, capsys):
    left = beside(tmp_path / "out[1]")
    left.mkdir()
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out[1]")]) == 2
    assert str(left) in capsys.readouterr().out and left.is_dir()
