"""A tiny random Llama, its character-level tokenizer, and folders of both: models that tests make themselves."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_null.initialize import finish_initialization
from lora_null.layer import adapted_layers
from lora_null.start import load_start, rule_of
from lora_null.targets import check_layers

LETTERS = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]  # printable ASCII; ByteLevel's space and newline
MERGE = (":", "Ġ")  # tokens that join prompt and answer: "Q:" + " x" starts with "Q", ":Ġ"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS, "".join(MERGE)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [MERGE], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_model(seed: int = 0, vocab_size: int = 101, **shape) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    defaults = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **shape}))


def save_tiny(folder: Path, seed: int = 0, **shape) -> Path:
    """Write a model folder that loads like any checkpoint."""
    tiny_model(seed, **shape).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_batches(count: int = 6, size: int = 8, length: int = 12, seed: int = 0, vocab_size: int = 101):
    """Batches of random tokens with right padding of varying length."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, vocab_size, (size, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (size, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


PROBE = random_batches(count=1)[0]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """What the model says at every real token of the probe."""
    return model.eval()(**PROBE).logits[PROBE["attention_mask"].bool()]


def losses_over(model: torch.nn.Module, batches, *, steps: int) -> list[float]:
    """Train what trains with Adam; return the loss before each step."""
    model.train()
    optimizer, found = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3), []
    for step in range(steps):
        batch = batches[step % len(batches)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def load_initialization(folder: Path, peft_model):
    """Start the adapter of a fresh model from a saved initialization, as trainers do; return report and calibration."""
    layers = adapted_layers(peft_model, "default")
    check_layers(peft_model, layers)
    rule = rule_of(peft_model.peft_config["default"]).label
    start = load_start(folder, peft_model, layers, rule=rule)
    finish_initialization(peft_model, "default")
    return start.report, start.calibration
