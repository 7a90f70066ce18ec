import contextlib
import functools
import gc

import numpy as np
import oracle
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from tiny import PROBE, load_initialization, logits, losses_over, random_batches, tiny_model
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    CanineConfig,
    CanineModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights, solver, store
from lora_null.batches import checked_batches
from lora_null.calibration import InputMeter, measure_inputs
from lora_null.earlier_tasks import Earlier, keep_grams
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.layerwise import walk_layers
from lora_null.store import KEPT
from lora_null.targets import check_named

BATCHES = random_batches()
CANINE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_hash_buckets=64)


def start(variant="v2", *, dtype=torch.float64, model=None, batches=BATCHES, min_tokens=1, **config):
    model = (model or tiny_model()).to(dtype).eval()
    peft_model = get_peft_model(
        model, LoraNullConfig(variant=variant, **{"r": 4, **config}), autocast_adapter_dtype=False
    )
    report = initialize_lora_null_weights(peft_model, batches, min_tokens=min_tokens, progress=False, solver="eigh")
    return peft_model, report


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_every_layer_against_the_full_svd_of_its_inputs(variant):
    model = tiny_model().double()
    names = linears(model)
    W = {name: model.get_submodule(name).weight.detach().double().numpy().copy() for name in names}
    X = oracle.capture_inputs(model, W, BATCHES)
    peft_model, report = start(variant, model=model)
    stats = {line.name: line for line in report.layers}
    assert set(stats) == set(W)
    for name, layer in adapted_layers(peft_model).items():
        T = oracle.projection(W[name], X[name], 4)
        A0, B0 = oracle.factors(T, 4, 1.0)
        A, B = layer.lora_A["default"].weight.detach().numpy(), layer.lora_B["default"].weight.detach().numpy()
        signs = np.sign(np.sum(A0 * A, axis=1))
        assert np.abs(A - signs[:, None] * A0).max() < 1e-8
        assert np.abs(B - (signs * B0 if variant == "v1" else 0)).max() < 1e-8
        base = layer.get_base_layer().weight.detach().numpy()
        assert np.abs(base - (W[name] - T if variant == "v1" else W[name])).max() < 1e-8
        assert stats[name].leakage == pytest.approx(oracle.leak(A0, X[name]), rel=1e-5)
        assert stats[name].energy == pytest.approx(np.linalg.norm(T) ** 2 / np.linalg.norm(W[name]) ** 2)
        assert stats[name].tokens == X[name].shape[1] == int(sum(b["attention_mask"].sum() for b in BATCHES))
        assert stats[name].gram_rank == np.linalg.matrix_rank(X[name])


