"""C = X Xᵀ at full speed without losing its small directions: float32 products of short chunks, summed in float64.

The eigenvalues of C are squares, so a float32 sum cannot see directions below 3e-4 of the largest. What rounds here is
only the product of one chunk of tokens: entry (i, j) errs by at most a few 2⁻²⁴ of Σ|x_i x_j| over that chunk, which
is small where either channel is small, and the errors of the chunks average out. Products of bfloat16 numbers are exact
in float32, so only their sums are rounded; tensor cores truncate sums, which `gram_kernel` avoids. Such errors
would fill an exact null space, which C has with few tokens, few distinct tokens (the first layer) or texts that repeat.
So everything is float64 until C has no direction that they could fill; that test (`_is_resolved`) costs as much as d
tokens. Later chunks err by their own size: on a CPU those that are much louder than C was then are float64 too. An
accelerator would have to be waited for: there later tokens are taken to be about as loud as those before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import first_line
from lora_null.utils.model_state import full_precision

logger = get_logger(__name__)

CHUNK_TOKENS = 1024
# Tokens per dimension before it is asked whether float32 will do, and again after twice as many. Measured on SmolLM2's
# inputs, 32 directions: of 20 inputs 19 are resolved at 2, the first layer's, of few distinct tokens, at 4.
EXACT_BELOW = 2
ROUNDING = 2**-24
FAINT = 1e-30  # a channel's mean square below which float32 products round more, and at last to zero
# How many times a channel's energy when C was resolved a chunk may hold in float32. Measured at width 576, SmolLM2's
# chunks hold 0.6 (median) to 3.5 times it. With singular values over three decades, 512 wide, chunks of 4 times it catch
# 1.01 times the least energy, those of 24 times it 1.3 times.
LOUD = 4
BLOCK_WIDTH = {"cpu": 192, "accelerator": 1024}  # narrower blocks multiply too slowly
CHUNKS_TOGETHER = 4  # on an accelerator: one alone takes longer to launch than to multiply


class Gram:
    """Adds up X Xᵀ from chunks of rows; only the blocks on and below the diagonal are computed.

    Args:
        d: width of the rows.
        device: where they are.
        tokens: N, how many rows there will be in all.
    """

    def __init__(self, d: int, device: torch.device, tokens: int) -> None:
        self.tokens = tokens
        self.exact, self.seen, self.next_test = True, 0, EXACT_BELOW * d
        self.total = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.on_cpu = device.type == "cpu"
        self.kernel = kernel(device) if device.type == "cuda" else None
        self.together = CHUNK_TOKENS * (1 if self.on_cpu else CHUNKS_TOGETHER)
        count = max(1, min(8, d // BLOCK_WIDTH["cpu" if self.on_cpu else "accelerator"]))
        edges = [round(d * i / count) for i in range(count + 1)]
        self.blocks = [slice(a, b) for a, b in pairwise(edges)]

    def add(self, rows: torch.Tensor) -> None:
        """Add Xᵀ as rows, (tokens, d) in any floating dtype."""
        for chunk in rows.split(self.together):
            if self.exact and self.seen >= self.next_test and self.tokens - self.seen > len(self.total):
                self.exact, self.next_test = not self._is_resolved(), 2 * self.seen
                self.loud = LOUD * self.total.diagonal()
            self.seen += len(chunk)
            chunk = self._multipliable(chunk)
            if self.kernel is not None and chunk.element_size() == 2:
                self.kernel(self.total, chunk)
                continue
            with full_precision(chunk.device):
                for block in self.blocks:
                    part = self.total[block, : block.stop]
                    part += _product(chunk[:, block], chunk[:, : block.stop])

    def _is_resolved(self) -> bool:
        """Return whether C is so far from singular, and from what float32 cannot hold, that float32 products can be added to it.

        Their error is a matrix of about 2⁻²⁴ √(C_ii C_jj), of norm √d 2⁻²⁴ where every channel is scaled to 1. Measured
        on SmolLM2 (`EXACT_BELOW`): with a smallest eigenvalue of twice that norm, on that scale, float32 catches 1.0001
        times the energy.
        """
        shifted = self.total.clone()
        shifted.diagonal().mul_(1 - len(shifted) ** 0.5 * ROUNDING)
        faint = self.total.diagonal().min() < FAINT * self.seen
        return not (faint | (torch.linalg.cholesky_ex(shifted).info != 0))

    def result(self) -> torch.Tensor:
        """Return C, (d, d) float64, exactly symmetric."""
        for block in self.blocks:
            corner = self.total[block, block]
            corner.copy_((corner + corner.T) / 2 if self.on_cpu else corner.tril() + corner.tril(-1).T)
            self.total[: block.start, block] = self.total[block, : block.start].T
        return self.total

    def _multipliable(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows in the dtype to multiply in; 16-bit numbers stay what they are where there is a kernel for them."""
        if self.exact:
            return rows.double()
        if self.kernel is not None and rows.element_size() == 2:
            return rows
        if len(rows) > CHUNK_TOKENS:
            rows = nn.functional.pad(rows, (0, 0, 0, -len(rows) % CHUNK_TOKENS))  # to whole chunks
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows.double() if self.on_cpu and (rows.square().sum(0) > self.loud).any() else rows


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return aᵀ b of a float32 chunk or of float64 rows; the float64 sum of such products where there are several chunks."""
    if a.dtype == torch.float64 or len(a) <= CHUNK_TOKENS:
        return a.T @ b
    a, b = (rows.unflatten(0, (-1, CHUNK_TOKENS)) for rows in (a, b))
    return torch.bmm(a.mT, b).sum(0, dtype=torch.float64)


@functools.cache
def kernel(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """Return `add_gram` where Triton compiles it and the device has tensor cores for bfloat16; it is tried on a few numbers."""
    try:
        from lora_null.gram_kernel import add_gram

        total = torch.zeros(16, 16, dtype=torch.float64, device=device)
        add_gram(total, torch.ones(16, 16, dtype=torch.bfloat16, device=device))
        return add_gram if torch.cuda.get_device_capability(device) >= (8, 0) and total[0, 0] == 16 else None
    except Exception as error:  # a compiler that is missing, a card it does not know: each raises its own
        logger.warning(f"calibration: without the kernel for 16-bit numbers, which takes longer ({first_line(error)})")
        return None
