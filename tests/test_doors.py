"""Every way out of, and into, a PEFT model whose adapter is a LoRA-Null one: the right model, or one line that refuses.

`DOORS` is the table; what PEFT's own classes offer beyond it stands in `NOT_DOORS` with the reason. "Right" is told by
an oracle that knows nothing of PEFT: the original weights plus s·(BA − B0A0), added up with numpy in float64.
"""

import copy
import inspect
import io

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft import (
    ArrowConfig,
    LoraConfig,
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter
from tiny import logits, random_batches, tiny_model

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights, keep_in_null_basis
from lora_null.config import ResidualLoraConfig
from lora_null.layer import adapted_layers
from lora_null.residual import subtract_residuals
from lora_null.trainer.methods import make_method

BATCHES = random_batches()
NULL = {"nb": {"variant": "nb"}, "nb on a residual base": {"variant": "nb", "start": "residual"}}
NULL |= {"v1": {"variant": "v1"}, "v2": {"variant": "v2"}}
KINDS = [*NULL, "other residual method"]
RESIDUAL = ["v1", "nb on a residual base", "other residual method"]
IN_BASIS = ["nb", "nb on a residual base"]
CLOSE = 1e-9


def base():
    return tiny_model().double()


class Live:
    """A started and trained model in float64, and what it has to compute at a given strength of its adapter."""

    def __init__(self, kind, name="default", **config):
        config = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
        config["target_modules"] = ["q_proj", "v_proj", "down_proj"]
        chosen = LoraNullConfig(**NULL[kind], **config) if kind in NULL else ResidualLoraConfig(**config)
        model = get_peft_model(base(), chosen, adapter_name=name, autocast_adapter_dtype=False)
        draw = torch.Generator().manual_seed(3)
        if kind in NULL:
            initialize_lora_null_weights(model, BATCHES, min_tokens=1, progress=False, adapter_name=name)
        else:
            for layer in adapted_layers(model, name).values():
                for factor in (layer.lora_A, layer.lora_B):
                    w = factor[name].weight.data
                    w.copy_(torch.randn(w.shape, generator=draw, dtype=w.dtype) * 0.1)
            subtract_residuals(model, name)
        self.kind, self.name, self.model = kind, name, model
        self.start = {key: value * (kind in RESIDUAL) for key, value in self.products().items()}
        self.change(draw)

    def products(self):
        return {
            module: layer.scaling[self.name]
            * (layer.lora_B[self.name].weight.detach() @ layer.lora_A[self.name].weight.detach())
            for module, layer in adapted_layers(self.model, self.name).items()
        }

    def change(self, draw=None):
        draw = draw or torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) * 0.1)
        keep_in_null_basis(self.model)
        now = self.products()
        self.deltas = {module: (now[module] - self.start[module]).numpy() for module in now}

    def wanted(self, strength=1.0):
        oracle = base()
        for module, delta in self.deltas.items():
            weight = oracle.get_submodule(module).weight
            weight.data = torch.from_numpy(weight.detach().numpy() + strength * delta)
        return logits(oracle)

    def is_right(self, model=None, strength=1.0, close=CLOSE):
        got, wanted = logits(self.model if model is None else model), self.wanted(strength)
        return bool((got - wanted).abs().max() < close)

    def is_base(self, model=None):
        return self.is_right(model, 0.0)


def reloaded(folder):
    return PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False)


def saves(live, path, **options):
    live.model.save_pretrained(path, **options)
    return live.is_right(reloaded(path)) and live.is_right()


def saved_by_conversion(live, path):
    fresh = Live(live.kind)
    with torch.no_grad():
        for layer in adapted_layers(fresh.model).values():  # back to the start
            for name, value in zip(("lora_A", "lora_B"), layer.residual[:2] if layer.residual else (None, 0)):
                if value is not None:
                    getattr(layer, name)["default"].weight.copy_(torch.as_tensor(value))
    fresh.model.save_pretrained(path / "start")
    live.model.save_pretrained(path / "converted", path_initial_model_for_weight_conversion=str(path / "start"))
    return live.is_right(reloaded(path / "converted"))