@pytest.mark.parametrize("rows, length", [(71, 20), (91, 13), (40, 30), (20, 20)])
def test_padding_is_left_out_however_a_batch_is_cut(rows, length):
    """On a CPU pieces of 1,024 tokens; the last one of 71 × 20 would be 20 × 20, which XLNet's layout looks like."""
    (batch,) = random_batches(1, size=rows, length=length)
    model = tiny_model().double()
    name = linears(model)[0]
    alone = [{key: value[i : i + 1, : int(batch["attention_mask"][i].sum())] for key, value in batch.items()}
             for i in range(rows)]  # fmt: skip
    X = oracle.capture_inputs(model, [name], alone)[name]
    found = measure_inputs(model, {name: model.get_submodule(name)}, [batch], progress=False).inputs[0]
    assert found.tokens == X.shape[1]
    np.testing.assert_allclose(found.gram.numpy(), X @ X.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("rslora, alpha", [(False, None), (False, 1), (True, 8)])
def test_step_0_is_the_base_and_disabling_gives_it_back(variant, dtype, tolerance, rslora, alpha):
    model = tiny_model().to(dtype)
    before = logits(model)
    peft_model, _ = start(variant, dtype=dtype, model=model, use_rslora=rslora, lora_alpha=alpha)
    limit = 0 if variant == "v2" else tolerance * float(before.abs().max())
    assert (logits(peft_model) - before).abs().max() <= limit
    with torch.no_grad():
        for layer in adapted_layers(peft_model).values():
            layer.lora_B["default"].weight.add_(0.5)
    assert (logits(peft_model) - before).abs().max() > 0.2
    with peft_model.disable_adapter():
        assert (logits(peft_model) - before).abs().max() <= limit
    assert (logits(peft_model.unload()) - before).abs().max() <= limit


@pytest.mark.parametrize("dtype, leak_factor", [(torch.float32, 1.01), (torch.bfloat16, 1.01)])
def test_low_precision_models_still_give_the_null_space_of_what_they_read(dtype, leak_factor):
    model = tiny_model().to(dtype)
    X = oracle.capture_inputs(model, linears(model), BATCHES)
    peft_model = get_peft_model(model, LoraNullConfig(r=4))  # adapters in float32, as PEFT makes them
    report = initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)
    for line in report.layers:
        best = oracle.leak(oracle.null_space(X[line.name], 4).T, X[line.name])
        A = adapted_layers(peft_model)[line.name].lora_A["default"].weight.detach().double().numpy()
        # T weighs the null directions by W0, so compare with the best rows of that very shape.
        W = peft_model.get_base_model().get_submodule(line.name).get_base_layer().weight.detach().double().numpy()
        ideal = oracle.leak(oracle.factors(oracle.projection(W, X[line.name], 4), 4, 1.0)[0], X[line.name])
        assert line.leakage == pytest.approx(oracle.leak(A, X[line.name]), rel=1e-3)
        assert oracle.leak(A, X[line.name]) <= leak_factor * ideal + 1e-7
        assert best <= ideal * 1.5


def test_theorem_2_outputs_on_calibration_inputs_stay_whatever_b_becomes():
    few = random_batches(count=1, size=2, length=8)  # at most 16 tokens for 32 dimensions: an exact null space
    peft_model, _ = start("v2", batches=few)
    with torch.no_grad():
        before = peft_model(**few[0]).logits
        for layer in adapted_layers(peft_model).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=3.0)
        after = peft_model(**few[0]).logits
    kept = few[0]["attention_mask"].bool()
    assert (after - before)[kept].abs().max() < 1e-8
    assert (logits(peft_model) - logits(tiny_model().double())).abs().max() > 1e-2


def test_padding_is_not_measured():
    wider = [
        {key: nn.functional.pad(value, (0, 5), value=9 if key == "input_ids" else 0) for key, value in batch.items()}
        for batch in BATCHES
    ]
    one, other = start("v2")[0], start("v2", batches=wider)[0]
    for a, b in zip(adapted_layers(one).values(), adapted_layers(other).values()):
        assert torch.allclose(a.lora_A["default"].weight, b.lora_A["default"].weight, atol=1e-9)


def test_shared_inputs_are_measured_once():
    peft_model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
    calibration = measure_inputs(peft_model, adapted_layers(peft_model), BATCHES, progress=False)
    groups = [{name.rpartition(".")[2] for name in stats.modules} for stats in calibration.inputs]
    assert groups[:4] == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert len(groups) == 8


def test_conv1d_with_bias_gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2, n_positions=64)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    before = logits(model)
    for variant in ("v1", "v2"):
        peft_model, report = start(variant, model=model, target_modules=["c_attn", "c_fc", "mlp.c_proj"])
        assert report.layers[0].shape == (96, 32)
        assert (logits(peft_model) - before).abs().max() < 1e-10
        with peft_model.disable_adapter():
            assert (logits(peft_model) - before).abs().max() < 1e-10
        model = peft_model.unload()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*layers\.1\.mlp\.(up|down)_proj", "all-linear"])
