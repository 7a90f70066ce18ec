"""The walk through the decoder layers gives what plain forward passes with hooks give, on every shape of model."""

import contextlib
import weakref

import oracle
import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import random_batches, tiny_model
from torch import nn

from lora_null import LoraNullConfig, UserError, layerwise
from lora_null.calibration import measure_inputs
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.layerwise import DoesNotFit, walk_layers

BATCHES = random_batches(count=3, size=4)
SMALL = dict(vocab_size=101, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
GATED = dict(SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPES = {
    "llama": tf.LlamaConfig(**GATED),
    "mistral": tf.MistralConfig(**GATED, sliding_window=4),
    "qwen2": tf.Qwen2Config(**GATED),
    "qwen3": tf.Qwen3Config(**GATED, head_dim=8),
    "gemma": tf.GemmaConfig(**GATED, head_dim=8),
    "gemma2": tf.Gemma2Config(**GATED, head_dim=8, sliding_window=8),
    "gemma3": tf.Gemma3TextConfig(**{**GATED, "num_hidden_layers": 7}, head_dim=8, sliding_window=4),
    "phi": tf.PhiConfig(**GATED),
    "phi3": tf.Phi3Config(**GATED),
    "gpt_neox": tf.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2": tf.GPT2Config(vocab_size=101, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "opt": tf.OPTConfig(
        vocab_size=101, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
    ),
}  # fmt: skip


def model_of(shape):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float64).eval()


def targets(model):
    head = model.get_output_embeddings()
    kinds = (nn.Linear, tf.pytorch_utils.Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module is not head}


@pytest.mark.parametrize("shape", SHAPES)
def test_grams_equal_the_hook_form(shape):
    model = model_of(shape)
    modules = targets(model)
    hooks = measure_inputs(model, modules, BATCHES, progress=False)
    walked = dict(walk_layers(model, modules, BATCHES, progress=False))
    assert len(walked) == model.config.num_hidden_layers
    inputs = [stats for part in walked.values() for stats in part.inputs]
    assert [stats.modules for stats in inputs] == [stats.modules for stats in hooks.inputs]
    for one, other in zip(inputs, hooks.inputs):
        assert torch.allclose(one.gram, other.gram, rtol=1e-10, atol=1e-12 * float(other.gram.trace()))
        assert torch.allclose(one.sketch, other.sketch, rtol=1e-9, atol=1e-10)
        assert one.tokens == other.tokens
    energies = {name: energy for part in walked.values() for name, energy in part.output_energy.items()}
    assert energies == pytest.approx(hooks.output_energy)
    assert "forward" not in vars(next(iter(model.modules())))


def test_grams_equal_the_oracle_without_padding():
    model = tiny_model().double().eval()
    modules = targets(model)
    X = oracle.capture_inputs(model, modules, BATCHES)
    for part in dict(walk_layers(model, modules, BATCHES, progress=False)).values():
        for stats in part.inputs:
            for name in stats.modules:
                expected = X[name] @ X[name].T
                assert torch.allclose(stats.gram, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grams_of_low_precision_inputs_are_exact_to_their_own_rounding(dtype):
    """Against the same numbers multiplied in float64: relative to Σ|x_i x_j|, an entry errs by less than 2⁻²¹."""
    from lora_null.gram import Gram

    scales = torch.logspace(0, -5, 700)
    rows = (torch.randn(1500, 700, generator=torch.Generator().manual_seed(0)) * scales).to(dtype)
    gram = Gram(700, rows.device, tokens=len(rows))
    for chunk in rows.split(400):
        gram.add(chunk)
    exact, size = rows.double().T @ rows.double(), rows.double().abs().T @ rows.double().abs()
    assert ((gram.result() - exact).abs() / size).max() < 2**-21
    assert torch.equal(gram.result(), gram.result().T)


class Mixing(tf.LlamaForCausalLM):
    """A decoder that does something of its own between its layers."""

    def __init__(self, config):
        super().__init__(config)
        plain = self.model.layers[1].forward
        self.model.layers[1].forward = lambda hidden, **kwargs: plain(hidden * 1.5, **kwargs)
        self.model.forward = self._forward

    def _forward(self, input_ids, attention_mask, **kwargs):
        hidden = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        for layer in self.model.layers:
            position_embeddings = self.model.rotary_emb(hidden, position_ids=positions)
            hidden = layer(hidden, attention_mask=None, position_embeddings=position_embeddings) * 1.25
        return tf.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=hidden)


def test_layers_on_several_devices_are_not_walked():
    model = tf.AutoModelForCausalLM.from_config(SHAPES["llama"])
    model.model.layers[1].to("meta")  # as device_map="auto" spreads them over GPUs
    with pytest.raises(DoesNotFit, match="several devices"):
        next(walk_layers(model, targets(model), BATCHES, progress=False))


