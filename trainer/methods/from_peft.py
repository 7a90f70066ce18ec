"""MiCA, EVA, LoRA-GA and OSF as PEFT implements them; only the data they look at and the saving are ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, OSFConfig, PeftConfig, initialize_lora_eva_weights
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.osf import OSFLayer
from torch import nn

from lora_null.config import ResidualLoraConfig
from lora_null.layer import active_adapter, plain_name
from lora_null.targets import check_fits
from lora_null.trainer.methods.base import Method, check_count, check_option, method, taken_by
from lora_null.trainer.methods.full import WeightMethod
from lora_null.trainer.methods.gradients import FromGradient, first_batches, take_gradients
from lora_null.trainer.methods.residual import ResidualMethod
from lora_null.utils.distributed import broadcast, broadcast_tensor
from lora_null.utils.errors import UserError


@method
class MiCA(Method):
    """B = the r left singular vectors of W0 with the smallest singular values, frozen; A = 0 trains."""

    name = "mica"
    supports_quantized_base = False

    def config(self, **adapter: Any) -> PeftConfig:
        return LoraConfig(init_lora_weights="mica", **adapter)

    def check(self, model: nn.Module) -> None:
        for name, layer in self.layers(model).items():
            check_fits(name, layer, layer.r[active_adapter(model)])


@method
class EVA(Method):
    """A = the leading right singular vectors of the inputs on the training rows, ranks dealt out by variance; B = 0.

    Attributes:
        rows: training rows that are looked at, the first ones.
        batch_rows: rows of one batch; its answer tokens must be at least rho · r.
        rho: PEFT's; a layer gets at most rho · r.
    """

    name = "eva"
    supports_quantized_base = False
    supports_preferences = False  # it reads the labels of answers
    new_parameters = True  # it deals out the ranks anew

    rows: int = 128
    batch_rows: int = 16
    rho: float = 2.0

    def __post_init__(self) -> None:
        check_count(self, "rows", "batch_rows")
        check_option(1 <= self.rho < float("inf"), f"{self.name}.rho", "a number of at least 1", self.rho)

    def config(self, **adapter: Any) -> PeftConfig:
        if adapter.get("rank_pattern"):
            raise UserError(f"rank_pattern: {self.name} deals out the ranks itself, leave it out; its rho bounds them")
        return LoraConfig(init_lora_weights="eva", **{"eva_config": EvaConfig(rho=self.rho), **adapter})

    def saved_rank(self, r: int) -> int:
        return round(self.rho * r)

    def training_batches(self, trainer: Any) -> list[dict[str, torch.Tensor]]:
        return first_batches(trainer, self.rows, self.batch_rows)

    def compute(self, trainer: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        config = trainer.model.peft_config[active_adapter(trainer.model)]
        needed = config.eva_config.rho * config.r
        answers = [int((batch["labels"] != -100).sum()) for batch in batches]
        if min(answers) < needed:
            raise UserError(
                f"method.options.eva.batch_rows: a batch has only {min(answers)} answer tokens, rho · r = {needed:g} are "
                "needed; raise batch_rows"
            )
        found = get_eva_state_dict(  # every process sees the same rows, so nothing is gathered
            trainer.model,
            batches,
            adapter_name=active_adapter(trainer.model),
            gather_distributed_inputs=False,
            show_progress_bar=not trainer.args.disable_tqdm,
        )
        return broadcast({name: tensor.cpu() for name, tensor in found.items()})  # processes may round differently

    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        initialize_lora_eva_weights(model, eva_state_dict=dict(tensors), adapter_name=active_adapter(model))
        for layer in self.layers(model).values():  # PEFT made them anew, in the base's dtype
            layer.lora_A.float()
            layer.lora_B.float()


@method
class LoRAGA(FromGradient, ResidualMethod):
    """A and B from the singular vectors of the loss's gradient at W0 on training rows; base W0 − s·BA; A and B train."""

    name = "lora-ga"
    room = 2

    def config(self, **adapter: Any) -> PeftConfig:
        return ResidualLoraConfig(init_lora_weights="lora_ga", **{"lora_ga_config": LoraGAConfig(), **adapter})

    def compute(self, trainer: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return PEFT's factors, the same on every process; the base is put back, `apply` subtracts them for good."""
        layers, tensors, adapter = self.layers(trainer.model), {}, active_adapter(trainer.model)
        how = trainer.model.peft_config[adapter].lora_ga_config or LoraGAConfig()
        take_gradients(trainer, layers, batches)
        for name, layer in layers.items():
            base, A, B = layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]
            original, dtype = base.weight.data.clone(), A.weight.dtype
            try:
                layer.lora_ga_init(adapter, how)
                tensors |= {f"{name}.lora_{x}": f.weight.data.to(dtype, copy=True) for x, f in (("A", A), ("B", B))}
            finally:  # what is broken off can be tried again: from W0, where gradients are to be taken
                base.weight.data = original
                for factor in (A, B):  # PEFT leaves them in the base's dtype
                    factor.weight.data = factor.weight.data.to(dtype)
                nn.init.zeros_(B.weight)
        for tensor in tensors.values():
            broadcast_tensor(tensor, 0)
        return tensors


@method
class OSF(WeightMethod):
    """The lower half of each weight's singular space trains, gradients projected off the upper half; full rank.

    Saved as a model: the change of a weight has up to half its full rank, more than an adapter is good for.

    Attributes:
        effective_rank: PEFT's: the number or the fraction of leading directions that are preserved.
    """

    name = "osf"
    supports_sharding = False  # gradients are projected by hooks on whole weights

    effective_rank: float = 0.5

    def __post_init__(self) -> None:
        rank = self.effective_rank
        fits = (type(rank) is int and rank >= 1) or (type(rank) is float and 0 < rank <= 1)
        check_option(
            fits, f"{self.name}.effective_rank", "a whole number of at least 1, or a fraction of at most 1.0", rank
        )

    def config(self, **adapter: Any) -> PeftConfig:
        taken = taken_by(OSFConfig, self.name, adapter, but="modules_to_save")
        return OSFConfig(**taken, effective_rank=self.effective_rank)

    def layers(self, model: nn.Module) -> Mapping[str, Any]:
        return {plain_name(name): x for name, x in model.get_base_model().named_modules() if isinstance(x, OSFLayer)}

    def prepare(self, model: nn.Module) -> None:
        for layer in self.layers(model).values():
            for parameter in layer.osf_svd_params.parameters():
                parameter.data = parameter.data.float()

    def trainable(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters() if ".osf_svd_params." in name}

    def held_bytes(self, model: nn.Module) -> int:
        """What is preserved, and where what trains began, in float32."""
        return 4 * sum(buffer.numel() for name, buffer in model.named_buffers() if "._osf_" in name)

    def check(self, model: nn.Module) -> None:
        if not self.layers(model):
            raise UserError("target_modules: osf adapts torch.nn.Linear alone, and none of the model's matches")

    @torch.no_grad()
    def save(self, model: nn.Module, directory: Path) -> int:
        layers, base = self.layers(model), model.get_base_model()
        state = {name.replace(".base_layer.", "."): x for name, x in base.state_dict().items() if "osf_" not in name}
        for name, layer in layers.items():
            weight = layer.get_base_layer().weight
            state[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(active_adapter(model)).float()).to(
                weight.dtype
            )
        base.save_pretrained(directory, state_dict=state)  # which empties it
        return sum(parameter.numel() for name, parameter in base.named_parameters() if "osf_" not in name)
