"""An initialization is taken again for the same base, texts, adapter and settings, and for nothing else."""

import copy
import functools
import importlib
import json
import sys
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.fx
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from tiny import load_initialization, random_batches, tiny_model
from torch import nn
from transformers import AttentionInterface, LlamaForSequenceClassification
from transformers.models.llama import modeling_llama
from trl.trainer.utils import add_fused_lm_head

from lora_null import LoraNullConfig, UserError, store
from lora_null.fingerprint import WORDS, fingerprint, fingerprint_of, initialization_key
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.utils.own_code import own_code_at

BATCHES = random_batches()
CHANGES = {
    "texts": dict(batches=random_batches(seed=9)),
    "fewer texts": dict(batches=BATCHES[:-1]),
    "order of texts": dict(batches=BATCHES[::-1]),
    "mask": dict(batches=[{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in BATCHES]),
    "positions": dict(batches=[{**b, "position_ids": torch.arange(12).expand(8, 12) % 5} for b in BATCHES]),
    "base": dict(model=dict(seed=5)),
    "base's dtype": dict(dtype=torch.bfloat16),
    "rank": dict(config=dict(r=3)),
    "one layer's rank": dict(config=dict(rank_pattern={"up_proj": 3})),
    "scaling": dict(config=dict(lora_alpha=9)),
    "one layer's scaling": dict(config=dict(alpha_pattern={"up_proj": 9})),
    "modules": dict(config=dict(target_modules=["q_proj", "up_proj"])),
    "seed": dict(options=dict(seed=3)),
    "solver": dict(options=dict(solver="krylov")),
    "form": dict(options=dict(form="hooks")),
    "rope": dict(model=dict(rope_parameters={"rope_type": "default", "rope_theta": 10.0})),
    "activation": dict(model=dict(hidden_act="gelu")),
    "norms": dict(model=dict(rms_norm_eps=1.0)),
}


def wrapped(model=None, dtype=torch.float32, config=None, **_):
    return get_peft_model(tiny_model(**(model or {})).to(dtype), LoraNullConfig(**{"r": 4, **(config or {})}))


def start(folder=None, *, cache=False, batches=BATCHES, options=None, **changes):
    peft_model = wrapped(**changes)
    settings = InitOptions(**{"min_tokens": 1, "progress": False, "cache": cache, **(options or {})})
    report, _ = start_adapter(peft_model, batches, settings, folder=folder)
    return factors(peft_model), report


def factors(peft_model):
    return {name: layer.lora_A["default"].weight for name, layer in adapted_layers(peft_model).items()}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "init"


@pytest.mark.parametrize(
    "what, cache", [*((what, False) for what in CHANGES), ("texts", True), ("base", True), ("rope", True)]
)
def test_parts_of_another_initialization_are_neither_read_nor_left(what, cache, tmp_path, fresh_cache, capsys):
    start(tmp_path / "init", cache=cache)
    found, report = start(tmp_path / "init", cache=cache, **CHANGES[what])
    assert "reused" not in capsys.readouterr().err
    assert same(found, start(**CHANGES[what])[0])
    keys = {part.key for part in store.read_parts(tmp_path / "init").values()}
    assert keys == {report.key} == {json.loads((tmp_path / "init" / "layers.json").read_text())["key"]}
    loaded = wrapped(**CHANGES[what])
    assert load_initialization(tmp_path / "init", loaded)[0].key == report.key
    assert same(factors(loaded), found)


def test_every_tensor_of_a_batch_decides():
    """Of rows with images too, which have the same captions."""
    key = lambda **more: initialization_key("base", {}, "default", [{**BATCHES[0], **more}])  # noqa: E731
    pixels = torch.rand(8, 3, 4, 4)
    others = [pixels + 1, pixels.bfloat16(), pixels.view(8, 3, 16), pixels[:, 0, 0, 0] > 0.5]
    assert len({key(), key(pixel_values=pixels), *(key(pixel_values=other) for other in others)}) == 6
    assert key(pixel_values=pixels) == key(pixel_values=pixels.clone()) != key(image_sizes=pixels)
    assert key(max_length_q=12) == key()


@pytest.mark.parametrize("cache", [False, True])
def test_an_equal_one_is_taken_whole_or_in_parts(cache, tmp_path, fresh_cache, capsys):
    found, report = start(tmp_path / "init", cache=cache)
    again, second = start(tmp_path / "init", cache=cache)
    assert "initialization: reused" in capsys.readouterr().err
    assert same(found, again) and report.key == second.key
    place = fresh_cache / report.key if cache else tmp_path / "init"
    (place / "layers.json").unlink()
    (place / "factors.model.layers.1.safetensors").unlink()
    assert same(found, start(tmp_path / "init", cache=cache)[0])
    assert "continued, 7 of 14 modules are there already" in capsys.readouterr().err


@pytest.mark.parametrize("cache", [False, True])
def test_nothing_is_reused_of_a_model_with_hooks_of_ones_own(cache, tmp_path, fresh_cache, capsys):
    def steered(factor):
        peft_model = wrapped()
        peft_model.enable_input_require_grads()  # a library's hook: nothing to say of it
        if factor != 1:
            layer = peft_model.get_base_model().model.layers[0]
            layer.register_forward_hook(lambda _, args, out: out * factor)
        settings = InitOptions(min_tokens=1, progress=False, cache=cache)
        return factors(peft_model), start_adapter(peft_model, BATCHES, settings, folder=tmp_path / "init")[0]

    plain, _ = steered(1)
    assert "computed anew" not in capsys.readouterr().err
    found = []
    for factor in (2, 3):
        found.append(steered(factor)[0])
        said = capsys.readouterr().err
        assert "computed anew" in said and "at model.layers.0 does" in said
    name = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(found[0][name], plain[name]) and not torch.equal(found[0][name], found[1][name])
    assert same(factors_loaded(tmp_path / "init"), found[1])
    again, _ = steered(1)
    assert same(again, plain)


def test_nothing_is_reused_of_a_model_whose_own_code_was_edited(tmp_path, fresh_cache, monkeypatch):
    """As that of a model with `trust_remote_code`: no weight and no setting tells of it."""
    text = "from transformers.models.llama.modeling_llama import LlamaMLP\n\n\n"
    text += "class Mine(LlamaMLP):\n    def forward(self, x):\n        return FACTOR * super().forward(x)\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    for factor in ("2.0", "3.0", "2.0 "):
        (tmp_path / "edited_code.py").write_text(text.replace("FACTOR", factor))
        monkeypatch.delitem(sys.modules, "edited_code", raising=False)
        importlib.invalidate_caches()
        peft_model = wrapped()
        for layer in peft_model.get_base_model().model.layers:
            layer.mlp.__class__ = importlib.import_module("edited_code").Mine
        report, _ = start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False, cache=True))
        found[factor] = factors(peft_model), report.key
    assert len({key for _, key in found.values()}) == 3
    assert not same(found["2.0"][0], found["3.0"][0]) and same(found["2.0"][0], found["2.0 "][0])


