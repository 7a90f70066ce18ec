"""A decoder whose layers are not a chain is found in any dtype, on few batches, and then measured with hooks."""

import oracle
import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import random_batches
from torch import nn

from lora_null import LoraNullConfig
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.layerwise import DoesNotFit, walk_layers

GATED = dict(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
PADDED, WHOLE = random_batches(count=3, size=4), random_batches(count=3, size=4)
for whole in WHOLE:
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    whole["input_ids"].clamp_(min=4)


class Model(tf.LlamaForCausalLM):
    """A Llama whose layers get `change(model, i, hidden, mask)` of what they read."""

    def __init__(self, change, own_loop=False):
        torch.manual_seed(0)
        super().__init__(tf.LlamaConfig(**GATED))
        self.kept = {}
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
        for i, layer in enumerate(self.model.layers):

            def forward(hidden, *args, plain=layer.forward, i=i, box=None, **kwargs):
                hidden = change(self.kept if box is None else box, i, hidden, kwargs.get("attention_mask"))
                return plain(hidden, *args, **kwargs)

            layer.forward = forward
        if own_loop:
            self.model.forward = self._loop

    def _loop(self, input_ids, attention_mask, **_):
        hidden, box = self.model.embed_tokens(input_ids), {}
        positions = self.model.rotary_emb(hidden, position_ids=torch.arange(input_ids.shape[1])[None])
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=positions, box=box)
        return tf.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.model.norm(hidden))


def first_input(strength):
    def change(kept, i, hidden, mask):
        if i == 0:
            kept["x0"] = hidden
        x0 = kept.get("x0", hidden)
        return hidden + strength * x0 if x0.shape == hidden.shape else hidden

    return change


def sum_so_far(kept, i, hidden, mask):
    kept["sum"] = hidden.mean() if i == 0 else kept["sum"] + hidden.mean()
    return hidden + 0.2 * kept["sum"]


def width_of_the_last_first_layer(kept, i, hidden, mask):
    if i == 0:
        kept["length"] = hidden.shape[1]
    return hidden * (1 + 0.01 * kept["length"])


def padding_seen_by_the_first_layer(kept, i, hidden, mask):
    if i == 0:
        kept["mask"] = mask
    return hidden if kept["mask"] is None else hidden * 1.05


def grams(parts):
    return {name: stats.gram for _, part in parts for stats in part.inputs for name in stats.modules}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change, own_loop, batches",
    [
        (first_input(0.3), False, PADDED),
        (first_input(0.3), True, PADDED),
        (first_input(0.3), False, PADDED[:1]),
        (first_input(0.02), False, WHOLE),
        (first_input(0.02), True, WHOLE),
        (sum_so_far, False, WHOLE),
        (sum_so_far, True, PADDED),
        (width_of_the_last_first_layer, False, WHOLE),
        (padding_seen_by_the_first_layer, False, PADDED),
    ],
)
def test_what_one_layer_leaves_for_another_is_noticed(change, own_loop, batches, dtype, capsys):
    model = Model(change, own_loop).to(dtype).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    modules = {name: model.get_submodule(name) for name in names}
    with pytest.raises(DoesNotFit):
        next(walk_layers(model, modules, batches, progress=False))
    X = oracle.capture_inputs(model, names, batches)
    peft_model = get_peft_model(model, LoraNullConfig(r=4))
    report, _ = start_adapter(peft_model, batches, InitOptions(min_tokens=1, progress=False))
    assert "not layer by layer" in capsys.readouterr().err
    for line in report.layers:
        A = adapted_layers(peft_model)[line.name].lora_A["default"].weight.detach().double().numpy()
        assert line.leakage == pytest.approx(oracle.leak(A, X[line.name]), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batches", [PADDED, WHOLE, PADDED[:1], [{k: v[:1, :3] for k, v in WHOLE[0].items()}]])
def test_a_chain_is_walked_in_any_dtype(batches, dtype):
    model = Model(lambda kept, i, hidden, mask: hidden).to(dtype).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    modules = {name: model.get_submodule(name) for name in names}
    X = oracle.capture_inputs(model, names, batches)
    for name, gram in grams(walk_layers(model, modules, batches, progress=False)).items():
        C = torch.from_numpy(X[name] @ X[name].T)
        assert torch.linalg.matrix_norm(gram - C) <= 1e-6 * torch.linalg.matrix_norm(C)


def test_a_computation_that_never_repeats_itself_is_walked_within_its_own_noise():
    def noisy(kept, i, hidden, mask):
        return hidden * (1 + 1e-3 * torch.rand(()))

    model = Model(noisy).eval()
    torch.manual_seed(1)
    modules = {"model.layers.1.mlp.up_proj": model.get_submodule("model.layers.1.mlp.up_proj")}
    assert len(grams(walk_layers(model, modules, WHOLE, progress=False))) == 1


def test_layers_that_cannot_run_alone_are_measured_with_hooks():
    def needs_the_other(kept, i, hidden, mask):
        assert i == 0 or kept.pop("turn") == i - 1, "called out of turn"
        kept["turn"] = i
        return hidden

    model = Model(needs_the_other).eval()
    modules = {"model.layers.1.mlp.up_proj": model.get_submodule("model.layers.1.mlp.up_proj")}
    with pytest.raises(DoesNotFit, match="cannot be run alone"):
        next(walk_layers(model, modules, WHOLE, progress=False))
