"""A base that no process loads whole: its weights stay in their files until FSDP2 has sharded the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from trl.trainer.utils import create_model_from_path

from lora_null.checkpoint_reader import WeightFiles, checkpoint_name, open_to_shard
from lora_null.drift import DriftMeter, WeightDriftMeter
from lora_null.trainer.checkpoints import Base
from lora_null.utils.distributed import get_logger, together

logger = get_logger(__name__)
NOT_ONLY_WEIGHTS = ("revision", "cache_dir", "token", "subfolder")  # by which TRL loads more than the model


def leave_in_files(given: dict[str, Any]) -> tuple[WeightFiles | None, Any]:
    """Put a model without weights in the place of a model's path among a TRL trainer's arguments; return its files.

    Where its files do not fit its weights, name by name, every process loads it whole, and a line says so.
    """
    args, path = given.get("args"), given.get("model")
    if not isinstance(path, str) or given.get("quantization_config") is not None:
        return None, path
    options = {"trust_remote_code": getattr(args, "trust_remote_code", False)}
    options |= getattr(args, "model_init_kwargs", None) or {}
    if options.pop("device_map", None) or "quantization_config" in options:
        return None, path
    if told := next((key for key in NOT_ONLY_WEIGHTS if key in options), None):
        logger.warning(f"every process loads the whole model: model_init_kwargs sets {told}")
        return None, path
    found = open_to_shard(create_model_from_path, path, **options)
    if found is None:
        return None, path
    if getattr(args, "model_init_kwargs", None) is not None:
        given["args"] = copy.copy(args)
        given["args"].model_init_kwargs = None
    given["model"], weights = found
    return weights, given["model"]


class WeightsInFilesMixin(Base):
    """Put before a Trainer class: its model's weights may lie in files, and each process reads those of its shards.

    Attributes:
        _weights: the files; None once every weight was loaded.
        _given_model: the model without weights that was made for them.
        _optimizer_names: by the optimizer's groups, the names of the weights that train; empty where none is in files.
        drift_meter: of the trainer, which begins anew when weights come.
    """

    model: Any
    drift_meter: DriftMeter | WeightDriftMeter | None
    _weights: WeightFiles | None = None
    _given_model: Any = None
    _optimizer_names: Sequence[Sequence[str]] = ()

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent trainer; now that the engine is known, weights stay in their files only for FSDP2 to shard them."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self._weights is not None and plugin is not None and plugin.fsdp_version == 2:
            plugin.cpu_ram_efficient_loading = False  # the first process has none to send: each reads its own
        elif self._weights is not None:
            self.read_whole()

    def read_whole(self) -> None:
        """Load every weight on this process."""
        self._weights.fill(self._given_model, torch.device("cpu"))
        self._weights = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent trainer; weights that train and are still in their files are remembered by their names."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._weights is not None and any(p.is_meta for group in optimizer.param_groups for p in group["params"]):
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            self._optimizer_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        return optimizer

    def read_shards(self) -> None:
        """Give each process the numbers of its shards, from the files; nothing where weights were loaded already."""
        if self._weights is None or not any(parameter.is_meta for parameter in self.model.parameters()):
            return
        offloaded = isinstance(self.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
        device = torch.device("cpu") if offloaded else self.accelerator.device
        together(lambda: self._weights.fill(self.model, device))
        if isinstance(self.drift_meter, WeightDriftMeter):
            self.drift_meter.begin()
        if self._optimizer_names:  # accelerate finds shards by their address, which these did not have yet
            shards = {checkpoint_name(name): parameter for name, parameter in self.model.named_parameters()}
            for group, names in zip(self.optimizer.param_groups, self._optimizer_names):
                group["params"] = [shards[checkpoint_name(name)] for name in names]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As the parent trainer; what it loads over has to be there."""
        self.read_shards()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