def test_targets_as_list_regex_or_all(targets):
    peft_model, report = start("v1", target_modules=targets)
    assert (
        len(report.layers)
        == {0: 4, 1: 2, 2: 14}[
            [["q_proj", "down_proj"], r".*layers\.1\.mlp\.(up|down)_proj", "all-linear"].index(targets)
        ]
    )
    assert (logits(peft_model) - logits(tiny_model().double())).abs().max() < 1e-10


def test_rank_and_alpha_patterns():
    peft_model, report = start("v1", rank_pattern={"down_proj": 7}, alpha_pattern={"q_proj": 9})
    assert {line.r for line in report.layers if "down_proj" in line.name} == {7}
    assert {line.r for line in report.layers if "down_proj" not in line.name} == {4}
    assert (logits(peft_model) - logits(tiny_model().double())).abs().max() < 1e-10


def test_tied_embeddings_are_left_out_by_all_linear_and_refused_by_name():
    model = tiny_model(tie_word_embeddings=True)
    before = logits(model.double())
    peft_model, report = start("v1", model=model)
    assert not any("lm_head" in line.name for line in report.layers)
    assert (logits(peft_model) - before).abs().max() < 1e-10
    with pytest.raises(UserError, match=r"lm_head shares its weight with model\.embed_tokens"):
        start("v1", model=tiny_model(tie_word_embeddings=True), target_modules=["lm_head"])


def test_mode_gradients_and_random_state_are_as_before():
    peft_model = get_peft_model(tiny_model(), LoraNullConfig(r=4, variant="v1"))
    peft_model.train()
    wanted = {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in peft_model.modules())
    assert wanted == {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    assert not any(module._forward_hooks for module in peft_model.modules())


@pytest.mark.parametrize("form", ["layers", "hooks"])
def test_a_callers_autocast_does_not_round_what_is_measured(form):
    def factors():
        peft_model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False, form=form)
        return [layer.lora_A["default"].weight for layer in adapted_layers(peft_model).values()]

    plain = factors()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = factors()
    assert all(map(torch.equal, plain, under_autocast))


def test_what_is_started_in_a_callers_inference_mode_trains_and_what_is_made_there_is_refused():
    peft_model = wrapped("v1")
    with torch.inference_mode():
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)
        made = tiny_model()
    for layer in adapted_layers(peft_model).values():
        layer.set_scale("default", 0.5)  # so that the residual has a part in the loss
    losses_over(peft_model, BATCHES, steps=1)
    with pytest.raises(UserError, match="was made under"):
        initialize_lora_null_weights(wrapped("v1", made), BATCHES)


def test_v2_keeps_a_frozen_through_adapter_switching():
    peft_model, _ = start("v2")
    peft_model.set_adapter("default")
    with peft_model.disable_adapter():
        pass
    trains = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_B" in name for name in trains)


def test_another_adapter_sees_the_original_base_under_v1():
    peft_model, _ = start("v1")
    before = logits(tiny_model().double())
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    peft_model.set_adapter("other")
    assert (logits(peft_model) - before).abs().max() < 1e-10
    peft_model.delete_adapter("default")
    assert (logits(peft_model) - before).abs().max() < 1e-10


def wrapped(variant="v2", model=None, **config):
    return get_peft_model(model or tiny_model(), LoraNullConfig(**{"r": 4, "variant": variant, **config}))


QUIET = InitOptions(min_tokens=1, progress=False)


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_saved_initialization_gives_the_same_bits_to_either_variant(tmp_path):
    reports = {}
    for variant in ("v1", "v2"):
        one = wrapped(variant)
        reports[variant], _ = start_adapter(one, BATCHES, QUIET, folder=tmp_path / variant)
        for written in tmp_path.iterdir():
            other = wrapped(variant)
            again, calibration = load_initialization(written, other)
            assert again.to_json() == reports[written.name].to_json()
            assert same_bits(one, other)
            assert set(calibration.projected) == set(adapted_layers(other))


