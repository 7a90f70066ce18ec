"""A weight, or memory of it, that another module computes with too is not adapted, under whatever name it is known."""

import re

import pytest
import torch
from peft import get_peft_model
from tiny import PROBE, random_batches, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_null import LoraNullConfig, UserError
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers

BATCHES = random_batches()


def linears(model):
    return [layer.mlp.down_proj for layer in model.model.layers]


def one_parameter(model):
    one, other = linears(model)
    other.weight = one.weight


def one_module(model):
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj


def views(model):
    one, other = linears(model)
    both = torch.cat([one.weight, other.weight])[: len(one.weight) + 8].detach()
    one.weight = nn.Parameter(both[:32])
    other.weight = nn.Parameter(both[8:40])


def transposed(model):
    up, down = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(up.weight.detach().T)


def embeddings(model):
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(nn.Linear(32, 101, bias=False), nn.ReLU(), nn.Linear(101, 32, bias=False))
    model.model.layers[1].mlp[0].weight = model.model.embed_tokens.weight


def a_buffer(model):
    one, other = linears(model)
    other.register_buffer("copy", one.weight.detach()[:5])


KINDS = [one_parameter, one_module, views, transposed, embeddings, a_buffer]


def logits(model):
    with torch.no_grad():
        return model.eval()(**PROBE).logits


def made(kind, variant, **config):
    model = tiny_model()
    kind(model)
    return get_peft_model(model, LoraNullConfig(r=4, variant=variant, **config))


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_is_refused_and_the_advice_leads_to_something_right(kind, variant):
    """As far as the messages ask, modules are left out; what is accepted then computes what the base does."""
    model = tiny_model()
    kind(model)
    before, out = logits(model), []
    for _ in range(4):
        peft_model = made(kind, variant, exclude_modules="|".join(map(re.escape, out)) or None)
        try:
            start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False))
        except UserError as told:
            name, others, advice = re.fullmatch(
                r"target_modules: (\S+) shares its weight with (.+), which would change with it; leave (both|it) out "
                r"\(exclude_modules\)",
                str(told),
            ).groups()
            out += [name, *(others.split(", ") if advice == "both" else [])]
            continue
        break
    assert out and adapted_layers(peft_model)
    assert (logits(peft_model) - before).abs().max() < 1e-3
    with peft_model.disable_adapter():
        assert (logits(peft_model) - before).abs().max() < 1e-3


def compiled(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.model.layers[1].compile(fullgraph=True)


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))


@pytest.mark.parametrize("wrap", [compiled, checkpointed])
def test_a_wrapped_layer_shares_nothing_with_itself(wrap):
    options = InitOptions(min_tokens=1, progress=False)
    plain = start_adapter(made(lambda model: None, "v2"), BATCHES, options)[0]
    model = tiny_model()
    peft_model = get_peft_model(model, LoraNullConfig(r=4))
    wrap(model)
    found = start_adapter(peft_model, BATCHES, options)[0]
    assert [line.name for line in found.layers] == [line.name for line in plain.layers]
    assert [line.leakage for line in found.layers] == pytest.approx([line.leakage for line in plain.layers])


def test_neighbors_in_one_block_of_memory_share_nothing():
    model = tiny_model()
    parameters = [layer.mlp.down_proj for layer in model.model.layers]
    block = torch.cat([module.weight.detach() for module in parameters])
    for module, rows in zip(parameters, block.split(32)):
        module.weight = nn.Parameter(rows)
    start_adapter(get_peft_model(model, LoraNullConfig(r=4)), BATCHES, InitOptions(min_tokens=1, progress=False))
