"""What the mixins need of the Trainer class that they are put before: transformers' `Trainer`, or any of TRL's.

A mixin has no base of its own at run time, so a type checker would know none of its attributes. It sees this protocol as
the base instead; a name of transformers that a mixin uses and that is missing here is an error of the checker:

    if TYPE_CHECKING:
        from lora_null.trainer.protocol import TrainerProtocol as Base
    else:
        Base = object

    class SavingMixin(Base): ...
"""

from __future__ import annotations

from typing import Any, Protocol

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler


class TrainerProtocol(Protocol):
    """The attributes and methods of a Trainer that `SavingMixin` and `LoraNullMixin` read, call or extend."""

    model: Any  # a PeftModel, or a PreTrainedModel where every weight trains
    args: Any  # TrainingArguments, SFTConfig, DPOConfig, …
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any  # a tokenizer or a processor
    accelerator: Accelerator
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    is_deepspeed_enabled: bool
    loss_is_scaled_for_ga: bool | None
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of the Trainer class."""

    def add_callback(self, callback: TrainerCallback) -> None:
        """Add a callback to those that run."""

    def is_world_process_zero(self) -> bool:
        """Return whether this is the first of all processes."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, and the outputs where asked for."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Write a line of the log."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what trains; called by every process."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the files of `save_model`; called by the process that writes."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-N` in the output folder, and remove the oldest ones."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read what trains from a checkpoint into the model."""

    def _load_best_model(self) -> None:
        """Read the checkpoint with the best metric into the model."""

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder in which checkpoints are written."""
        raise NotImplementedError