@pytest.mark.parametrize(
    "message, changes",
    [
        ("other base weights", dict(model=tiny_model(seed=3))),
        ("written for rank 4 and scaling 1, this run asks for rank 5 and scaling 1", dict(r=5)),
        ("written for rank 4 and scaling 1, this run asks for rank 4 and scaling 2", dict(lora_alpha=8)),
        ("other modules", dict(target_modules=["q_proj"])),
    ],
)
def test_an_initialization_for_something_else_is_refused(tmp_path, message, changes):
    start_adapter(wrapped(), BATCHES, QUIET, folder=tmp_path)
    with pytest.raises(UserError, match=message):
        load_initialization(tmp_path, wrapped(**changes))


def test_an_equal_initialization_comes_from_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path))
    cached = InitOptions(min_tokens=1, progress=False, cache=True)
    fresh, again, other_rank = wrapped("v1"), wrapped("v2"), wrapped("v1", r=3)
    start_adapter(fresh, BATCHES, cached)
    assert "reused" not in capsys.readouterr().err
    monkeypatch.setattr("lora_null.layerwise.InputMeter", None)  # measuring again would fail
    start_adapter(again, BATCHES, cached, folder=tmp_path / "copy")
    assert "reused, model, calibration and settings are the same" in capsys.readouterr().err
    for one, two in zip(adapted_layers(fresh).values(), adapted_layers(again).values()):
        assert torch.equal(one.lora_A["default"].weight, two.lora_A["default"].weight)
    assert len(load_initialization(tmp_path / "copy", wrapped("v1"))[0].layers) == 14
    for different in (BATCHES[:-1], BATCHES):
        with pytest.raises(TypeError):
            start_adapter(wrapped() if different is not BATCHES else other_rank, different, cached)


def test_the_cache_keeps_the_newest_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path))
    for seed in range(KEPT + 2):
        start_adapter(wrapped(), BATCHES, InitOptions(min_tokens=1, progress=False, cache=True, seed=seed))
    assert len(list((tmp_path / "init").iterdir())) == KEPT


def test_a_killed_initialization_continues_with_the_same_bits(tmp_path, monkeypatch):
    whole, killed = wrapped("v1"), wrapped("v1")
    start_adapter(whole, BATCHES, QUIET, folder=tmp_path / "whole")
    write = store.write_part

    def write_one_and_die(folder, name, part):
        if list(folder.glob("factors.*")):
            raise KeyboardInterrupt
        write(folder, name, part)

    monkeypatch.setattr(store, "write_part", write_one_and_die)
    with pytest.raises(KeyboardInterrupt):
        start_adapter(wrapped("v1").train(), BATCHES, QUIET, folder=tmp_path / "killed")
    assert torch.is_grad_enabled()
    gc.collect()
    assert torch.is_grad_enabled()  # nothing half done is left to be undone later
    with pytest.raises(UserError, match=r"no complete initialization"):
        load_initialization(tmp_path / "killed", wrapped("v1"))
    monkeypatch.setattr(store, "write_part", write)
    measured = []
    monkeypatch.setattr(
        InputMeter, "_add", lambda self, name, x, add=InputMeter._add: (measured.append(name), add(self, name, x))
    )
    start_adapter(killed, BATCHES, QUIET, folder=tmp_path / "killed")
    assert {name.split(".")[2] for name in measured} == {"1"}
    assert same_bits(whole, killed)


@pytest.mark.parametrize("form", ["layers", "hooks"])
@pytest.mark.parametrize("variant", ["v1", "v2", "nb"])
def test_an_interrupted_start_leaves_the_model_as_it_was_and_can_be_repeated(variant, form, monkeypatch):
    model = tiny_model()
    before, peft_model = logits(model), wrapped(variant, model=model)
    solved = []

    def interrupted(*given, solve=solver.leakage):
        solved.append(given)
        if len(solved) == 8:
            raise KeyboardInterrupt
        return solve(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(solver, "leakage", interrupted)
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False, form=form)
    assert torch.equal(logits(peft_model), before)
    initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False, form=form)
    expected = wrapped(variant)
    initialize_lora_null_weights(expected, BATCHES, min_tokens=1, progress=False, form=form)
    assert same_bits(peft_model, expected)


