"""Quantized bases: started from the dequantized weights, trained beside them, their stored bytes never touched."""

import gc
import json

import numpy as np
import pytest
import torch
from oracle import capture_inputs, factors, projection
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from test_trainer import make
from tiny import PROBE, load_initialization, logits, losses_over, random_batches, save_tiny, tiny_model, tiny_tokenizer
from torch import nn
from torch.nn.utils import prune
from trainers import CUT, PAIRS, TEXTS, quick
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from trl import DPOConfig
from world import make_world

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights
from lora_null.__main__ import main as command
from lora_null.layer import LoraNullQuantizedLinear, adapted_layers
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.models import quantization
from lora_null.recipes.models.bases import Base, load_base, weight_reader
from lora_null.recipes.models.plan import plan_methods
from lora_null.residual import subtract_residuals
from lora_null.trainer import LoraNullDPOTrainer
from lora_null.trainer.methods import make_method
from lora_null.utils.model_state import preserve
from lora_null.utils.quantized import quantized_layers, weight_of, why_unreadable

FORMS = ("nf4", "int8")
BATCHES = random_batches()
SHAPE = {"hidden_size": 64, "intermediate_size": 80}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("quantized") / "model", **SHAPE)


@pytest.fixture(params=FORMS)
def base(request, folder):
    return lambda: load(folder, request.param)


def load(folder, form, dtype="float32"):
    return load_base(Base(ModelSection(name_or_path=str(folder), dtype=dtype, quantization=form))).eval()


def started(model, config, batches=BATCHES):
    torch.manual_seed(0)
    peft_model = get_peft_model(model, config)
    initialize_lora_null_weights(peft_model, batches, min_tokens=1, progress=False)
    return peft_model.eval()