def onto_fresh(live, path):
    live.model.save_pretrained(path)
    fresh = get_peft_model(base(), LoraConfig.from_pretrained(path), autocast_adapter_dtype=False)
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(live.model))
    return live.is_right(fresh)


def back_into_itself(live, path):
    kept = {key: value.clone() for key, value in get_peft_model_state_dict(live.model).items()}
    deltas = live.deltas
    live.change()
    moved = live.is_right() and bool((logits(live.model) - live.wanted()).abs().max() < CLOSE)
    set_peft_model_state_dict(live.model, kept)
    live.deltas = deltas
    return moved and live.is_right()


def foreign_into_slot(live, path):
    other = Live("v2", r=4)
    other.change(torch.Generator().manual_seed(11))
    other.model.save_pretrained(path)
    live.model.load_adapter(str(path), live.name)
    return other.is_right(live.model)


def loads_itself(live, path):
    live.model.save_pretrained(path)
    deltas = live.deltas
    live.change()
    live.model.load_adapter(str(path), live.name, is_trainable=True)
    live.deltas = deltas
    return live.is_right()


def loads_beside(live, path):
    other = Live("v2")
    other.change(torch.Generator().manual_seed(11))
    other.model.save_pretrained(path)
    live.model.load_adapter(str(path), "other", autocast_adapter_dtype=False)
    before = live.is_right()
    live.model.set_adapter("other")
    beside = other.is_right(live.model)
    live.model.set_adapter(live.name)
    return before and beside and live.is_right()


def adds_beside(live, path):
    live.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    before = live.is_right()
    live.model.set_adapter("other")
    as_base = live.is_base()
    live.model.delete_adapter("other")
    live.model.set_adapter(live.name)
    return before and as_base and live.is_right()


def adds_dora_beside(live, path):
    live.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    live.model.set_adapter("other")
    return live.is_base()


def saves_one_of_two(live, path):
    live.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    live.model.save_pretrained(path, selected_adapters=["other"])
    return sorted(p.name for p in path.iterdir()) == ["README.md", "other"]


def deletes(live, path):
    live.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    live.model.delete_adapter(live.name)
    return live.is_base()


def disables(live, path):
    with live.model.disable_adapter():
        off = live.is_base()
    return off and live.is_right()


def toggles_layers(live, path):
    live.model.base_model.disable_adapter_layers()
    off = live.is_base()
    live.model.base_model.enable_adapter_layers()
    return off and live.is_right()


def merges(live, path):
    live.model.merge_adapter()
    merged = live.is_right()
    with live.model.disable_adapter():  # PEFT unmerges
        off = live.is_base()
    return merged and off and live.is_right()


def unmerges(live, path):
    live.model.merge_adapter(safe_merge=True)
    live.model.unmerge_adapter()
    return live.is_right()


def merges_two(live, path):
    live.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    live.model.merge_adapter(["other", live.name])
    merged = live.is_right()
    live.model.unmerge_adapter()
    return merged and live.is_right()


def merged_then_unloaded(live, path):
    live.model.merge_adapter()
    return live.is_right(live.model.unload())


def weighted(kind, weight=1.0, **options):
    def run(live, path):
        live.model.add_weighted_adapter([live.name], [weight], "mixed", combination_type=kind, **options)
        kept = live.is_right()
        live.model.set_adapter("mixed")
        return kept and live.is_right(strength=weight, close=1e-5)  # PEFT takes the weights in float32

    return run


def weighted_two(kind, **config):
    def run(live, path):
        other = Live("v2", r=8 if live.kind in RESIDUAL and kind == "linear" else 4, **config)
        other.change(torch.Generator().manual_seed(5))
        other.model.save_pretrained(path)
        live.model.load_adapter(str(path), "other", autocast_adapter_dtype=False)
        options = {"svd_rank": 12} if kind == "svd" else {}
        live.model.add_weighted_adapter(["other", live.name], [0.5, 2.0], "mixed", combination_type=kind, **options)
        live.model.set_adapter("mixed")
        sums = {m: 2 * d + 0.5 * other.deltas[m] for m, d in live.deltas.items()}
        live.deltas = sums
        return live.is_right()

    return run


