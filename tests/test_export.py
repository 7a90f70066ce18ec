import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import logits, random_batches, tiny_model

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights
from lora_null.adapters.base_hash import base_fingerprint
from lora_null.adapters.join import join, join_onto
from lora_null.adapters.merge import write_checkpoint
from lora_null.adapters.plain import CONFIG_FILE, WEIGHTS_FILE, plain_factors, save_plain_adapter
from lora_null.adapters.saved import read_adapter
from lora_null.layer import adapted_layers
from lora_null.utils.files import read_safetensors, write_safetensors

BATCHES = random_batches()
CASES = {
    "plain": {},
    "alpha": {"lora_alpha": 1},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "rank pattern": {"rank_pattern": {"down_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"q_proj": 9}},
    "both with rslora": {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"k_proj": 3}},
}


def trained(variant, **config):
    """A model whose adapter has moved away from its start in every factor that may move."""
    peft_model = get_peft_model(tiny_model(), LoraNullConfig(r=4, variant=variant, **config))
    initialize_lora_null_weights(peft_model, BATCHES, min_tokens=1, progress=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return peft_model.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_saved_adapter_on_a_fresh_base_is_the_live_model(tmp_path, variant, case):
    live = trained(variant, **CASES[case])
    saved = save_plain_adapter(live, tmp_path)
    fresh = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert (logits(fresh) - logits(live)).abs().max() < 1e-4
    assert (logits(fresh) - logits(tiny_model())).abs().max() > 1e-2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and "variant" not in config
    assert saved == sum(p.numel() for n, p in fresh.named_parameters() if "lora_" in n)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_factors_of_16_bits_lose_nothing_to_another_scaling(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 7}, init_lora_weights=False)
    live = get_peft_model(tiny_model().bfloat16(), config, autocast_adapter_dtype=False)
    save_plain_adapter(live, tmp_path)
    saved = read_adapter(tmp_path)
    for name, (A, B) in saved.pairs().items():
        own = adapted_layers(live)[name]
        exact = own.scaling["default"] * own.lora_B["default"].weight.double() @ own.lora_A["default"].weight.double()
        found = saved.scaling(name) * B.double() @ A.double()
        assert torch.dist(found, exact) < 1e-6 * exact.norm()
    sixteen = replace(saved, tensors={key: tensor.bfloat16() for key, tensor in saved.tensors.items()})
    both = {"before": replace(sixteen, config=saved.config | {"lora_alpha": 7}), "after": sixteen}
    joined, scaling = join(both)
    for name, (A, B) in joined.items():
        exact = sum(x.scaling(name) * b.double() @ a.double() for x in both.values() for a, b in [x.pairs()[name]])
        assert torch.dist(scaling * B.double() @ A.double(), exact) < 1e-6 * exact.norm()


def test_a_bias_of_b_is_scaled_as_b_is(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True, alpha_pattern={"v_proj": 32})
    live = get_peft_model(tiny_model(attention_bias=True), config)
    torch.manual_seed(1)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_plain_adapter(live, tmp_path)
    fresh = PeftModel.from_pretrained(tiny_model(attention_bias=True), tmp_path)
    assert (logits(fresh) - logits(live)).abs().max() < 1e-4


@pytest.mark.parametrize("variant, rank", [("v1", 8), ("v2", 4)])
def test_rank_is_2r_for_v1_and_r_for_v2(tmp_path, variant, rank):
    save_plain_adapter(trained(variant), tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.use_rslora) == (rank, rank, False)


def test_v1_factors_are_copies_without_arithmetic():
    layer = next(iter(adapted_layers(trained("v1")).values()))
    A, B = plain_factors(layer)
    assert torch.equal(A[:4], layer.lora_A["default"].weight) and torch.equal(A[4:], layer.residual.A)
    assert torch.equal(B[:, :4], layer.lora_B["default"].weight) and torch.equal(B[:, 4:], -layer.residual.B)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_save_pretrained_too_writes_an_adapter_for_the_original_base(tmp_path, variant):
    live = trained(variant)
    live.save_pretrained(tmp_path)
    assert (logits(PeftModel.from_pretrained(tiny_model(), tmp_path)) - logits(live)).abs().max() < 1e-4


def test_loads_where_lora_null_cannot_be_imported(tmp_path):
    """Both variants in one process, most of whose time are imports."""
    live = {variant: trained(variant) for variant in ("v1", "v2")}
    for variant, model in live.items():
        save_plain_adapter(model, tmp_path / variant)
    tiny_model().save_pretrained(tmp_path / "base")
    torch.save({"input_ids": BATCHES[0]["input_ids"], "mask": BATCHES[0]["attention_mask"]}, tmp_path / "batch.pt")
    script = """
import sys
sys.modules["lora_null"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
batch = torch.load("batch.pt", weights_only=True)
for variant in ("v1", "v2"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), variant)
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["mask"]).logits
    torch.save(out, f"{variant}.pt")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    for variant, model in live.items():
        out = torch.load(tmp_path / f"{variant}.pt", weights_only=True)[BATCHES[0]["attention_mask"].bool()]
        assert (out - logits(model)).abs().max() < 1e-4


def as_8_bit(A, B):
    return A.to(torch.int8), B.to(torch.int8)


@pytest.mark.parametrize(
    "change, config, message",
    [
        (lambda A, B: (A[:2], B), {}, r"has A \(2, 32\) and B \(32, 4\), not \(4, d_in\) and \(d_out, 4\)"),
        (lambda A, B: (A.flatten(), B), {}, r"has A \(128,\)"),
        (lambda A, B: (A, B), {"rank_pattern": {"q_proj": 3}}, r"not \(3, d_in\)"),
        (lambda A, B: (A / 0, B), {}, "holds NaN or infinite numbers"),
        (as_8_bit, {}, "is stored as int8"),
        (None, {"init_lora_weights": "pissa"}, "was started by 'pissa', so its A and B are no change of the original"),
        (None, {"r": 0}, r"not a LoRA config \(r or rank_pattern holds 0\)"),
        (None, {"lora_alpha": math.inf}, r"\(lora_alpha or alpha_pattern holds inf\)"),
        (None, {"lora_alpha": "8"}, r"\(lora_alpha or alpha_pattern holds '8'\)"),
        (None, {"rank_pattern": {"q_proj": "3"}}, r"\(r or rank_pattern holds '3'\)"),
    ],
)
def test_factors_that_are_none_are_refused_before_they_are_used(tmp_path, change, config, message):
    save_plain_adapter(trained("v2"), tmp_path)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text()) | config
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    if change is not None:
        tensors, _ = read_safetensors(tmp_path / WEIGHTS_FILE)
        keys = [f"base_model.model.model.layers.1.self_attn.q_proj.lora_{which}.weight" for which in "AB"]
        tensors |= zip(keys, change(*(tensors[key] for key in keys)))
        write_safetensors(tmp_path / WEIGHTS_FILE, tensors, {})
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path).pairs()


@pytest.mark.parametrize("damage", ["cut", "missing", "index", "no map"])
def test_damaged_files_of_a_base_are_one_line(tmp_path, damage):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shard, index = tmp_path / "model-00002-of-00003.safetensors", tmp_path / "model.safetensors.index.json"
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:300])
    else:
        index.write_text("{" if damage == "index" else "{}")
    for use in (base_fingerprint, lambda folder: write_checkpoint(folder, tmp_path / "out", {}, model)):
        with pytest.raises(UserError, match=f"{shard if damage in ('cut', 'missing') else index}: damaged"):
            use(tmp_path)


def test_the_saved_config_lists_its_targets_in_one_order(tmp_path):
    save_plain_adapter(get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear")), tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 3 and targets == sorted(targets)


@pytest.mark.parametrize("others", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [1]}])
def test_an_adapter_joined_onto_one_of_other_modules_is_both(tmp_path, others):
    drawn = dict(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"])
    first = get_peft_model(tiny_model(), LoraConfig(**drawn))
    save_plain_adapter(first, tmp_path / "first")
    second = get_peft_model(first.merge_and_unload(), LoraConfig(**{**drawn, "r": 2, **others}))
    save_plain_adapter(second, tmp_path / "second")
    join_onto(tmp_path / "first", tmp_path / "second")
    fresh = PeftModel.from_pretrained(tiny_model(), tmp_path / "second")
    assert (logits(fresh) - logits(second)).abs().max() < 1e-4