def test_a_model_that_is_no_chain_falls_back_to_hooks_and_says_so(capsys):
    torch.manual_seed(0)
    model = Mixing(SHAPES["llama"]).double().eval()
    with pytest.raises(DoesNotFit, match="between its layers"):
        next(walk_layers(model, targets(model), BATCHES, progress=False))
    X = oracle.capture_inputs(model.model, [name.removeprefix("model.") for name in targets(model)], BATCHES)
    peft_model = get_peft_model(model, LoraNullConfig(r=4), autocast_adapter_dtype=False)
    report, _ = start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False))
    assert "not layer by layer, its decoder does more between its layers" in capsys.readouterr().err
    for line in report.layers:
        A = adapted_layers(peft_model)[line.name].lora_A["default"].weight.detach().numpy()
        assert oracle.leak(A, X[line.name.removeprefix("model.")]) == pytest.approx(line.leakage, rel=1e-6)
    with pytest.raises(UserError, match="cannot be walked layer by layer"):
        start_adapter(
            get_peft_model(Mixing(SHAPES["llama"]), LoraNullConfig(r=4)),
            BATCHES,
            InitOptions(min_tokens=1, form="layers"),
        )


def test_a_model_on_the_cpu_is_compared_without_flash_attention():
    """It is loaded there for a GPU that has flash-attn, whose kernels do not run here."""
    model, batches = tiny_model(), random_batches(count=2)
    model.config._attn_implementation = "flash_attention_2"
    layerwise._check_chain(model, layerwise.decoder_layers(model, targets(model)), batches)
    assert model.config._attn_implementation == "flash_attention_2"


def test_a_few_rows_at_a_time_measure_the_same(monkeypatch):
    model, found = tiny_model().double().eval(), []
    for tokens in (1024, 30):
        monkeypatch.setattr("lora_null.batches.CPU_TOKENS", tokens)
        parts = [part for _, part in walk_layers(model, targets(model), BATCHES, progress=False)]
        found.append([stats for part in parts for stats in part.inputs])
    for one, other in zip(*found, strict=True):
        assert one.tokens == other.tokens
        assert torch.allclose(one.gram, other.gram, rtol=1e-10, atol=1e-10)
        assert torch.allclose(one.sketch, other.sketch, rtol=1e-10, atol=1e-10)


def test_hidden_states_wait_in_a_file_where_memory_is_short(monkeypatch):
    model = tiny_model().double().eval()
    expected = dict(walk_layers(model, targets(model), BATCHES, progress=False))
    monkeypatch.setattr("lora_null.layerwise._free_bytes", lambda device: 0)
    walked = dict(walk_layers(model, targets(model), BATCHES, progress=False))
    for name, part in walked.items():
        for one, other in zip(part.inputs, expected[name].inputs):
            assert torch.equal(one.gram, other.gram)


def test_solving_side_by_side_gives_the_same_bits_and_leaves_torchs_threads_alone():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
            start_adapter(model, BATCHES, InitOptions(min_tokens=1, progress=False))
            assert torch.get_num_threads() == threads
            found.append([layer.lora_A["default"].weight for layer in adapted_layers(model).values()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_out_of_memory_is_solved_on_the_cpu_and_said(monkeypatch, capsys):
    from lora_null import solver as solving

    solve, failed = solving.bottom_eigenspace, []

    def scarce(gram, r, **options):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no memory")
        return solve(gram, r, **options)

    monkeypatch.setattr(solving, "bottom_eigenspace", scarce)
    peft_model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
    report, _ = start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False))
    assert "down_proj is solved on the CPU" in capsys.readouterr().err
    assert len(report.layers) == 14


class Routed(nn.Module):
    """An expert layer: only some tokens reach each expert, the last none."""

    def __init__(self, width):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        half = len(flat) // 2
        return torch.cat([self.experts[0](flat[:half]), self.experts[1](flat[half:])]).view_as(hidden)


def test_experts_are_named_not_measured_wrong():
    model = tiny_model().eval()
    for layer in model.model.layers:
        layer.mlp = Routed(32)
    with pytest.raises(UserError, match=r"layers.0.mlp.experts.0 reads 24 rows of a batch, not its tokens"):
        list(walk_layers(model, targets(model), BATCHES[:1], progress=False))
    only_last = {name: module for name, module in targets(model).items() if "experts.2" in name}
    with pytest.raises(UserError, match=r"no token reaches model.layers.0.mlp.experts.2"):
        list(walk_layers(model, only_last, BATCHES, progress=False))


@pytest.mark.parametrize("tokens", [1024, 30])  # a batch whole, and two rows at a time
def test_nan_is_named_by_module_batch_and_sample(monkeypatch, tokens):
    monkeypatch.setattr("lora_null.batches.CPU_TOKENS", tokens)
    model = tiny_model().eval()
    model.model.embed_tokens.weight.data[77] = float("nan")
    clean = [
        {key: torch.where(value == 77, 5, value) if key == "input_ids" else value for key, value in b.items()}
        for b in BATCHES
    ]
    clean[1]["input_ids"][2, 0] = 77
    with pytest.raises(
        UserError, match=r"sample 3 of batch 2 gives NaN or infinite inputs at model.layers.0.self_attn.q_proj"
    ):
        list(walk_layers(model, targets(model), clean, progress=False))


def test_the_first_hidden_states_go_when_a_layer_has_made_others(monkeypatch):
    first, kept_by = [], layerwise._HiddenStates

    def watched(hidden, *rest):
        first.extend(weakref.ref(tensor) for tensor in hidden)
        return kept_by(hidden, *rest)

    monkeypatch.setattr(layerwise, "_HiddenStates", watched)
    model = tiny_model()
    with contextlib.closing(walk_layers(model, targets(model), BATCHES, progress=False)) as walk:
        next(walk), next(walk)
        assert first and not any(tensor() is not None for tensor in first)
