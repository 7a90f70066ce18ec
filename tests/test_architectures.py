"""Each family of architectures is measured right, layer by layer or with hooks, or refused by name before any work."""

import numpy as np
import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import random_batches
from torch import nn

from lora_null import LoraNullConfig, UserError
from lora_null.calibration import measure_inputs
from lora_null.checkpoint_reader import adapters_in_memory
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.layerwise import DoesNotFit, walk_layers
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.models.bases import Base, open_base

BATCHES = random_batches(count=3, size=4, length=10)
SMALL = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GATED = dict(SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
NARROW = dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = dict(GATED, num_experts_per_tok=2, moe_intermediate_size=24)

# How each is walked: layer by layer, or with hooks over the whole model.
LAYERS = {
    "llama": tf.LlamaConfig(**GATED),
    "mistral": tf.MistralConfig(**GATED, sliding_window=4),
    "qwen2": tf.Qwen2Config(**GATED),
    "qwen3": tf.Qwen3Config(**GATED, head_dim=8),
    "gemma2": tf.Gemma2Config(**GATED, head_dim=8, sliding_window=8),
    "gemma3": tf.Gemma3TextConfig(**{**GATED, "num_hidden_layers": 7}, head_dim=8, sliding_window=4),
    "phi": tf.PhiConfig(**GATED),
    "phi3": tf.Phi3Config(**GATED),
    "olmo2": tf.Olmo2Config(**GATED),
    "cohere": tf.CohereConfig(**GATED),
    "granite": tf.GraniteConfig(**GATED),
    "stablelm": tf.StableLmConfig(**GATED),
    "starcoder2": tf.Starcoder2Config(**GATED),
    "gpt_neox": tf.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt_neo": tf.GPTNeoConfig(
        vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=4, max_position_embeddings=64,
    ),
    "gptj": tf.GPTJConfig(**NARROW, rotary_dim=4),
    "gpt2": tf.GPT2Config(**NARROW),
    "openai-gpt": tf.OpenAIGPTConfig(**NARROW),
    "codegen": tf.CodeGenConfig(**NARROW, rotary_dim=4),
    "bloom": tf.BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4),
    "falcon": tf.FalconConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mpt": tf.MptConfig(vocab_size=101, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "opt": tf.OPTConfig(
        vocab_size=101, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
    ),
    "mixtral": tf.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": tf.Qwen3MoeConfig(**EXPERTS, num_experts=4, head_dim=8),
    "bert": tf.BertConfig(**SMALL, intermediate_size=48, is_decoder=True),
    "roberta": tf.RobertaConfig(**{**SMALL, "max_position_embeddings": 70}, intermediate_size=48, is_decoder=True),
    "mamba": tf.MambaConfig(vocab_size=101, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4),
}  # fmt: skip
HOOKS = {
    "albert": tf.AlbertConfig(
        vocab_size=101, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    ),
    "xlnet": tf.XLNetConfig(vocab_size=101, d_model=32, n_layer=2, n_head=4, d_inner=48),
}  # fmt: skip
GRANITE = tf.GraniteMoeHybridConfig(
    vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    layer_types=["mamba"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, intermediate_size=48,
    shared_intermediate_size=48, num_local_experts=0,
)  # fmt: skip
NOT_BY_POSITIONS = {  # whose layers or masks do not see by the positions where a text begins
    "lfm2": tf.Lfm2Config(**GATED, layer_types=["conv", "full_attention"], block_multiple_of=8, conv_L_cache=3),
    "jamba": tf.JambaConfig(
        **GATED, attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False, mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "xglm": tf.XGLMConfig(
        vocab_size=101, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64, pad_token_id=0,
    ),
    "biogpt": tf.BioGptConfig(**{**SMALL, "max_position_embeddings": 64}, intermediate_size=48),
}  # fmt: skip
MASKED = ("albert",)  # has no causal form
FLOAT32 = {"xlnet", "gptj", "gpt_neo", "codegen"}  # their attention, whatever the model's dtype
EAGER = {"mixtral", "qwen3_moe"}  # whose faster experts know no float64
UNCALLED = {"mamba": "dt_proj", "jamba": "dt_proj"}  # multiplied with, not called


def model_of(name):
    torch.manual_seed(0)
    kind = tf.AutoModelForMaskedLM if name in MASKED else tf.AutoModelForCausalLM
    eager = {"experts_implementation": "eager"} if name in EAGER else {}
    dtype = torch.float32 if name in ("xlnet", "xglm", "jamba") else torch.float64  # which make float32 of their own
    model = kind.from_config((LAYERS | HOOKS | NOT_BY_POSITIONS)[name], dtype=dtype, **eager).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that matter
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def targets(model):
    """Every linear that reads one row a token, apart from what belongs to the head."""
    spine = getattr(model, model.base_model_prefix)
    kinds = (nn.Linear, tf.pytorch_utils.Conv1D)
    inside = {id(module) for module in spine.modules()} - {id(model.get_output_embeddings())}
    found = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and id(m) in inside}
    return {name: module for name, module in found.items() if not name.endswith(("pooler", "pooler.dense"))}


def inputs_of(model, modules, *, length_first):
    """{name: X (d_in, N)}, one plain hook each, rows picked token by token."""
    columns = {name: [] for name in modules}
    for batch in BATCHES:
        kept = [(i, j) for i, row in enumerate(batch["attention_mask"].tolist()) for j, one in enumerate(row) if one]

        def see(name, x, kept=kept, batch=batch):
            size, length = batch["input_ids"].shape
            for i, j in kept:
                row = x[j, i] if length_first and x.dim() == 3 else x.reshape(size, length, -1)[i, j]
                columns[name].append(row.double().numpy())

        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            for name, module in modules.items()
        ]
        with torch.no_grad():
            getattr(model, model.base_model_prefix)(**batch)
        for handle in handles:
            handle.remove()
    return {name: np.stack(rows, axis=1) for name, rows in columns.items()}