def mixed_precision(model):
    """As accelerate prepares a model that trains in mixed precision."""
    forward = torch.autocast("cpu", torch.bfloat16)(getattr(model.forward, "__func__", model.forward))
    model.forward = MethodType(convert_outputs_to_fp32(forward), model)


BY_LIBRARIES = {
    "accelerate's precision": mixed_precision,
    "accelerate's hook": lambda model: add_hook_to_module(model, ModelHook()),
    "TRL's head": add_fused_lm_head,
    "torch's partial": lambda model: model.register_forward_hook(functools.partial(nn.functional.dropout, p=0.0)),
    "torch's module": lambda model: model.register_forward_hook(nn.Identity()),
    "torch's compiler": lambda model: setattr(model, "forward", torch.compile(model.forward)),
}


@pytest.mark.parametrize("name", BY_LIBRARIES)
def test_a_forward_is_whose_who_wrote_it(name):
    """The class is defined here, as remote code is defined elsewhere: its own forward is nobody's patch."""
    kind = type("Remote", (type(tiny_model()),), {"forward": lambda self, *args, **kwargs: None})
    model = kind(tiny_model().config)
    for add in (BY_LIBRARIES[name], mixed_precision):
        add(model)
        assert own_code_at(model) is None

    patched = kind(tiny_model().config)
    patched.forward = MethodType(functools.wraps(nn.Linear.forward)(lambda self, x: x), patched)
    assert "<lambda>" in own_code_at(patched)
    # TRL's head says that it wraps the class's own.
    for add in (BY_LIBRARIES[name], mixed_precision) if name != "TRL's head" else ():
        add(patched)
        assert "<lambda>" in own_code_at(patched)