MISTAKES = {
    "r: 33 is larger than model.layers.0.self_attn.q_proj allows": dict(r=33),
    "at least 100000 are needed": dict(min_tokens=100_000),
    "there is no batch": dict(batches=[]),
    "NaN or infinite inputs at model.layers.0": dict(poison=True),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_said_before_anything_changes(message):
    options = dict(MISTAKES[message])
    model = tiny_model()
    if options.pop("poison", False):
        model.model.embed_tokens.weight.data[5:90] = float("nan")
    with pytest.raises(UserError, match=message):
        start("v1", model=model, dtype=torch.float32, **options)


IDS, MASK = PROBE["input_ids"], PROBE["attention_mask"]


@pytest.mark.parametrize("form", ["auto", "hooks"])
@pytest.mark.parametrize(
    "second, message",
    [
        ({"input_ids": IDS + 97}, r"holds the token 1\d\d, the model's vocabulary has 101 \(0 to 100\)"),
        ({"input_ids": IDS - 101}, "holds the token -"),
        ({"input_ids": IDS.float()}, "has input_ids of float32, not whole numbers"),
        ({"input_ids": IDS[0]}, r"has input_ids of shape \(12,\), not \(batch, length\)"),
        ({"input_ids": IDS[:0], "attention_mask": MASK[:0]}, r"has input_ids of shape \(0, 12\)"),
        ({"input_ids": [[5, 6], [7]]}, "has input_ids that are no tensor, nor rows of one length"),
        ({"attention_mask": MASK[:, 1:]}, r"has attention_mask of shape \(8, 11\), input_ids of \(8, 12\)"),
        ({"attention_mask": MASK * 2}, "has an attention_mask that holds other numbers than 0 and 1"),
        ({"attention_mask": None}, "has no attention_mask"),
        ({"position_ids": MASK - 1}, "has negative position_ids"),
        (
            {"inputs_embeds": torch.ones(8, 12, 32)},
            "has inputs_embeds, which changes what is read and is not measured",
        ),
        ("text", "is a str, not a dict of input_ids and attention_mask"),
    ],
)
def test_what_is_no_batch_for_the_model_is_named(second, message, form):
    second = {**PROBE, **second} if isinstance(second, dict) else second
    with pytest.raises(UserError, match=f"calibration: batch 2 {message}"):
        initialize_lora_null_weights(wrapped(), [PROBE, second], min_tokens=1, form=form)


def test_what_changes_nothing_in_the_layers_may_stand_in_a_batch():
    beside = {
        "use_cache": torch.tensor(True),
        "logits_to_keep": 1,
        "labels": IDS,
        "output_attentions": torch.tensor(1),
    }
    (found,) = checked_batches(tiny_model(), [{**PROBE, **beside}])
    assert found.keys() == PROBE.keys() and all(torch.equal(found[key], PROBE[key]) for key in PROBE)


def test_packed_batches_get_no_larger():
    ids, positions = torch.arange(5, 45)[None], torch.cat([torch.arange(30), torch.zeros(10, dtype=torch.long)])[None]
    packed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    one_each, long = checked_batches(tiny_model(), [packed])
    assert one_each["input_ids"].tolist() == [[i] for i in range(35, 45)]
    assert long["input_ids"].tolist() == [[*range(5, 35)]]
    again = checked_batches(tiny_model(), [one_each, long])
    assert all(torch.equal(a[key], b[key]) for a, b in zip((one_each, long), again, strict=True) for key in packed)


@pytest.mark.parametrize("padding, before", [(0, 0), (3, 0), (3, 2)])
def test_texts_packed_into_one_row_do_not_read_each_other(padding, before):
    model = tiny_model().double()
    modules = {name: model.get_submodule(name) for name in linears(model)}
    texts = [part["input_ids"][:, :length] for part, length in zip(BATCHES, (7, 5, 6))]
    apart = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    ids, positions = torch.cat(texts, 1), torch.cat([torch.arange(ids.shape[1]) for ids in texts])
    end = nn.functional.pad
    around = (before, padding)  # what stands before has positions that the first text may go on from
    packed = {"input_ids": end(ids, around), "attention_mask": end(torch.ones_like(ids), around)}
    packed["position_ids"] = end(positions.expand_as(ids), around)
    packed["position_ids"][:, : before + 7] = torch.arange(before + 7)
    apart[0]["position_ids"] = torch.arange(before, before + 7).expand_as(texts[0])
    of_each = measure_inputs(model, modules, apart, progress=False)
    walked = [part for _, part in walk_layers(model, modules, [packed], progress=False)]
    for part in (measure_inputs(model, modules, [packed], progress=False), *walked):
        for stats in part.inputs:
            C = of_each.input_of(stats.modules[0]).gram
            assert torch.dist(stats.gram, C) < 1e-9 * torch.linalg.matrix_norm(C)


def test_a_batch_longer_than_the_position_table_is_named():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=1, n_head=4, n_positions=8))
    with pytest.raises(UserError, match=r"batch 1 has 12 positions, GPT2LMHeadModel takes 8 \(n_positions\)"):
        initialize_lora_null_weights(wrapped(model=model), BATCHES, min_tokens=1)


