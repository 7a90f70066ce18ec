"""Replay: LoRA that goes on reading the calibration texts among the rows that it learns."""

from __future__ import annotations

import random
from itertools import cycle, islice
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from lora_null.trainer.methods.base import Method, check_option, method
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError

logger = get_logger(__name__)


@method
class Replay(Method):
    """LoRA on the training rows with calibration texts among them, all of whose tokens are learned.

    To n rows come round(n·ρ/(1 − ρ)) texts, in an order drawn with the run's seed, again from the first where there are
    fewer. All rows are kept, so an epoch has 1/(1 − ρ) times the steps; `max_steps` holds as it is given, and then fewer
    rows are seen. Texts lie evenly among the rows, and are cut at the trainer's `max_length`.

    Attributes:
        share: ρ, of all rows that are trained on.
    """

    name = "replay"
    starts_in_files = True
    needs_texts = True
    supports_preferences = False

    share: float = 0.2

    def __post_init__(self) -> None:
        check_option(0 < self.share < 1, f"{self.name}.share", "above 0 and below 1", self.share)

    def costs(self) -> str:
        return f"{self.share:.0%} of the rows are calibration texts, so an epoch has {1 / (1 - self.share):.3g} times the steps"

    def rows_trained_on(self, rows: int) -> int:
        return rows + max(1, round(rows * self.share / (1 - self.share)))

    def training_data(self, trainer: Any, windows: list[list[int]]) -> Dataset:
        rows = trainer.train_dataset
        if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
            columns = getattr(rows, "column_names", None)  # a stream may not know them
            raise UserError(
                "method: replay mixes texts among tokenized rows (input_ids) of a datasets.Dataset, and the training "
                f"data is a {type(rows).__name__}" + (f" of {', '.join(columns)}" if columns else "")
            )
        count = self.rows_trained_on(len(rows)) - len(rows)
        drawn = random.Random(trainer.args.seed).sample(windows, len(windows))
        longest = getattr(trainer.args, "max_length", None)  # which Transformers' own arguments have not
        texts = [window[:longest] for window in islice(cycle(drawn), count)]
        columns = {"input_ids": texts, "labels": texts, "seq_lengths": [[len(text)] for text in texts]}
        columns["attention_mask"] = [[1] * len(text) for text in texts]
        if left_out := [name for name in rows.column_names if name not in columns]:
            _check_left_out(trainer, left_out)
        kept = [name for name in rows.column_names if name in columns]
        rows = rows.select_columns(kept)
        replayed = Dataset.from_dict({name: columns[name] for name in kept}).cast(rows.features)
        logger.info(
            f"replay: {count} calibration texts ({min(count, len(windows))} distinct) among {len(rows)} training rows"
        )
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in (len(rows), count)])
        return concatenate_datasets([rows, replayed]).select(np.argsort(places, kind="stable"))


def _check_left_out(trainer: Any, names: list[str]) -> None:
    """Raise a UserError for columns that the model reads and texts have not; name those that a collator might read."""
    trainer._set_signature_columns_if_needed()
    if read := [name for name in names if name in trainer._signature_columns]:
        raise UserError(f"method: replay's texts have no {', '.join(read)}, which the rows have; leave it out of them")
    if not trainer.args.remove_unused_columns:
        logger.warning(f"replay: the rows are trained on without {', '.join(names)}, which texts have not")