def own_rotary(q, k, cos, sin, **_):
    return q, k


def own_forward(mlp, x):
    return mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x))


def own_attention(module, query, key, value, *_, **__):
    return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], dim=2), None


def other_activation(model, _):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def other_attention(model, _):
    AttentionInterface.register("own", own_attention)
    model.set_attn_implementation("own")


OWN_CODE = {
    "an activation": other_activation,
    "a class's forward": lambda _, patch: patch.setattr(modeling_llama.LlamaMLP, "forward", own_forward),
    "a function that it calls": lambda _, patch: patch.setattr(modeling_llama, "apply_rotary_pos_emb", own_rotary),
    "attention": other_attention,
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_CODE)
def test_a_model_that_computes_otherwise_has_an_initialization_of_its_own(name, fresh_cache, monkeypatch):
    def computed(cache, change=None):
        model = tiny_model()
        if change is not None:
            change(model, monkeypatch)
        peft_model = get_peft_model(model, LoraNullConfig(r=4))
        start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False, cache=cache))
        return factors(peft_model)

    plain, changed = computed(True), computed(True, OWN_CODE[name])
    assert same(changed, computed(False, OWN_CODE[name])) and not same(plain, changed)
    assert same(changed, computed(True, OWN_CODE[name]))


def traced_activation(compute):
    class Activation(nn.Module):
        def forward(self, x):
            return compute(x)

    return torch.fx.symbolic_trace(Activation())


@pytest.mark.parametrize("made", ["by torch.fx", "without a module", "from a file that is gone"])
def test_code_of_no_file_has_an_initialization_of_its_own(made, fresh_cache, tmp_path, monkeypatch):
    def key(compute, name):
        peft_model, activation = wrapped(), traced_activation(compute)
        if made != "by torch.fx":
            home = {} if made == "without a module" else {"__name__": "gone"}
            exec(f"def forward(self, x):\n    return x.{name}()", home)
            activation = type("Own", (nn.ReLU,), {"__module__": "torch.own", "forward": home["forward"]})()
        for layer in peft_model.get_base_model().model.layers:
            layer.mlp.act_fn = activation
        report, _ = start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False, cache=True))
        return report.key

    monkeypatch.setitem(sys.modules, "gone", SimpleNamespace(__file__=str(tmp_path / "gone.py")))
    one, other, again = key(torch.relu, "relu"), key(torch.tanh, "tanh"), key(torch.relu, "relu")
    assert one != other and (one == again) == (made != "from a file that is gone")


def factors_loaded(folder):
    peft_model = wrapped()
    load_initialization(folder, peft_model)
    return factors(peft_model)


def test_an_unfinished_start_over_a_finished_one_is_no_initialization(tmp_path, monkeypatch):
    start(tmp_path)
    write, written = store.write_part, []

    def once(folder, name, part):
        if written:
            raise KeyboardInterrupt
        written.append(name)
        write(folder, name, part)

    monkeypatch.setattr(store, "write_part", once)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, **CHANGES["texts"])
    with pytest.raises(UserError, match="holds no complete initialization"):
        load_initialization(tmp_path, wrapped())