def test_a_plain_lora_config_is_refused():
    peft_model = get_peft_model(tiny_model(), LoraConfig(r=4))
    with pytest.raises(UserError, match="not a LoraNullConfig"):
        initialize_lora_null_weights(peft_model, BATCHES)


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("where", ["before", "behind", "forward", "forward, marked as what it wraps"])
def test_a_hook_at_a_target_is_refused(variant, where):
    model = tiny_model()
    linear = model.model.layers[1].self_attn.q_proj
    if where == "forward":
        linear.forward = lambda x, own=linear.forward: own(x) * 2
    elif where.startswith("forward"):
        linear.forward = functools.wraps(linear.forward)(lambda x, own=linear.forward: own(x) * 2)
    elif where == "before":
        linear.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    else:
        linear.register_forward_hook(lambda _, args, out: out * 2)
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.q_proj has .*lambda.* as a forward hook"):
        start(variant, model=model)
    peft_model, _ = start(variant, exclude_modules=["layers.1.self_attn.q_proj"])
    peft_model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, args, out: out * 2)
    logits(peft_model)


def test_a_target_that_names_nothing_is_refused_though_others_do():
    with pytest.raises(UserError, match=r"no module matches 'upp_proj' .did you mean 'up_proj'"):
        start(target_modules=["q_proj", "upp_proj"])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(UserError, match=r"no module matches 'q_proj' .did you mean 'c_proj'"):
        check_named(gpt2, ["c_fc", "q_proj"])


def test_a_classifiers_head_is_no_target():
    with pytest.raises(UserError, match="score is the model's head; give task_type='SEQ_CLS'"):
        start(model=LlamaForSequenceClassification(tiny_model().config))
    peft_model, report = start(model=LlamaForSequenceClassification(tiny_model().config), task_type="SEQ_CLS")
    assert report.layers and peft_model.get_base_model().score.modules_to_save["default"].weight.requires_grad


def test_what_device_map_left_out_of_the_gpu_is_named(tmp_path):
    model = tiny_model()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(model, {**places, "model.layers": "disk"}, offload_dir=tmp_path)
    model.hf_device_map |= dict.fromkeys(places, 0)  # as on a machine with a GPU
    with pytest.raises(UserError, match=r"device_map left model\.layers on the CPU or disk"):
        initialize_lora_null_weights(wrapped(model=model), BATCHES, min_tokens=1)