def deep_copies(live, path):
    twin = copy.deepcopy(live.model)
    deltas, live.model, first = live.deltas, twin, live.model
    live.change()
    twin.save_pretrained(path)
    moved = live.is_right(reloaded(path)) and live.is_right(twin)
    live.model, live.deltas = first, deltas
    return moved and live.is_right()


def pickles(live, path):
    box = io.BytesIO()
    torch.save(live.model, box)
    box.seek(0)
    twin = torch.load(box, weights_only=False)
    twin.save_pretrained(path)
    return live.is_right(twin) and live.is_right(reloaded(path))


def whole_state_round_trip(live, path):
    state, deltas = {k: v.clone() for k, v in live.model.state_dict().items()}, live.deltas
    live.change()
    live.model.load_state_dict(state)
    live.deltas = deltas
    return live.is_right()


def whole_state_onto_fresh(live, path):
    config = LoraNullConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    fresh = get_peft_model(base(), config, autocast_adapter_dtype=False)
    fresh.load_state_dict(live.model.state_dict())
    return live.is_right(fresh)


def whole_state_into_it(live, path):
    plain = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    live.model.load_state_dict(plain.double().state_dict())
    return live.is_base()


def base_state(live, path):
    other = base()
    other.load_state_dict(get_base_model_state_dict(live.model))
    return live.is_base(other)


def base_state_into_it(live, path):
    set_base_model_state_dict(live.model, base().state_dict())
    return live.is_right()


def rescales(live, path):
    with rescale_adapter_scale(live.model, 0.5):
        half = live.is_right(strength=0.5)
        live.model.merge_adapter()
        half = half and live.is_right(strength=0.5)
        live.model.unmerge_adapter()
    return half and live.is_right()


def scales_layers(live, path):
    layers = adapted_layers(live.model, live.name).values()
    for layer in layers:
        layer.scale_layer(0.5)
    half = live.is_right(strength=0.5)
    for layer in layers:
        layer.unscale_layer()
    whole = live.is_right()
    for layer in layers:
        layer.set_scale(live.name, 2.0)
    return half and whole and live.is_right(strength=2.0)


def delta_weights(live, path):
    layers = adapted_layers(live.model, live.name)
    return all(abs(layer.get_delta_weight(live.name).detach().numpy() - live.deltas[m]).max() < CLOSE
               for m, layer in layers.items())  # fmt: skip


def base_weights(live, path):
    original = base()
    return all(torch.allclose(layer.get_base_weight(), original.get_submodule(m).weight, rtol=0, atol=CLOSE)
               for m, layer in adapted_layers(live.model, live.name).items())  # fmt: skip


def sets_base_weight(live, path):
    for module, layer in adapted_layers(live.model, live.name).items():
        layer.set_base_weight(base().get_submodule(module).weight.data)
    return live.is_right()


def rows_choose(live, path):
    live.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    batch, names = BATCHES[0], [live.name] * len(BATCHES[0]["input_ids"])
    with torch.no_grad():
        got = live.model.eval()(**batch, adapter_names=names).logits[batch["attention_mask"].bool()]
    return bool((got - live.wanted()).abs().max() < CLOSE)


def reference_of_trl(live, path):
    """What TRL's DPO, GRPO, KTO and RLOO trainers do with a PeftModel."""
    live.model.add_adapter("ref", live.model.peft_config[live.name], autocast_adapter_dtype=False)
    for name, parameter in live.model.named_parameters():
        if f".{live.name}." in name:
            live.model.get_parameter(name.replace(f".{live.name}.", ".ref.")).data.copy_(parameter.data)
    live.model.set_adapter("ref")
    same = live.is_right()
    live.model.set_adapter(live.name)
    live.model.delete_adapter("ref")
    return same and live.is_right()