@pytest.mark.parametrize("change", [lambda r: r.pop("key"), lambda r: r.pop("layers"), lambda r: r.update(other=1)])
def test_what_another_version_wrote_is_refused_in_one_line(tmp_path, change):
    start(tmp_path)
    report = json.loads((tmp_path / "layers.json").read_text())
    change(report)
    (tmp_path / "layers.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"written by an(other| older) version"):
        load_initialization(tmp_path, wrapped())


def permuted_rows(model):
    table = model.model.embed_tokens.weight
    table.copy_(table.flip(0))


def permuted_blocks(model):
    q = model.model.layers[0].self_attn.q_proj.weight
    q.copy_(q.view(4, 2, 4, -1).transpose(1, 2).reshape(q.shape))


def swapped_layers(model):
    one, other = (layer.mlp.up_proj.weight for layer in model.model.layers)
    one.data, other.data = other.data, one.data


def swapped_neighbors(model):
    norm = model.model.norm.weight
    norm.copy_(norm.view(-1, 2).flip(1).reshape(-1))


def signs_of_every_fourth(model):
    model.model.layers[1].mlp.up_proj.weight[:, 3::4].neg_()


def one_number(model):
    up = model.model.layers[1].mlp.up_proj.weight
    up[7, 9] += up[7, 9] * 2**-7


def positions(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def a_buffer(model):
    model.model.layers[0].mlp.register_buffer("shift", torch.ones(3))


def multiplied(model):
    model.model.layers[0].self_attn.scaling *= 2


def other_epsilon(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 1.0


def frequent(model):
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}


@pytest.mark.parametrize(
    "change",
    [permuted_rows, permuted_blocks, swapped_layers, swapped_neighbors, signs_of_every_fourth, one_number, positions,
     a_buffer, multiplied, other_epsilon, frequent],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_changes_the_inputs_is_another_base(change, dtype):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand_like(model.model.norm.weight))  # ones are the same in any order
    before = fingerprint_of(get_peft_model(copy.deepcopy(model), LoraNullConfig(r=4)), None)
    with torch.no_grad():
        change(model)
    assert fingerprint_of(get_peft_model(model, LoraNullConfig(r=4)), None) != before


def loaded_from_elsewhere(model):
    model.config._name_or_path = "elsewhere"
    model.config.transformers_version = "9.9"


def as_trainers_set_it(model):
    model.config.use_cache = False
    model.config.pad_token_id = model.config.eos_token_id
    model.config.attention_dropout = 0.1
    model.gradient_checkpointing_enable()


def used(model):
    model(**BATCHES[0])


def without_dropout(model):
    model.model.drop = torch.nn.Dropout(0.5)
    model.model.embed_tokens.padding_idx = None


@pytest.mark.parametrize("change", [loaded_from_elsewhere, as_trainers_set_it, used, without_dropout])
@pytest.mark.parametrize("rope", ["default", "dynamic", "linear"])
def test_what_loading_and_training_set_is_no_other_base(change, rope):
    scaling = {} if rope == "default" else {"factor": 2.0}
    shape = {"rope_parameters": {"rope_type": rope, "rope_theta": 10000.0, **scaling}, "max_position_embeddings": 8}
    one, other = (tiny_model(**shape) for _ in range(2))
    change(other)
    bases = [fingerprint_of(get_peft_model(model, LoraNullConfig(r=4)), None) for model in (one, other)]
    assert bases[0] == bases[1]


def classifier(head_seed):
    config = tiny_model().config
    config.num_labels = 1
    torch.manual_seed(head_seed)
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(tiny_model().model.state_dict())
    return model


@pytest.mark.parametrize("kind", ["head", "embeddings", "tokens", "second adapter"])
def test_what_trains_beside_the_adapter_is_no_part_of_the_base(kind):
    if kind == "head":  # drawn at random each time, and trained: modules_to_save of PEFT's own for SEQ_CLS
        made = [get_peft_model(classifier(seed), LoraNullConfig(r=4, task_type="SEQ_CLS")) for seed in (1, 2)]
        assert fingerprint_of(made[0], None) == fingerprint_of(made[1], None)
        return
    plain = get_peft_model(tiny_model(), LoraNullConfig(r=4))
    extra = {"embeddings": dict(modules_to_save=["embed_tokens"]), "tokens": dict(trainable_token_indices=[5, 7])}
    other = get_peft_model(tiny_model(), LoraNullConfig(r=4, **extra.get(kind, {})))
    if kind == "second adapter":
        other.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert fingerprint_of(plain) == fingerprint_of(other)
    with torch.no_grad():
        other.get_base_model().model.embed_tokens.get_parameter(
            {"embeddings": "original_module.weight", "tokens": "token_adapter.base_layer.weight"}.get(kind, "weight")
        ).add_(1.0)
    assert fingerprint_of(plain) != fingerprint_of(other)


def test_the_fingerprint_of_any_dtype_and_layout():
    """Against sums written anew in Python's whole numbers."""
    import hashlib

    numbers = hashlib.shake_256(b"lora-null").digest(8 * WORDS)
    weights = [int.from_bytes(numbers[i : i + 8], "little") | 1 for i in range(0, 8 * 40, 8)]
    tensors = [
        torch.randn(5, 7), torch.randn(9, 8).bfloat16().T, torch.arange(11), torch.tensor(2.5), torch.ones(3, dtype=bool),
        torch.randn(64)[1:].half(), torch.empty(0),
    ]  # fmt: skip
    for tensor in tensors:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        words = [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw) // 8 * 8, 8)]
        total = sum(weight * (word + (word >> 32)) for weight, word in zip(weights, words)) % 2**64
        digest = hashlib.sha256(f"x {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(total.to_bytes(8, "little") + raw[len(words) * 8 :])
        assert fingerprint([("x", tensor)]) == digest.hexdigest()[:16]


@pytest.mark.parametrize("closed", ["in_use", "clear_others"])
def test_an_equal_one_is_read_from_a_cache_that_is_closed(closed, tmp_path, fresh_cache, monkeypatch, capsys):
    """Another user's folder, where no lock can be made, or with a file that cannot be read: then it is computed anew."""
    found, report = start(cache=True)
    refuse = PermissionError(13, "Permission denied")
    act = getattr(store, closed)

    def refusing(folder, *rest):
        if folder == fresh_cache / report.key:
            raise refuse
        return act(folder, *rest)

    monkeypatch.setattr(store, closed, refusing)
    if closed == "clear_others":
        read = store.read_parts
        monkeypatch.setattr(
            store, "read_parts", lambda folder: refusing(folder) if folder.parent == fresh_cache else read(folder)
        )
    for folder in (tmp_path / "init", None):
        again, _ = start(folder, cache=True)
        said = capsys.readouterr().err
        assert f"initialization: not kept, {fresh_cache / report.key}: Permission denied" in said
        assert same(found, again) and ("initialization: reused" in said) == (closed == "in_use")
    assert len(load_initialization(tmp_path / "init", wrapped())[0].layers) == 14


def test_locks_of_killed_runs_are_removed(fresh_cache):
    _, report = start(cache=True)
    (fresh_cache / report.key / ".dead.used").touch()
    with store.in_use(fresh_cache / "other"):
        store.prune_cache(fresh_cache / "other")
        assert [path.parent.name for path in fresh_cache.rglob("*.used")] == ["other"]


def test_no_folder_in_use_is_pruned(tmp_path, fresh_cache, monkeypatch):
    """Nine runs at once, of which the first to end prunes: each still leaves its whole result."""
    monkeypatch.setattr(store, "KEPT", 2)
    left, write = [], store.write_part

    def others(*_):
        for i in range(4):
            (fresh_cache / f"other{i}").mkdir(parents=True, exist_ok=True)
        store.prune_cache(fresh_cache / "other0")
        left.append(sorted(path.name for path in fresh_cache.iterdir()))

    monkeypatch.setattr(store, "write_part", lambda folder, name, part: (write(folder, name, part), others()))
    _, report = start(tmp_path / "one", cache=True)
    assert all(report.key in names and len(names) <= 3 for names in left)  # 2 by age, which may be this one, and it
    read = store.read_parts
    monkeypatch.setattr(store, "read_parts", lambda folder: (read(folder), others())[0])
    start(tmp_path / "two", cache=True)  # reads, then copies
    monkeypatch.setattr(store, "read_parts", read)
    for name in ("one", "two"):
        assert len(load_initialization(tmp_path / name, wrapped())[0].layers) == 14
    others()
    assert report.key not in left[-1]  # in use no more
    assert not list((tmp_path / "one").glob(".*"))
