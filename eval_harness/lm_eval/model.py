"""lm-evaluation-harness on a live model, with its requests shared over the processes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness.lm_eval.private_names import RowwiseLM, no_document_bars
from lora_null.utils.distributed import is_first_process, merge_shares
from lora_null.utils.model_state import replaced
from lora_null.utils.sharding import my_share


class ShardedLM(RowwiseLM):
    """An lm-eval model around a live `PreTrainedModel` or `PeftModel`; every request is computed on one process.

    lm-eval takes a model object to be in a process of its own, so each of N would do all the work (lm-eval#3312); its
    own sharding by document pads their requests with copies and fails where a process has none. So here every process
    builds all requests (cheap), computes its share, and receives the others' answers: all end with the same results.
    Neither the tokenizer (copied) nor the model's ties and requires_grad are touched; it is left in eval mode.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        batch_size: requests in a forward pass, on each process.
        autocast_dtype: the dtype of `torch.autocast`; None computes in the model's own dtype.
        progress: show lm-eval's bars on the first process.

    Attributes:
        responses: the answers to each call, in order.
        replay: answer the same calls out of `responses`, without the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        autocast_dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        self.progress = progress
        self.responses: list[list] = []
        self.replay = False
        with lm_eval_silenced(logging.ERROR), replaced(model, "tie_weights", lambda *args, **kwargs: None):
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                mixed_precision_dtype=autocast_dtype,
            )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of each request's continuation."""
        return self._sharded(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each request's whole text."""
        return self._sharded(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return each request's generated text, cut at its stop strings."""
        return self._sharded(super().generate_until, requests, disable_tqdm)

    def _sharded(self, method, requests: list[Instance], disable_tqdm: bool) -> list:
        if self.replay:
            return self.responses.pop(0)
        # By document, not by request: the choices of one question stay together and share their forward pass.
        share = my_share((request.doc_id for request in requests), self.model)
        hidden = disable_tqdm or not self.progress or not is_first_process()

        def compute() -> dict[int, object]:
            answers = method([requests[i] for i in share], disable_tqdm=hidden) if share else []
            return dict(zip(share, answers, strict=True))

        answers = merge_shares(compute)
        self.responses.append([answers[i] for i in range(len(requests))])
        return self.responses[-1]


class BlankLM(LM):
    """A stand-in without a model, to try a task's rules on a document before any model is loaded."""

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return (-1 nat, not greedy) for each request."""
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Return -1 nat for each request."""
        return [-1.0] * len(requests)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the text "0" for each request."""
        return ["0"] * len(requests)


@contextmanager
def lm_eval_silenced(level: int = logging.WARNING) -> Iterator[None]:
    """Keep lm-eval's and datasets' logs below `level` and their progress bars for reading data off the screen.

    The bars of the evaluation itself stay; exceptions are not touched.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before, bars = [logger.level for logger in loggers], not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(level)
        datasets.disable_progress_bars()
        with no_document_bars():
            yield
    finally:
        for logger, old in zip(loggers, before):
            logger.setLevel(old)
        if bars:
            datasets.enable_progress_bars()