def check(parts, X, limit):
    measured = {name: stats for part in parts for stats in part.inputs for name in stats.modules}
    assert set(measured) == set(X)
    for name, stats in measured.items():
        C = X[name] @ X[name].T
        assert np.linalg.norm(stats.gram.numpy() - C) <= limit * np.linalg.norm(C), name
        assert stats.tokens == X[name].shape[1]


@pytest.mark.parametrize("name", [*LAYERS, *HOOKS])
def test_grams_equal_the_oracle_in_both_forms(name):
    model = model_of(name)
    modules = {n: module for n, module in targets(model).items() if not n.endswith(UNCALLED.get(name, "-"))}
    assert len(modules) >= 4
    limit = 1e-6 if name in FLOAT32 else 1e-11
    X = inputs_of(model, modules, length_first=name == "xlnet")
    check([measure_inputs(model, modules, BATCHES, progress=False)], X, limit)
    if name in HOOKS:
        with pytest.raises(DoesNotFit):
            next(walk_layers(model, modules, BATCHES, progress=False))
    else:
        check([part for _, part in walk_layers(model, modules, BATCHES, progress=False)], X, limit)


def started(model, **config):
    peft_model = get_peft_model(model, LoraNullConfig(**{"r": 2, **config}))
    return start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False))


@pytest.mark.parametrize("name", ["falcon", "gpt2"])
def test_linears_of_other_classes_that_compute_the_same_get_adapters(name):
    model = model_of(name)
    before = model(**BATCHES[0]).logits
    report, _ = started(model, variant="v1", target_modules="all-linear")
    assert len(report.layers) == 8
    assert torch.dist(model(**BATCHES[0]).logits, before) < 1e-4 * torch.linalg.vector_norm(before)


REFUSED = {
    "model: t5 is an encoder and a decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ),
    "model: bart is an encoder and a decoder": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=101, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        )
    ),
    "model: vit reads pixel_values": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=16)
    ),
    "layers.0.feed_forward.router is a Llama4Router": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **GATED, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, interleave_moe_layer_step=1
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_sequence_of_tokens_is_named_before_work(message, monkeypatch):
    monkeypatch.setattr("lora_null.fingerprint.fingerprint", None)  # nothing has been read by then
    with pytest.raises(UserError, match=message) as told:
        started(REFUSED[message]())
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "name, targets, message",
    [
        ("bert", ["dense"], "pooler.dense reads 4 rows of a batch, not its tokens"),
        (
            "mamba",
            ["dt_proj", "in_proj"],
            "MambaMixer's fused kernel reads the weight of backbone.layers.0.mixer.dt_proj",
        ),
        (
            "granite",
            ["out_proj"],
            "GraniteMoeHybridMambaLayer's fused kernel reads the weight of model.layers.0.mamba.out",
        ),
    ],
)
def test_a_linear_that_reads_no_tokens_is_named(name, targets, message):
    config = tf.BertConfig(**SMALL, intermediate_size=48) if name == "bert" else LAYERS.get(name)
    model = {
        "bert": lambda: tf.BertForSequenceClassification(config),
        "mamba": lambda: tf.MambaForCausalLM(config),
        "granite": lambda: tf.GraniteMoeHybridForCausalLM(GRANITE),
    }[name]()
    with pytest.raises(UserError, match=message):
        started(model, target_modules=targets)


def test_xlnet_with_batches_as_long_as_they_are_wide():
    model = model_of("xlnet")
    modules = targets(model)
    square = random_batches(count=1, size=10, length=10)
    rows = [{key: value[i : i + 3] for key, value in square[0].items()} for i in range(0, 10, 3)]
    one, other = (measure_inputs(model, modules, batches, progress=False) for batches in (square, rows))
    for a, b in zip(one.inputs, other.inputs, strict=True):
        assert torch.allclose(a.gram, b.gram, rtol=1e-5, atol=1e-6 * float(b.gram.trace()))


