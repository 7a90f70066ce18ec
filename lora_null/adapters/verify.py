"""Whether an export computes what the run's own result computes: logits on real text, next to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_null.drift import token_kl
from lora_null.utils.distributed import device_of

TOKENS = 64  # of a text, at most


@dataclass
class Difference:
    """Two models' logits on the same text.

    Attributes:
        tokens: positions compared.
        largest: max |Δ logit|.
        relative: ‖Δ logits‖ / ‖logits‖.
        of_change: ‖Δ logits‖ / ‖logits − the base's logits‖, the error as a part of what was trained.
        kl: mean KL(reference ‖ export) in nats per token.
        same_token: share of positions with the same most likely next token.
    """

    tokens: int
    largest: float
    relative: float
    of_change: float
    kl: float
    same_token: float

    def __str__(self) -> str:
        return (
            f"max |Δ logit| {self.largest:.2g}, relative {self.relative:.2g} ({self.of_change:.2g} of what training "
            f"changed), KL {self.kl:.2g} nats per token, same next token {100 * self.same_token:.1f}%, on {self.tokens} "
            "tokens"
        )


@torch.no_grad()
def logits_of(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the logits of each tokenized text, (tokens, vocabulary) in float32 on the CPU."""
    model.eval()
    device = device_of(model)
    ids = (torch.tensor([list(text[:TOKENS])], device=device) for text in texts)
    return [model(input_ids=row).logits[0].float().cpu() for row in ids]


def compare(
    reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor], base: Sequence[torch.Tensor]
) -> Difference:
    """Compare an export's logits with the reference's.

    Args:
        reference, found, base: of the run's result, its export and the untouched base; (tokens, vocabulary) each text.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    largest, kl, same, tokens = 0.0, 0.0, 0, 0
    for expected, got, untouched in zip(reference, found, base, strict=True):
        error = _difference(expected, got)
        finite = expected.double()[expected.isfinite()]
        totals += torch.stack([error.norm(), finite.norm(), _difference(untouched, expected).norm()]) ** 2
        largest = max(largest, float(error.abs().max()))
        kl += float(token_kl(expected.double().log_softmax(-1), got.double().log_softmax(-1)).sum())
        same += int((expected.argmax(-1) == got.argmax(-1)).sum())
        tokens += len(expected)
    error, size, change = totals.sqrt().tolist()
    of_change = error / change if change else (0.0 if error == 0 else float("inf"))
    return Difference(tokens, largest, error / size, of_change, kl / tokens, same / tokens)


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return b - a in float64; 0 for a token that both rule out, with a logit of -inf."""
    return (b.double() - a.double()).masked_fill(a == b, 0)