def twin_of_its_config(live, path):
    live.model.add_adapter("twin", live.model.peft_config[live.name], autocast_adapter_dtype=False)
    live.model.set_adapter("twin")
    return live.is_base()


def config_serves_another_model(live, path):
    get_peft_model(base(), live.model.peft_config[live.name])
    return live.is_right()


def wrapped_again(live, path):
    """PEFT draws the adapter anew on a model that carries one of this name already."""
    config = LoraNullConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    again = get_peft_model(live.model.get_base_model(), config, autocast_adapter_dtype=False)
    drawn = live.is_base(again)
    initialize_lora_null_weights(again, BATCHES, min_tokens=1, progress=False)
    return drawn and live.is_base(again)


def hot_swaps(live, path):
    other = Live("v2")
    other.change(torch.Generator().manual_seed(11))
    other.model.save_pretrained(path)
    hotswap_adapter(live.model, str(path), live.name, torch_device="cpu")
    return other.is_right(live.model)


def intruders(live, path):
    reduce_intruder_dimension(live.model, live.name, "reduced", threshold_epsilon=-1.0, logging_sink=None)
    return live.is_right()  # no direction is an intruder: the copy is what it was


# door → what passes through it; where a residual method refuses, it is in REFUSED_WITH_RESIDUAL
DOORS = {
    "forward": lambda live, path: live.is_right(),
    "generate": lambda live, path: live.model.generate(BATCHES[0]["input_ids"][:1, :4], max_new_tokens=2) is not None,
    "disable_adapter": disables,
    "disable_adapter_layers, enable_adapter_layers": toggles_layers,
    "save_pretrained, from_pretrained": saves,
    "save_pretrained(safe_serialization=False)": lambda live, path: saves(live, path, safe_serialization=False),
    "save_pretrained(state_dict)": lambda live, path: saves(live, path, state_dict=live.model.state_dict()),
    "save_pretrained(path_initial_model_for_weight_conversion)": saved_by_conversion,
    "save_pretrained(selected_adapters)": saves_one_of_two,
    "get_peft_model_state_dict": onto_fresh,
    "set_peft_model_state_dict": back_into_itself,
    "load_adapter": loads_itself,
    "load_adapter(another name)": loads_beside,
    "load_adapter(a foreign adapter under this name)": foreign_into_slot,
    "add_adapter, set_adapter": adds_beside,
    "add_adapter(with DoRA)": adds_dora_beside,
    "add_adapter(the adapter's own config)": twin_of_its_config,
    "add_adapter('ref') by TRL": reference_of_trl,
    "get_peft_model(the adapter's own config)": config_serves_another_model,
    "get_peft_model(of its base model)": wrapped_again,
    "delete_adapter": deletes,
    "merge_and_unload": lambda live, path: live.is_right(live.model.merge_and_unload()),
    "merge_and_unload(safe_merge)": lambda live, path: live.is_right(live.model.merge_and_unload(safe_merge=True)),
    "unload": lambda live, path: live.is_base(live.model.unload()),
    "merge_adapter": merges,
    "merge_adapter(two)": merges_two,
    "merge_adapter, unload": merged_then_unloaded,
    "unmerge_adapter": unmerges,
    "add_weighted_adapter(linear)": weighted("linear", 0.7),
    "add_weighted_adapter(cat)": weighted("cat"),
    "add_weighted_adapter(svd)": weighted("svd", -1.5),
    "add_weighted_adapter(two, cat)": weighted_two("cat"),
    "add_weighted_adapter(two, svd)": weighted_two("svd"),
    "deepcopy": deep_copies,
    "pickle": pickles,
    "state_dict, load_state_dict": whole_state_round_trip,
    "load_state_dict(onto a fresh model)": whole_state_onto_fresh,
    "load_state_dict(of a whole plain model)": whole_state_into_it,
    "get_base_model_state_dict": base_state,
    "set_base_model_state_dict": base_state_into_it,
    "rescale_adapter_scale": rescales,
    "scale_layer, unscale_layer, set_scale": scales_layers,
    "get_delta_weight": delta_weights,
    "get_base_weight": base_weights,
    "set_base_weight": sets_base_weight,
    "forward(adapter_names)": rows_choose,
    "hotswap_adapter": hot_swaps,
    "reduce_intruder_dimension": intruders,
}
REFUSED_WITH_RESIDUAL = {
    "load_adapter(a foreign adapter under this name)": "do not start where adapter 'default' does",
    "add_adapter(with DoRA)": "use_dora reads the base weights",
    "add_adapter(the adapter's own config)": "belongs to an adapter that was started",
    "get_peft_model(the adapter's own config)": "belongs to an adapter that was started",
    "load_state_dict(onto a fresh model)": "start the model from the same initialization first",
    "load_state_dict(of a whole plain model)": "lacks a residual",
    "get_base_model_state_dict": "residual_taken_out_of_base",  # PyTorch's own words: an entry that no model knows
    "set_base_model_state_dict": "residual_taken_out_of_base",
    "set_base_weight": "carries a residual",
    "forward(adapter_names)": "rows cannot choose",
    "hotswap_adapter": "no hot swap, its base carries a residual",
    "reduce_intruder_dimension": "belongs to an adapter that was started",
}
REFUSED_IN_BASIS = {
    "load_state_dict(of a whole plain model)": "leave the null basis",  # the foreign A of v2 is inside
    "hotswap_adapter": "no hot swap, its A is kept in a basis",
}
NOT_DOORS = {
    "reads nothing of the adapter": "create_or_update_model_card get_base_model get_layer_status get_model_status "
    "get_nb_trainable_parameters print_trainable_parameters prepare_model_for_gradient_checkpointing get_model_config "
    "supports_lora_conversion tuner_layer_cls get_base_layer set_requires_grad",
    "save_pretrained, then an upload": "push_to_hub",
    "of prompt learning": "get_prompt get_prompt_embedding_to_save prepare_inputs_for_generation",
    "makes the adapter, by what update_layer does": "inject_adapter update_layer resolve_lora_variant",
    "in the table under the model's name": "enable_adapters merge unmerge",
    "starts another method; LoraNullConfig refuses it": "corda_init loftq_init lora_ga_init mica_init olora_init "
    "orthogonal_init pissa_init reset_lora_parameters",
    "in save_pretrained(path_initial_model_for_weight_conversion)": "subtract_mutated_init",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_door(door, kind, tmp_path):
    live = Live(kind)
    assert live.is_right() and not live.is_base()
    refused = REFUSED_WITH_RESIDUAL if kind in RESIDUAL else REFUSED_IN_BASIS if kind in IN_BASIS else {}
    if door in refused:
        with pytest.raises((UserError, RuntimeError), match=refused[door]) as refusal:
            DOORS[door](live, tmp_path)
        if refusal.type is UserError:
            assert "\n" not in str(refusal.value)
    else:
        assert DOORS[door](live, tmp_path)


def test_every_door_of_peft_is_in_the_table():
    offered = {
        name
        for kind in (PeftModelForCausalLM, LoraModel, Linear)
        for name, _ in inspect.getmembers(kind, callable)
        if not name.startswith("_") and not hasattr(torch.nn.Module, name)
    }
    takes_model = {"model", "peft_model"}
    offered |= {
        name
        for name in peft.__all__
        if inspect.isfunction(f := getattr(peft, name)) and takes_model & set(inspect.signature(f).parameters)
    }
    other = "find_kappa_target_modules initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    other += "get_peft_model inject_adapter_in_model preprocess_loraga create_arrow_model get_eva_state_dict "
    other += "initialize_lora_eva_weights replace_lora_weights_loftq prepare_model_for_kbit_training "
    other += "cast_mixed_precision_params convert_to_lora save_as_lora"  # make adapters, or convert other kinds
    known = {word.strip(",") for door in DOORS for word in door.replace("(", " ").replace(")", " ").split()}
    known |= {name for names in NOT_DOORS.values() for name in names.split()} | set(other.split())
    assert offered - known == set()


@pytest.mark.parametrize("reads, said", [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' reads"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' reads"),
    ({"use_dora": True}, "use_dora reads"),
])  # fmt: skip
def test_what_reads_the_base_is_refused_beside_a_residual(reads, said, tmp_path):
    """Added, loaded, or there before the residual is taken out."""
    config = LoraConfig(r=2, target_modules=["q_proj"], **reads)
    live = Live("v1")
    with pytest.raises(UserError, match=said):
        live.model.add_adapter("other", config)
    with pytest.raises(UserError, match="arrow_config reads"):
        live.model.add_adapter("router", LoraConfig(target_modules=["q_proj"], arrow_config=ArrowConfig()))
    get_peft_model(tiny_model(), copy.copy(config)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=said):
        live.model.load_adapter(tmp_path, "other")
    assert live.is_right() and list(live.model.peft_config) == ["default"]
    live.model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["up_proj"], use_dora=True))
    if "init_lora_weights" not in reads:
        model = get_peft_model(base(), ResidualLoraConfig(r=4, target_modules=["q_proj"]))
        model.add_adapter("other", config)
        with pytest.raises(UserError, match=said):
            subtract_residuals(model)