def test_starting_twice_is_refused():
    peft_model, _ = start("v1")
    with pytest.raises(UserError, match="started already"):
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(use_dora=True), "use_dora: not supported"),
        (dict(bias="all"), "bias: must be 'none'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
        (dict(variant="v3"), "'v3' is not one of v1, v2, nb"),
        (dict(variant="v1", lora_dropout=0.1), "lora_dropout"),
        (dict(variant="nb", start="residual", lora_dropout=0.1), "lora_dropout"),
        (dict(variant="nb", start="ones"), "start: 'ones' is not one of zero, residual"),
        (dict(variant="nb", null_multiple=0.9), "null_multiple: N needs r directions"),
        (dict(variant="nb", null_multiple="4"), "null_multiple: N needs r directions"),
        (dict(variant="nb", null_energy=1.0), "null_energy: a share between 0 and 1"),
        (dict(variant="nb", null_energy=0.9, null_multiple=2), "give one of the two"),
        (dict(variant="v2", null_multiple=2), "null_multiple: is of variant 'nb', this one is 'v2'"),
        (dict(variant="v1", start="residual"), "start: is of variant 'nb', this one is 'v1'"),
        (dict(r=0), "a rank is a whole number"),
        (dict(r=True), "a rank is a whole number"),
        (dict(rank_pattern=["q_proj"]), "rank_pattern: a dict of module names"),
        (dict(alpha_pattern={"q_proj": "8"}), "lora_alpha: the numerator of the scaling is a number above 0"),
        (dict(lora_dropout=-0.1), "lora_dropout: a share from 0 to below 1"),
        (dict(lora_dropout="0.1"), "lora_dropout: a share from 0 to below 1"),
    ],
)
def test_configurations_that_cannot_be_right_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        LoraNullConfig(**{"r": 4, **config})


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"solver": "eig"}, "solver: no 'eig' .did you mean 'eigh'"),
        ({"form": "layerwise"}, "form: no 'layerwise'"),
        ({"device": "gpu"}, "device: no 'gpu' here, Expected one of cpu, cuda"),
        ({"device": 1.5}, "device: no 1.5 here"),
        ({"weights": "folder"}, "weights: takes WeightFiles, not 'folder'"),
        ({"min_tokens": "256"}, "min_tokens: takes a whole number, not '256'"),
        ({"seed": None}, "seed: takes a whole number, not None"),
        ({"cache": "no"}, "cache: takes True or False, not 'no'"),
    ],
)
def test_options_that_are_none_are_refused_before_any_work(wrong, said):
    with pytest.raises(UserError, match=said):
        InitOptions(**wrong)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_may_be_given_by_its_name(device):
    peft_model = wrapped()
    initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False, device=device)
    assert all(layer.started for layer in adapted_layers(peft_model).values())


def test_earlier_tasks_are_left_alone_too(tmp_path):
    """U spans the least directions of w₀ C₀/N₀ + w₁ C₁/N₁, here from an SVD of the inputs themselves."""
    others, names = random_batches(seed=9), ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    model = tiny_model().double()
    W = {name: model.get_submodule(name).weight.detach().numpy().copy() for name in names}
    knowledge, task = (oracle.capture_inputs(model, names, batches) for batches in (BATCHES, others))
    keep_grams(tmp_path, model, names, others, progress=False)
    peft_model = get_peft_model(model, LoraNullConfig(r=4, target_modules=names), autocast_adapter_dtype=False)
    options = {"earlier": (Earlier(tmp_path, 3.0),), "knowledge": 0.5}
    initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False, solver="eigh", **options)
    for name, layer in adapted_layers(peft_model).items():
        parts = ((knowledge[name], 0.5), (task[name], 3.0))
        X = np.concatenate([part * (weight / part.shape[1]) ** 0.5 for part, weight in parts], axis=1)
        A0 = oracle.factors(oracle.projection(W[name], X, 4), 4, 1.0)[0]
        A = layer.lora_A["default"].weight.detach().numpy()
        assert np.abs(A.T @ A - A0.T @ A0).max() < 1e-4 * np.abs(A0.T @ A0).max()  # kept Grams are float32


