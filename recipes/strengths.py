"""One adapter at many strengths: the whole frontier of learning and forgetting from one training.

ΔW times s is exact for every adapter that is a plain LoRA, so nothing is trained again, and the base is evaluated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lora_null.adapters.strength import Strength
from lora_null.eval_harness import Evaluation
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError

logger = get_logger(__name__)

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25)
MAX_STRENGTH = 2.0


def parse_strengths(text: str) -> list[float]:
    """Return "0,0.5,1" as numbers.

    Raises:
        UserError: one is no number from 0 to 2.
    """
    found = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            raise UserError(f"--strengths: {word.strip()!r} is not a number, such as 0.5; give 0,0.5,1") from None
        found.append(check_strength(value, "--strengths"))
    return found


def check_strength(value: float, where: str) -> float:
    """Return a strength; raise a UserError for one that is no number from 0 to 2."""
    if not 0 <= value <= MAX_STRENGTH:
        raise UserError(
            f"{where}: a strength is a number from 0 (the base) to {MAX_STRENGTH:g}, 1 being as saved, not {value}"
        )
    return value


def check_max_forgetting(value: float | None) -> None:
    """Raise a UserError for a --max-forgetting that is no number above 0."""
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"--max-forgetting: must be a number above 0, not {value}")


def sweep(
    strength: Strength,
    strengths: Sequence[float],
    base: Evaluation,
    measure: Callable[[float], Evaluation],
    known: Mapping[float, Evaluation],
) -> dict[float, Evaluation]:
    """Evaluate a live adapter at the strengths; return strength → evaluation, the base's at 0, in ascending order.

    A strength at which something is not finite is left out, with a warning.

    Args:
        strength: of the model.
        strengths: to measure; 0 and what is `known` are not measured again.
        base: the base's evaluation.
        measure: strength → the evaluation of the model, which has it.
        known: strength → evaluation.
    """
    measured = {}
    for value in sorted({0.0, *strengths}):
        found = base if value == 0 else known.get(value)
        if found is None:
            with strength.at(value):
                found = measure(value)
        bad = next((name for name, m in found.metrics.items() if not math.isfinite(m.value + (m.stderr or 0))), None)
        if bad is not None:
            logger.warning(f"strength {value:g} is left out: {bad} is not a finite number there")
            continue
        measured[value] = found
    return measured