def test_a_combination_of_adapters_in_a_basis_has_none_and_says_so():
    live = Live("nb")
    live.model.add_weighted_adapter([live.name], [1.0], "mixed", combination_type="linear")
    live.model.set_adapter("mixed")
    live.model.eval()(**BATCHES[0])
    with pytest.raises(UserError, match="plain LoRA without the basis"):
        live.model.train()(**BATCHES[0])


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_by_accelerate(kind, tmp_path):
    """With its hooks the weights are there only while their own module is called.

    They are given: a residual adapter's own `state_dict` has other factors, which accelerate refuses in the forward pass.
    """
    live = Live(kind)
    tensors = [*live.model.named_parameters(), *live.model.named_buffers()]
    cpu_offload(live.model, state_dict={name: tensor.detach() for name, tensor in tensors})
    assert adapted_layers(live.model)["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.is_meta
    assert live.is_right() and disables(live, tmp_path) and deletes(live, tmp_path)


@pytest.mark.parametrize("start", [
    subtract_residuals,
    make_method("pissa").check,
    lambda model: initialize_lora_null_weights(model, BATCHES, min_tokens=1, progress=False),
])  # fmt: skip
def test_the_head_is_refused_before_anything_changes(start):
    """PEFT saves its weight beside its adapter, which would be what is left of it."""
    model = get_peft_model(base(), LoraNullConfig(r=4, variant="v1", target_modules=["lm_head", "q_proj"]))
    before = logits(model)
    with pytest.raises(UserError, match="lm_head is the model's head"):
        start(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("door", ["save_pretrained, from_pretrained", "merge_adapter", "deepcopy", "delete_adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_name_is_as_good_as_default(door, kind, tmp_path):
    live = Live(kind, name="mine")
    if door.startswith("save"):
        live.model.save_pretrained(tmp_path)
        assert live.is_right(reloaded(tmp_path / "mine"))
    elif door == "deepcopy":
        assert live.is_right(copy.deepcopy(live.model))
    else:
        assert DOORS[door](live, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{"use_rslora": True}, {"alpha_pattern": {"down_proj": 5}}, {"lora_alpha": 9}])
def test_saved_config_keeps_every_scaling(config, kind, tmp_path):
    live = Live(kind, **config)
    assert saves(live, tmp_path)
    assert live.model.peft_config["default"].r == 4  # what was asked for


RS = {"use_rslora": True}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", [weighted("linear", 0.7), weighted("cat"), weighted("svd", -1.5),
                                     weighted_two("cat", **RS), weighted_two("svd", **RS)])  # fmt: skip
def test_a_combination_of_rank_stabilized_adapters_is_their_sum(combine, kind, tmp_path):
    live = Live(kind, **RS)
    assert combine(live, tmp_path)
    assert {name: config.use_rslora for name, config in live.model.peft_config.items() if name != "other"} == {
        "default": True,
        "mixed": False,
    }
