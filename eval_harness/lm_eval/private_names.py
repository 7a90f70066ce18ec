"""The names of lm-eval that it does not promise to keep, all in this file; last seen in lm-eval 0.4.13.

`tests/eval_harness/test_private_names.py` names the one that another version of lm-eval changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import torch
import tqdm
from accelerate.utils import patch_environment
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from lora_null.eval_harness.generate import StopWords, can_generate_rows, generate_rows
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import replaced
from lora_null.utils.tokens import end_ids

NO_FORK = "DISABLE_MULTIPROC"  # the environment variable that lm-eval's bootstrap asks


def full_config(path: Path) -> dict[str, Any]:
    """Return a task file's configuration with the files it includes and its functions; the task manager keeps neither."""
    return load_yaml(path, resolve_func=True)


def files_of(path: Path) -> set[Path]:
    """Return a task file and those that it includes, which include others.

    Raises:
        yaml.YAMLError, ValueError, OSError: one of them is no YAML, no mapping, or not there.
    """
    seen: set[Path] = set()
    load_yaml(path, resolve_func=False, _seen=seen)
    return seen


def needs_consent(task: Any) -> bool:
    """Return whether a task of lm-eval runs code that the model writes."""
    return getattr(task, "UNSAFE_CODE", False)


def no_document_bars() -> AbstractContextManager[None]:
    """Hide the progress bars for building requests, which have no switch of their own."""
    return replaced(lm_eval.api.task, "tqdm", partial(tqdm.tqdm, disable=True))


def bootstrap_in_this_process() -> AbstractContextManager[None]:
    """Keep lm-eval's bootstrap from forking: a fork of a process whose threads run PyTorch may hang for ever."""
    return patch_environment(**{NO_FORK: "1"})


class RowwiseLM(HFLM):
    """lm-eval's model on transformers, in which a row of a batch that has ended costs nothing more."""

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options) -> torch.Tensor:
        """Return contexts with their continuations, padded on the right: greedy ones by `generate_rows`."""
        greedy = not options.get("do_sample") and not options.get("temperature")
        known = set(options) <= {"attention_mask", "do_sample", "temperature"}
        if not (greedy and known and can_generate_rows(self.model)):
            return super()._model_generate(context=context, max_length=max_length, stop=stop, **options)
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            rows = generate_rows(
                self.model,
                context,
                options["attention_mask"],
                max_new_tokens=max_length - context.shape[1],
                ends=end_ids(self.model, self.tokenizer),
                stopped=StopWords(self.tokenizer, stop),
            )
        new = context.new_full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
        for row, tokens in zip(new, rows):
            row[: len(tokens)] = torch.tensor(tokens)
        return torch.cat([context, new], dim=1)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        for texts, _, answer in requests:  # lm-eval asserts as much, without a word
            if not 0 < len(answer) <= self.max_length:
                text = f" ({texts[1][:40]!r})" if texts else ""
                raise UserError(
                    f"an answer of {len(answer)} tokens{text}, the model takes from 1 to {self.max_length}"
                )
        # lm-eval's rolling likelihood shows a bar for each batch, on every process, inside its own bar.
        return super()._loglikelihood_tokens(requests, disable_tqdm or override_bs is not None, override_bs)