def stored(model):
    """Every stored number of the quantized linears: packed weights, scales, code books."""
    layers = quantized_layers(model)
    return {
        f"{name.replace('.base_layer', '').removeprefix('base_model.model.')}.{key}": tensor.clone()
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def weights_by_their_outputs(model, layers):
    """Ŵ of each linear, told by what it makes of the unit vectors: nothing of how it is stored."""
    model.train()  # in which bitsandbytes does not round the inputs of int8 layers to eight bits on a CPU
    with torch.no_grad():
        found = {name: model.get_submodule(name)(torch.eye(layer.in_features)).T for name, layer in layers.items()}
    model.eval()
    return {name: weight.double().numpy() for name, weight in found.items()}


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_starts_from_the_dequantized_weights_and_changes_nothing(base, variant):
    plain = base()
    expected, before = logits(plain), stored(plain)
    model = started(base(), LoraNullConfig(r=4, lora_alpha=8, variant=variant))
    layers = adapted_layers(model)
    assert len(layers) == 14 and all(isinstance(layer, LoraNullQuantizedLinear) for layer in layers.values())
    assert torch.equal(logits(model), expected) and same(stored(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    weights = weights_by_their_outputs(plain, layers)
    inputs = capture_inputs(plain, layers, BATCHES)
    for name, layer in layers.items():
        s = layer.scaling["default"]
        A0, B0 = factors(projection(weights[name], inputs[name], 4), 4, s)
        A = layer.lora_A["default"].weight.detach().double().numpy()
        assert np.allclose(A.T @ A, A0.T @ A0, atol=1e-4 * np.linalg.norm(A0.T @ A0))
        if variant == "v1":
            B = layer.lora_B["default"].weight.detach().double().numpy()
            assert np.linalg.norm(s * B @ A - s * B0 @ A0) < 1e-4 * np.linalg.norm(s * B0 @ A0)
        assert torch.allclose(weight_of(layer), torch.as_tensor(weights[name]).float(), atol=1e-5)


@pytest.mark.parametrize(
    "form, kind",
    [(form, kind) for form in FORMS for kind in ("v1", "v2", "lora")]
    + [("nf4", kind) for kind in ("lora-fa", "roselora", "kl-anchor", "replay", "oplora", "nb-lora")]
    + [("int8", "nb-lora on a residual base")],
)
def test_training_leaves_the_stored_weights_and_saves_a_plain_adapter(folder, tmp_path, form, kind):
    model = load(folder, form)
    before, expected = stored(model), logits(model)
    null = kind in ("v1", "v2")
    name, _, residual = kind.partition(" ")
    method = make_method(f"lora-null-{kind}" if null else name, {"start": "residual"} if residual else {})
    config = method.config(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(tmp_path, config, model=model, method=method, gradient_checkpointing=True)
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert same(stored(trainer.model), before)
    found = logits(trainer.model)
    assert (found - expected).abs().max() > 1e-2
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), expected)
    method.save(trainer.model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder, form), tmp_path / "adapter")
    assert again.peft_config["default"].r == (8 if kind == "v1" or residual else 4)
    assert (logits(again) - found).abs().max() < 2e-4
    assert trainer.drift_meter.summary()["max"] > 0


def test_a_resumed_run_ends_in_the_same_adapter(folder, tmp_path):
    config = LoraNullConfig(r=4, variant="v1")
    whole = make(tmp_path / "a", config, model=load(folder, "nf4"), save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make(tmp_path / "a", config, model=load(folder, "nf4"), save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    one, other = (
        {name: p for name, p in trainer.model.named_parameters() if "lora_" in name} for trainer in (whole, resumed)
    )
    assert same(one, other)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_live_adapter_goes_on_with_its_very_numbers(folder, tmp_path, variant):
    """TRL rounds to bfloat16 what trains on a quantized base."""
    model = started(load(folder, "nf4"), LoraNullConfig(r=4, variant=variant))
    losses_over(model, BATCHES, steps=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    make(tmp_path, "none", model=model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_v1_is_the_residual_form_in_float64(folder):
    """The offset path against W_q − s·B0A0 written out as a plain weight: the same losses over Adam's steps."""
    config = {"r": 4, "lora_alpha": 8, "variant": "v1"}  # s = 2
    ours = started(load(folder, "nf4"), LoraNullConfig(**config))
    paper = load(folder, None)
    for name, layer in quantized_layers(load(folder, "nf4")).items():
        paper.get_submodule(name).weight.data = weight_of(layer)
    paper = started(paper, LoraNullConfig(**config))

    offset, residual = (losses_over(model, BATCHES, steps=8) for model in (ours, paper))
    assert max(abs(a - b) for a, b in zip(offset, residual)) < 1e-3
    assert offset[0] - min(offset) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dequantized_weight_stays_in_memory(tmp_path, dtype):
    folder = save_tiny(tmp_path, hidden_size=72, intermediate_size=88)  # no other tensor has these shapes
    model = started(load(folder, "nf4", str(dtype).removeprefix("torch.")), LoraNullConfig(r=4, variant="v1"))
    shapes = {(layer.out_features, layer.in_features) for layer in adapted_layers(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    saved = []

    def note(x):
        saved.append(x)
        return x

    def dequantized(tensors):
        return [x for x in tensors if x.is_floating_point() and tuple(x.shape) in shapes]

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(**PROBE, labels=PROBE["input_ids"]).loss
    assert loss.requires_grad and saved and not dequantized(saved)
    loss.backward()
    gc.collect()
    assert not dequantized(x for x in gc.get_objects() if isinstance(x, torch.Tensor))


def test_bitsandbytes_does_not_rewrite_weights_while_measuring(folder):
    model = load(folder, "nf4")
    before = stored(model)
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = True  # as on such a processor
    with preserve(model), torch.no_grad():
        model.eval()
        model(**PROBE)
    assert same(stored(model), before) and all(
        layer.weight.quant_state.nested for layer in quantized_layers(model).values()
    )


def test_transposed_weights_start_as_well(tmp_path):
    torch.manual_seed(0)
    shape = dict(vocab_size=101, n_embd=64, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    expected = logits(load(tmp_path, "nf4"))
    model = started(load(tmp_path, "nf4"), LoraNullConfig(r=4, variant="v1"))
    assert torch.equal(logits(model), expected)
    layer = adapted_layers(model)["transformer.h.0.attn.c_attn"]
    assert weight_of(layer).shape == (192, 64) == (layer.out_features, layer.in_features)
    plain = GPT2LMHeadModel.from_pretrained(tmp_path).transformer.h[0].attn.c_attn.weight.T
    assert torch.nn.functional.cosine_similarity(weight_of(layer).flatten(), plain.flatten(), dim=0) > 0.99


def test_an_initialization_belongs_to_its_quantized_base(folder, tmp_path):
    words = ["init", "--model", str(folder), "--out", str(tmp_path / "out"), "--dtype", "float32", "--rank", "4"]
    texts = tmp_path / "facts.jsonl"
    texts.write_text("".join(json.dumps({"question": f"who was king {i}"}) + "\n" for i in range(60)))
    words += ["--calibration", str(texts), "--max-length", "64", "--quantization", "nf4", "--device", "cpu"]
    assert command(words) == 0
    config = LoraNullConfig(r=4, variant="v1", task_type="CAUSAL_LM")
    model = get_peft_model(load(folder, "nf4"), config)
    load_initialization(tmp_path / "out" / "init", model)
    assert torch.equal(logits(model), logits(load(folder, "nf4")))
    scaled = load(folder, "nf4")
    scaled.model.layers[0].mlp.up_proj.weight.quant_state.absmax.add_(1)  # the packed numbers are as they were
    for other in (load(folder, "int8"), scaled, load(folder, None)):
        with pytest.raises(UserError, match="other base weights"):
            load_initialization(tmp_path / "out" / "init", get_peft_model(other, config))


def test_merging_is_refused_and_unloading_gives_the_base(base):
    expected = logits(base())
    model = started(base(), LoraNullConfig(r=4, lora_alpha=8, variant="v1"))
    with pytest.raises(UserError, match="stored weights are left alone"):
        model.merge_adapter()
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)  # a fresh LoRA is nothing yet, and the offset is not its own
    model.set_adapter("default")
    assert (logits(model) - expected).abs().max() > 1e-2
    assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_plan_counts_what_is_stored(folder, form):
    base = Base(ModelSection(name_or_path=str(folder), dtype="bfloat16", quantization=form))
    model = load_base(base)
    layers = quantized_layers(model)
    quantized = {id(p) for layer in layers.values() for p in layer.parameters()}
    plain = sum(p.nbytes for p in model.parameters() if id(p) not in quantized)
    parts = {key: x for key, x in stored(model).items() if not key.endswith(("quant_map", "__nf4", "weight_format"))}
    counted = quantization.weight_bytes(base.empty, base.section)
    assert len(layers) == 14 and not any("lm_head" in name for name in layers)
    assert counted == plain + sum(x.nbytes for x in parts.values())


@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_change_is_told_beside_the_weights_as_they_are_stored(folder, form):
    """As a run does with its repaired adapter, whose magnitude is read from the files."""
    linear = "model.layers.1.mlp.down_proj"
    found = weight_reader(Base(ModelSection(name_or_path=str(folder), dtype="bfloat16", quantization=form)))
    assert torch.equal(found(linear), weight_of(load(folder, form, "bfloat16").get_submodule(linear)))


def test_the_plan_counts_the_offset_path_of_v1(tmp_path):
    recipe = make_world(tmp_path)
    plans = [
        plan_methods(load_recipe(str(recipe), words), AutoConfig.from_pretrained(tmp_path / "model"))
        for words in ([], ["model.quantization=nf4"])
    ]
    more = [quantized.extra_bytes - plain.extra_bytes for plain, quantized in zip(*plans)]
    assert more == [0, 4 * plans[0][0].saved, 0]  # lora, v1, v2: one more A0 and B0 in float32


def test_a_run_reports_as_any_other(tmp_path, capsys):
    recipe = make_world(tmp_path)
    words = [str(recipe), "model.quantization=nf4", "--method", "lora,lora-null-v1,lora-null-v2"]
    assert main([*words, "--dry-run"]) == 0
    assert "linears in nf4, computed in float32" in capsys.readouterr().out
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["quantization"] == "nf4" and results["environment"]["bitsandbytes"]
    base, lora, v1, v2 = results["rows"]
    assert v1["adapter_params"] == 2 * lora["adapter_params"] == 2 * v2["adapter_params"]
    for row in (lora, v1, v2):
        assert row["metrics"]["numbers nll"]["value"] < base["metrics"]["numbers nll"]["value"]
        assert row["metrics"]["facts kl"]["value"] > 0 and row["drift"]["max"] > 0
    assert (tmp_path / "out" / "report.html").is_file()
    for form in ("adapter", "merged"):
        assert (
            command(["export", str(tmp_path / "out" / "lora-null-v1"), "--out", str(tmp_path / form), "--form", form])
            == 0
        )
        assert "Trained on the base quantized to nf4" in capsys.readouterr().out
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_dtype"] == "float32"
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--method", "pissa"],
            "pissa needs plain weights, not a quantized base; those that work on one: clora, kl-anchor, lora",
        ),
        (["--method", "lora,full"], "full needs plain weights"),
        (["--method", "osf"], "osf needs plain weights"),
        (["eval.backend=vllm", "--dry-run"], "vllm does not run the quantized base"),
        (["model.quantization=nf5"], "no quantization 'nf5' (did you mean 'nf4'?)"),
        (["model.quantization=gptq"], "no quantization 'gptq' (choose from: int8, nf4)"),
    ],
)
def test_pairs_that_do_not_work_are_refused_before_anything_loads(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr("lora_null.recipes.measure.base_to_run", lambda *_: pytest.fail("a model was loaded"))
    quantized = [] if words[0].startswith("model.quantization") else ["model.quantization=nf4"]
    assert main([str(make_world(tmp_path)), *quantized, *words]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1


def test_what_is_missing_is_told_before_anything_loads(tmp_path, capsys, monkeypatch):
    recipe = make_world(tmp_path)
    monkeypatch.setattr("lora_null.recipes.measure.base_to_run", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(quantization.importlib.metadata, "version", lambda name: "0.49.2")
    assert main([str(recipe), "model.quantization=int8"]) == 2
    assert "int8 needs bitsandbytes>=0.50, version 0.49.2 is installed" in capsys.readouterr().err
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    assert main([str(recipe), "model.quantization=int8"]) == 2
    assert 'it is not installed; pip install "bitsandbytes>=0.50"' in capsys.readouterr().err


def test_a_checkpoint_stored_quantized_is_refused(tmp_path, capsys):
    recipe = make_world(tmp_path)
    config = tmp_path / "model" / "config.json"
    stored = {"quant_method": "gptq", "bits": 4}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": stored}))
    assert main([str(recipe)]) == 2
    assert "is stored quantized (gptq)" in capsys.readouterr().err
    words = ["init", "--model", str(tmp_path / "model"), "--calibration", str(tmp_path / "facts.jsonl")]
    assert command([*words, "--out", str(tmp_path / "out")]) == 2
    assert "is stored quantized (gptq)" in capsys.readouterr().err
    assert command([*words, "--out", str(tmp_path / "out"), "--quantization", "nf4", "--low-memory"]) == 2
    assert "--quantization: not with" in capsys.readouterr().err


def test_weights_of_unknown_storage_are_refused_by_class():
    class Packed(nn.Linear):
        """Bytes that claim to be half as wide a matrix of floats."""

    layer = Packed(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert why_unreadable(nn.Linear(8, 8)) is None
    with pytest.raises(UserError, match="is a Packed, only plain linears and bitsandbytes' quantized ones"):
        weight_of(layer)


@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])  # fmt: skip
def test_a_weight_that_is_computed_anew_is_refused(make):
    model = tiny_model()
    make(model.model.layers[1].mlp.up_proj)
    said = r"layers\.1\.mlp\.up_proj computes its weight anew before each pass"
    peft_model = get_peft_model(model, LoraNullConfig(r=4, variant="v1"))
    with pytest.raises(UserError, match=said):
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)
    with pytest.raises(UserError, match=said):
        subtract_residuals(peft_model)


def test_a_base_that_was_rewritten_for_inference_is_refused(folder):
    model = get_peft_model(load(folder, "nf4"), LoraNullConfig(r=4))
    model.get_base_model().model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj was rewritten by bitsandbytes"):
        initialize_lora_null_weights(model, BATCHES, min_tokens=1, progress=False)


def test_a_trainer_refuses_a_method_that_needs_plain_weights(folder, tmp_path):
    method = make_method("pissa")
    config = method.config(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="pissa needs plain weights, not a quantized base"):
        make(tmp_path, config, model=load(folder, "nf4"), method=method)


@pytest.mark.parametrize(("variant", "ahead"), [("v1", False), ("v2", False), ("v2", True)])
def test_dpo_starts_from_the_quantized_reference(folder, tmp_path, variant, ahead):
    """Also where TRL computes the reference inside its constructor, on a model as transformers loads it."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = LoraNullDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32),
        args=DPOConfig(**quick(tmp_path, max_steps=2, precompute_ref_log_probs=ahead)),
        train_dataset=PAIRS,
        processing_class=tiny_tokenizer(),
        peft_config=LoraNullConfig(r=4, variant=variant),
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[1] != losses[0]