def test_a_device_that_the_whole_model_is_not_on_is_told(caplog):
    options = {"form": "hooks", "device": "meta", "min_tokens": 1, "progress": False}
    with contextlib.suppress(Exception):  # nothing can be solved there
        initialize_lora_null_weights(wrapped(), BATCHES, **options)
    assert "device: form='hooks' measures on cpu, where the model is; form='auto' may use meta" in caplog.text


def test_a_model_that_is_none_of_transformers_is_one_line():
    peft_model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraNullConfig(r=4, target_modules=["0"]))
    with pytest.raises(UserError, match="model: Sequential is not a transformers model"):
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)


class Plain(nn.Module):
    """A model of one's own, without a config, whose forward takes tokens alone."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(101, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.inner(self.table(input_ids)).relu())


def test_a_model_of_ones_own_is_started():
    peft_model = get_peft_model(Plain(), LoraNullConfig(r=4, target_modules=["inner", "out"]))
    before = peft_model(**BATCHES[0]).clone()
    report = initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)
    assert [line.name for line in report.layers] == ["inner", "out"]
    assert torch.equal(peft_model(**BATCHES[0]), before)


def test_what_no_calibration_reaches_is_named_before_it_runs(monkeypatch):
    monkeypatch.setattr("lora_null.fingerprint.fingerprint", None)
    for model, config, message in (
        (
            tiny_model(),
            dict(target_modules=["q_proj", "lm_head"]),
            r"lm_head lies outside the decoder of LlamaForCausalLM.*r'model\.\*\(q_proj\)'",
        ),
        (
            CanineModel(CanineConfig(**CANINE)),
            dict(target_modules=["query"]),
            "canine is not a transformers model with one",
        ),
    ):
        with pytest.raises(UserError, match=message):
            initialize_lora_null_weights(get_peft_model(model, LoraNullConfig(r=2, **config)), BATCHES, min_tokens=1)
    peft_model = get_peft_model(tiny_model(), LoraNullConfig(r=2), low_cpu_mem_usage=True)
    with pytest.raises(UserError, match="has no numbers; make the adapter without low_cpu_mem_usage=True"):
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1)


def test_the_dense_layers_of_a_classifiers_head_are_no_targets():
    shape = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = RobertaForSequenceClassification(RobertaConfig(**shape, max_position_embeddings=64, pad_token_id=0))
    peft_model = get_peft_model(model, LoraNullConfig(r=2, task_type="SEQ_CLS"))
    report = initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)
    assert len(report.layers) == 12 and not any("classifier" in line.name for line in report.layers)


def test_a_device_without_float64_is_one_line():
    class NoFloat64(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if (kwargs or {}).get("dtype") == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")  # as torch does there
            return function(*args, **(kwargs or {}))

    peft_model = wrapped()
    with NoFloat64(), pytest.raises(UserError, match=r"device: cpu has no float64, .*; take the CPU \(use_cpu=True"):
        initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)


def test_an_adapter_of_another_name_and_a_model_without_one_are_refused():
    with pytest.raises(UserError, match=r"adapter_name: no 'deflaut' .did you mean 'default'"):
        initialize_lora_null_weights(wrapped(), BATCHES, adapter_name="deflaut")
    with pytest.raises(UserError, match=r"peft_model: a LlamaForCausalLM, not what peft.get_peft_model returns"):
        initialize_lora_null_weights(tiny_model(), BATCHES)