@pytest.mark.parametrize("form", ["layers", "hooks"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "openai-gpt", "opt", "bert", "roberta", "gptj", "llama"])
def test_padding_on_the_left_moves_no_position(name, form):
    model = model_of(name)
    modules = targets(model)
    ids = torch.randint(4, 101, (3, 10), generator=torch.Generator().manual_seed(1))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fill = {"input_ids": model.config.pad_token_id or 0, "attention_mask": 0}
    padded = {key: nn.functional.pad(value, (4, 0), value=fill[key]) for key, value in whole.items()}
    found = []
    for batch in (whole, padded):
        walked = walk_layers(model, modules, [batch], progress=False) if form == "layers" else ()
        parts = [part for _, part in walked] or [measure_inputs(model, modules, [batch], progress=False)]
        found.append({stats.modules[0]: stats.gram for part in parts for stats in part.inputs})
    for key, gram in found[0].items():
        assert torch.allclose(found[1][key], gram, rtol=1e-5, atol=1e-6 * float(gram.trace())), key


@pytest.mark.parametrize("form", ["layers", "hooks"])
@pytest.mark.parametrize("padding", [[], [0, 1], [7, 8, 18]], ids=["whole", "before", "between and behind"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neo", "bert", "llama", "gemma3", *NOT_BY_POSITIONS])
def test_texts_packed_into_one_row_do_not_read_each_other(name, padding, form):
    model = model_of(name)
    modules = {key: x for key, x in targets(model).items() if not key.endswith(UNCALLED.get(name, "-"))}
    texts = [part["input_ids"][:, :length] for part, length in zip(BATCHES, (7, 3, 6))]
    mask = torch.ones(4, 16 + len(padding), dtype=torch.long)
    mask[:, padding] = 0
    packed = {"input_ids": mask * 5, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    packed["input_ids"][mask.bool()] = torch.cat(texts, 1).flatten()
    packed["position_ids"][mask.bool()] = torch.cat([torch.arange(ids.shape[1]) for ids in texts]).repeat(4)
    found = []
    for batches in ([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts], [packed]):
        walked = walk_layers(model, modules, batches, progress=False) if form == "layers" else ()
        parts = [part for _, part in walked] or [measure_inputs(model, modules, batches, progress=False)]
        found.append({stats.modules[0]: (stats.gram, stats.tokens) for part in parts for stats in part.inputs})
    for key, (gram, tokens) in found[0].items():
        assert torch.allclose(found[1][key][0], gram, rtol=1e-5, atol=1e-6 * float(gram.trace())), key
        assert tokens == found[1][key][1] == 64


def test_positions_that_a_batch_gives_are_read():
    model = model_of("gpt2")
    ids = torch.arange(20, 32)[None]
    packed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(12)[None] % 4}
    expected = []
    model.transformer.h[0].attn.c_attn.register_forward_pre_hook(lambda _, args: expected.append(args[0][0]))
    with torch.no_grad():
        model(**packed)
    names = ["transformer.h.0.attn.c_attn"]
    found = measure_inputs(model, {n: model.get_submodule(n) for n in names}, [packed], progress=False).inputs[0]
    assert torch.allclose(found.gram, expected[0].T @ expected[0])
    with pytest.raises(UserError, match="batch 1 has position_ids, which BloomForCausalLM does not take"):
        measure_inputs(model_of("bloom"), {}, [packed])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["apertus", "gpt2", "gemma3"])
def test_weights_left_in_their_files_give_the_same_bits(name, dtype, tmp_path):
    """Persistent buffers too: Apertus keeps constants of its activation there, in values that are not the defaults."""
    config = {**LAYERS, "apertus": tf.ApertusConfig(**GATED, hidden_act="xielu", rope_parameters=ROPE)}[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for key, buffer in model.named_buffers():
        if key in model.state_dict():
            buffer.copy_(torch.rand_like(buffer) * 2)
    model.save_pretrained(tmp_path)
    whole = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)), LoraNullConfig(r=2)
    )
    expected, _ = start_adapter(whole, BATCHES, InitOptions(min_tokens=1, progress=False))
    section = ModelSection(name_or_path=str(tmp_path), dtype=dtype)
    base, weights = open_base(Base(section))
    with adapters_in_memory():
        empty = get_peft_model(base, LoraNullConfig(r=2))
    options = InitOptions(min_tokens=1, progress=False, weights=weights, device=torch.device("cpu"))
    report, _ = start_adapter(empty, BATCHES, options)
    assert report.base == expected.base
    assert [line.leakage for line in report.layers] == [line.leakage for line in expected.layers]
    for one, other in zip(adapted_layers(whole).values(), adapted_layers(empty).values(), strict=True):
        assert torch.equal(one.lora_A["default"].weight, other.lora_A["default"].weight)
