"""The PEFT layer of LoRA-Null: a LoRA linear whose base may carry a residual, whose A may be frozen or kept in a basis."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists, onload_layer
from peft.utils import hotswap
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import full_precision, replaced, rewriting
from lora_null.utils.quantized import is_quantized, weight_of
from lora_null.utils.sharding import is_sharded, own_piece, whole_parameters

logger = get_logger(__name__)

TRL_REFERENCE = "ref"  # TRL adds an adapter of this name and copies the trained one's factors into it, to compare with
OUTSIDE = 0.01  # share of ‖A‖ outside its basis, above which a loaded A was not only rounded, be it to bfloat16
# Parts that activation checkpointing and torch.compile insert into module names.
RUNTIME_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
READ_THE_BASE = ("use_dora", "arrow_config")  # options that compute with W0' alone, or with BA without B0A0
TAKEN_OUT = "residual_taken_out_of_base"  # key of a state dict whose base weights are W0', not W0
NO_BASIS = (
    "variant: a saved nb adapter is a plain LoRA without the basis that its A was kept in; go on with variant='v2', "
    "which freezes A, or give the original model a new adapter"
)


class Residual(NamedTuple):
    """What is taken out of a base: W0' = W0 − scaling · B0 A0."""

    A: torch.Tensor  # (r, d_in)
    B: torch.Tensor  # (d_out, r)
    scaling: float

    def delta(self, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """Return scaling · B0 A0, (d_out, d_in), or some rows and columns of it, in float64."""
        return self.scaling * (self.B[rows].double() @ self.A[:, columns].double())

    def to(self, device: torch.device) -> Residual:
        """Return it on a device; itself where it is there."""
        return self if self.A.device == device else self._replace(A=self.A.to(device), B=self.B.to(device))

    def joined(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [A; A0] (2r, d_in) and [B, −B0] (d_out, 2r), which give BA − B0A0: copies, no arithmetic."""
        A, B = (factor.full_tensor() if isinstance(factor, DTensor) else factor for factor in (A, B))
        return torch.cat([A, self.A.to(A)]), torch.cat([B, -self.B.to(B)], dim=1)

    def split(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return A and B of what `joined` gave; None for factors that do not end in A0 and −B0."""
        r = len(self.A)
        if (len(A), B.shape[1]) != (2 * r, 2 * r):
            return None
        same = torch.equal(A[r:], self.A.to(A)) and torch.equal(B[:, r:], -self.B.to(B))
        return (A[:r], B[:, :r]) if same else None


_LAYERS_WITH_BASIS: weakref.WeakSet[LoraNullLinear] = weakref.WeakSet()


class NullBasis:
    """N (d_in, k), in whose span A stays; one object for all layers that read the same input.

    Attributes:
        vectors: N, orthonormal columns rounded to float16 (float64 for an A of float64): half of float32's memory, and on
            SmolLM2 less than 1.004 times its leakage; an exact null space leaks 8.6e-6. It follows A from device to
            device.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        self.vectors = vectors

    @classmethod
    def for_factor(cls, vectors: torch.Tensor, A: torch.Tensor) -> NullBasis:
        """Return the basis of these vectors, float64, as it is stored for A."""
        return cls(vectors.to(torch.float64 if A.dtype == torch.float64 else torch.float16).contiguous())

    @torch.no_grad()
    def project_(self, A: torch.Tensor) -> None:
        """Project A (r, d_in) onto the span of N as stored, in place, to the rounding of A's dtype.

        Rounded columns are not quite orthonormal: N Nᵀ is the projection but for an error E of about 1e-4. A second round,
        on what the first one missed, leaves E².
        """
        if self.vectors.device != A.device:
            self.vectors = self.vectors.to(A.device)
        with full_precision(A.device):
            N = self.vectors.to(torch.promote_types(A.dtype, torch.float32))
            whole = A.to(N.dtype)
            once = (whole @ N) @ N.T
            A.copy_(once + ((whole - once) @ N) @ N.T)


def keep_in_null_basis(peft_model: nn.Module, *, after_step: bool = False) -> None:
    """Put A of every adapter that has a basis N back into its span, A ← A N Nᵀ, after an optimizer's step.

    A is (r, d_in), N (d_in, k) with orthonormal columns. Every optimizer of PyTorch's kind does so at the end of its step
    where it holds A itself, whole in this process. Where an engine holds pieces of A or copies (FSDP2, DeepSpeed) the
    trainers of this package do it; otherwise call this, in all processes together.

    Args:
        peft_model: the model, or a module of it that holds adapted layers; adapters without a basis stay as they are.
        after_step: whether only an optimizer has moved A since the last call; an A that its hook projected is skipped.
    """
    for layer in peft_model.modules():
        if not isinstance(layer, LoraNullLinear):
            continue
        if moved := [name for name in layer.bases if not (after_step and layer.is_projected(name))]:
            with whole_parameters(layer.lora_A, write=True):
                for adapter_name in moved:
                    layer.project_A(adapter_name)
        layer.projected_by_step = frozenset()


def _project_after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Put back every A that the optimizer holds: a fused one moves tensors without counting up their version."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(_LAYERS_WITH_BASIS):
        for name in layer.bases:
            A = factors_of(layer, name)[0]
            if id(A) in moved and A.requires_grad and not is_sharded(A):
                layer.project_A(name)
                layer.projected_by_step |= {name}


register_optimizer_step_post_hook(_project_after_step)


def adapted_layers(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return the LoRA layers that carry the adapter, by the name of the module in the base model."""
    return {
        plain_name(name): module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def plain_name(name: str) -> str:
    """Return a module's or parameter's name without what activation checkpointing and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in RUNTIME_WRAPPERS)


def active_adapter(model: nn.Module) -> str:
    """Return the name of the adapter that computes and trains, the first of several; "default" where there is none."""
    return model.active_adapters[0] if isinstance(model, PeftModel) else "default"


def active_config(model: Any) -> PeftConfig | None:
    """Return the config of `active_adapter`; None for what is no PEFT model."""
    return model.peft_config[active_adapter(model)] if isinstance(model, PeftModel) else None


def factors_of(layer: nn.Module, adapter_name: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (r, d_in) and B (d_out, r) of an adapter, as they train."""
    A, B = (factor[adapter_name].weight for factor in (layer.lora_A, layer.lora_B))
    return cast(nn.Parameter, A), cast(nn.Parameter, B)


def residual_of(layer: nn.Module, adapter_name: str = "default") -> Residual | None:
    """Return A0, B0 of an adapter whose change of W0 is s·(BA − B0A0); None where it is s·BA."""
    counts = isinstance(layer, LoraNullLinear) and adapter_name in layer.residual_adapters
    return cast("Residual | None", layer.residual) if counts else None


def is_started(peft_model: PeftModel, adapter_name: str = "default") -> bool:
    """Return whether an adapter was initialized, trained or loaded: a fresh one adds BA = 0 to the original weights."""
    return any(
        adapter_name in getattr(layer, "started", ()) or residual_of(layer, adapter_name) or _adds(layer, adapter_name)
        for layer in adapted_layers(peft_model, adapter_name).values()
    )


def _adds(layer: LoraLayer, adapter_name: str) -> bool:
    """Return whether BA may differ from 0; on all processes together where factors are sharded."""
    linear = isinstance(layer.lora_A, nn.ModuleDict) and adapter_name in layer.lora_A  # not an embedding, not AdaLoRA
    if not linear or layer.lora_B[adapter_name].weight.is_meta:
        return False
    with whole_parameters(layer.lora_A, layer.lora_B):
        A, B = factors_of(layer, adapter_name)
        return bool(B.any()) and bool(A.any())


_say_once = functools.cache(logger.warning)  # per process, whatever the number of layers


def check_beside_residual(adapter_name: str, config: Any, *, started: bool = False) -> None:
    """Raise a UserError for an adapter that would take W0 − s·B0A0, the base of another one, for W0.

    Args:
        adapter_name, config: of the adapter that does not count from the residual.
        started: whether the adapter exists already; then its init_lora_weights is not checked.
    """
    reads = next((name for name in READ_THE_BASE if getattr(config, name, None)), None)
    if not started and (start := rewriting(getattr(config, "init_lora_weights", None))):
        reads = f"init_lora_weights={start!r}"
    if reads is not None:
        raise UserError(
            f"adapter {adapter_name!r}: {reads} reads the base weights, and another adapter's residual is out of them; load "
            "it onto the original model"
        )


def targeted_linears(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """Return the linears that a config's `target_modules` names, by their name in the model, without the head for "all-linear"."""
    linears = {plain_name(name): x for name, x in model.named_modules() if isinstance(x, nn.Linear | Conv1D)}
    if config.target_modules == "all-linear":
        head = model.get_output_embeddings()
        return {name: linear for name, linear in linears.items() if linear is not head}
    return {name: linear for name, linear in linears.items() if check_target_module_exists(config, name)}


def freeze_factor(layer: LoraLayer, part: str, adapter_name: str = "default") -> None:
    """Keep `lora_A` or `lora_B` out of training through PEFT's own record, which survives `set_adapter`."""
    frozen = {**layer.frozen_peft_weight_names}
    frozen[adapter_name] = tuple({*frozen.get(adapter_name, ()), part})
    layer.frozen_peft_weight_names = frozen
    layer._freeze_non_trainable_peft_weights(adapter_name)


class LoraNullLinear(Linear):
    """A `peft` LoRA linear that never shows a half-changed base.

    Under v1 the base weight is W0' = W0 − s·B0A0, and the layer's output is that of W0 + Σ s_i·(B_i A_i − B0 A0) over
    the adapters i that take part and count from the residual (usually one). Whenever none does (disabled, another
    adapter active, deleted, unloaded), or a scaling was changed, the layer adds what is missing of s·B0A0, so that what
    remains is the original model, to the rounding of the weight's dtype. What leaves the layer, by `state_dict` or
    `get_delta_weight`, is the change of the original weight. The residual is kept on the CPU until a forward pass needs it.

    Attributes:
        residual: what is taken out of the base; None where nothing is.
        residual_adapters: the adapters whose factors count from it.
        started: the adapters that were initialized or loaded.
        bases: adapter → the basis in whose span its A stays.
    """

    residual: Residual | None = None
    residual_adapters: frozenset[str] = frozenset()
    started: frozenset[str] = frozenset()
    bases: Mapping[str, NullBasis] = MappingProxyType({})
    projected_by_step: frozenset[str] = frozenset()  # adapters whose A an optimizer's step has put back last
    # Adapter → the id of its A, and A's version when it was seen in its span; None: whichever the next pass finds.
    _projected: Mapping[str, tuple[int, int | None]] = MappingProxyType({})
    _not_trained_yet: frozenset[str] = frozenset()  # adapters of a LoraNullConfig, until their first training pass
    _of_null_basis: frozenset[str] = frozenset()  # adapters of variant nb
    _base_is_merging = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        transposed = isinstance(base_layer, Conv1D)  # as PEFT does for its own layers: GPT-2 stores its weights so
        if config.fan_in_fan_out and not transposed:
            warnings.warn("fan_in_fan_out is True, but the target is a torch.nn.Linear: taken as False", stacklevel=2)
        config.fan_in_fan_out = kwargs["is_target_conv_1d_layer"] = transposed
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        counts_from_residual = getattr(config, "carries_residual", False)
        if counts_from_residual and (self.residual is None or adapter_name != TRL_REFERENCE):
            raise UserError(
                f"adapter {adapter_name!r}: this config belongs to an adapter that was started; make a new one"
            )
        lacks = self.residual is not None and self.residual_adapters != {adapter_name}
        if lacks and not counts_from_residual and not is_quantized(self.get_base_layer()):
            check_beside_residual(adapter_name, config)
        self._forget(adapter_name)  # PEFT draws an adapter of this name anew
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        if getattr(config, "variant", None) == "v2":
            freeze_factor(self, "lora_A", adapter_name)
        if hasattr(config, "variant") and adapter_name != TRL_REFERENCE:
            self._not_trained_yet |= {adapter_name}
            self._of_null_basis |= {adapter_name} if config.variant == "nb" else frozenset()
        if counts_from_residual:
            with torch.no_grad():
                for factor, start in zip(factors_of(self, adapter_name), self._known_residual[:2]):
                    factor.copy_(start)
            self.residual_adapters |= {adapter_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.bases:  # a copy, or one that was pickled
            _LAYERS_WITH_BASIS.add(self)
            self._take_as_projected()

    def set_basis(self, adapter_name: str, basis: NullBasis) -> None:
        """Keep A, which lies in the span of a basis, there from now on."""
        self.bases = {**self.bases, adapter_name: basis}
        self._take_as_projected()
        _LAYERS_WITH_BASIS.add(self)

    def drop_basis(self, adapter_name: str) -> None:
        """Let A leave its basis from now on; an adapter without one stays as it is."""
        self.bases = {name: basis for name, basis in self.bases.items() if name != adapter_name}

    def _take_as_projected(self) -> None:
        """Take every A that has a basis for one inside its span, whatever is written to it before the next pass."""
        self._projected = {name: (id(factors_of(self, name)[0]), None) for name in self.bases}

    def project_A(self, adapter_name: str) -> None:
        """Put A, whole on this process, back into the span of its basis."""
        A = factors_of(self, adapter_name)[0]
        self.bases[adapter_name].project_(A)
        self._projected = {**self._projected, adapter_name: (id(A), A._version)}

    def is_projected(self, adapter_name: str) -> bool:
        """Return whether an optimizer's step has put A back, and nobody has written to it since."""
        A = factors_of(self, adapter_name)[0]
        return adapter_name in self.projected_by_step and self._projected.get(adapter_name) == (id(A), A._version)

    def _project_moved(self) -> None:
        """Put back every A that something else than an optimizer has moved.

        One that was just started or loaded is inside its span and keeps its bits. A tensor that stands in for A in this
        pass alone, as in `torch.func.functional_call`, is left as it is.
        """
        for name in self.bases if self.training and not torch.compiler.is_compiling() else ():
            A = factors_of(self, name)[0]
            own, version = self._projected.get(name, (id(A), None))
            if own != id(A) or not isinstance(A, nn.Parameter):
                continue
            if version is None:
                self._projected = {**self._projected, name: (own, A._version)}
            elif A.requires_grad and not is_sharded(A) and A._version != version:
                self.project_A(name)

    def _warn_if_not_initialized(self) -> None:
        """Say which of the adapters that begin to train have not been initialized, or train a frozen A; once for each.

        Raises:
            UserError: one whose A is to be kept in a basis was loaded or combined without it.
        """
        for name in self._of_null_basis.intersection(self.active_adapters) - self.bases.keys():
            whole = not is_sharded(factors_of(self, name)[1])  # of a sharded B only some processes would raise
            if name in self.started or (whole and self._is_zero(name) is False):  # or combined from others
                raise UserError(NO_BASIS)
        begin = self._not_trained_yet.intersection(self.active_adapters)
        for name in begin:
            frozen = self.frozen_peft_weight_names.get(name, ())
            if "lora_A" in frozen and factors_of(self, name)[0].requires_grad:
                _say_once(
                    f"adapter {name!r}: v2 keeps A frozen, and requires_grad was set on it: it trains and leaves the null "
                    "space; take the parameters whose requires_grad is set already"
                )
        for name in begin - self.started:
            if factors_of(self, name)[1].requires_grad and self._is_zero(name):  # a combination has its B already
                _say_once(
                    f"adapter {name!r}: a LoraNullConfig that was never initialized trains from a random A; use "
                    "LoraNullSFTTrainer, or initialize_lora_null_weights first"
                )
        self._not_trained_yet -= begin

    def _is_zero(self, adapter_name: str) -> bool | None:
        """Return whether what this process holds of B is 0, without a collective; None where it holds nothing of it."""
        B = factors_of(self, adapter_name)[1]
        held = own_piece(getattr(B, "ds_tensor", B))[0]  # of ZeRO-3, its piece
        return None if held.is_meta or not held.numel() else not held.any()

    def subtract_residual(self, adapter_name: str) -> None:
        """Turn the base W0 into W0 − s·BA of the adapter: its weight, in place, computed in float64 and rounded once.

        Raises:
            RuntimeError: when the base already carries a residual, or a merged adapter.
        """
        if self.merged:
            raise RuntimeError(f"the base already carries the merged {', '.join(self.merged_adapters)}")
        if self.residual is not None:
            raise RuntimeError(f"the base already carries the residual of {', '.join(sorted(self.residual_adapters))}")
        # Copies: A and B go on to be trained.
        A, B = (factor.detach().clone() for factor in factors_of(self, adapter_name))
        residual = Residual(A, B, self.scaling[adapter_name])
        self._add_to_base(residual, -1)
        self.residual = residual.to(torch.device("cpu"))
        self.residual_adapters = frozenset({adapter_name})

    @property
    def _known_residual(self) -> Residual:
        """The residual, where it is known that there is one."""
        if self.residual is None:
            raise RuntimeError("the base carries no residual")
        return self.residual

    def _apply(self, *args: Any, **kwargs: Any) -> LoraNullLinear:
        """Move or cast as PyTorch does; the residual stays as exact as it is, and waits on the CPU again."""
        super()._apply(*args, **kwargs)
        if self.residual is not None:
            self.residual = self.residual.to(torch.device("cpu"))
        return self

    def restore_base(self) -> None:
        """Put s·B0A0 back into the base: W0 to the rounding of its dtype. Without a residual, do nothing."""
        if self.residual is not None:
            self._add_to_base(self.residual, 1)
            self.residual, self.residual_adapters = None, frozenset()

    def subtract_from_loaded_base(self) -> None:
        """Subtract s·B0A0 from a base that lacked its numbers when the adapter started, and has just been given W0."""
        self._add_to_base(self._known_residual, -1)

    @torch.no_grad()
    def _add_to_base(self, residual: Residual, sign: int) -> None:
        """Add ± s·B0A0 to the weight, of a sharded one to this process's piece; not where it has no numbers yet."""
        weight = self.get_base_layer().weight
        if weight.is_meta:
            return
        own, at = own_piece(weight)
        residual = residual.to(own.device)
        delta = residual.delta(*at[::-1]).T if self.fan_in_fan_out else residual.delta(*at)
        own.copy_((own.double() + sign * delta).to(own.dtype))

    def _residual_is_merged(self) -> bool:
        """Return whether an adapter that counts from the residual is merged: the base then lacks nothing."""
        return not self.residual_adapters.isdisjoint(self.merged_adapters)

    def _missing_scale(self) -> float:
        """Return c, where base and adapters together now lack c·B0A0 x, which `forward` adds."""
        if self.residual is None:
            return 0.0
        if self.disable_adapters or self.merged:
            return 0.0 if self._residual_is_merged() else self.residual.scaling
        active = [name for name in self.active_adapters if name in self.residual_adapters]
        for name in active:
            self._check_rank(name)
        return self.residual.scaling - sum(self.scaling[name] for name in active)

    def _check_rank(self, adapter_name: str) -> None:
        """Raise a UserError where an A of another rank is in the place of one that counts from the residual."""
        A = self.lora_A[adapter_name].weight
        if len(A) != len(self._known_residual.A) and not is_sharded(A):
            raise UserError(
                f"adapter {adapter_name!r}: its factors were replaced from outside, but its base carries the residual of "
                "its own; load the new adapter under another name"
            )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._project_moved()
        if self._not_trained_yet and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_if_not_initialized()
        if self._has_one_adapter(args, kwargs) and not self._missing_scale():
            return self._plain_forward(x)
        if self.residual is not None and kwargs.get("adapter_names"):
            raise UserError("adapter_names: rows cannot choose their adapter while the base carries a residual")
        result = super().forward(x, *args, **kwargs)
        missing = self._missing_scale()  # only now: PEFT unmerges in there what is merged and disabled
        if not missing:
            return result
        self.residual = self._known_residual.to(x.device)  # and it stays: DPO's reference asks for it in every step
        A, B, _ = self.residual
        offset = nn.functional.linear(_scaled(nn.functional.linear(x.to(A.dtype), A), missing), B)
        return (result + offset).to(result.dtype)  # rounded once, as `_plain_forward` does

    def _has_one_adapter(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Return whether one live adapter without dropout is all there is: the case while training."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return False
        A = self.lora_A[name].weight  # where it is not whole, its own forward pass gathers it
        return not (is_sharded(A) or A.is_meta) and isinstance(self.lora_dropout[name], nn.Identity)

    def _plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute W x + B (s · A x) as PEFT does, without its passes over wide tensors.

        The scaling multiplies the r-wide tensor; the sum is taken into the base's output while B multiplies; under
        autocast x is not cast up to the adapter's dtype first, only to be cast down again. Where A is frozen nothing but
        A x, r wide, is kept for the backward pass.
        """
        name = self.active_adapters[0]
        (A, B), scaling = factors_of(self, name), self.scaling[name]
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, A.dtype)
        hidden = _scaled(nn.functional.linear(x, A), scaling)
        if hidden.dtype == B.dtype == result.dtype:
            flat = torch.addmm(result.view(-1, result.shape[-1]), hidden.view(-1, hidden.shape[-1]), B.T)
            return flat.view(result.shape)
        return (result + nn.functional.linear(hidden.to(B.dtype), B)).to(result.dtype)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return ΔW, in the layout and dtype of PEFT's: the change of the original weight by one adapter.

        While merging, return what to add to the base as it is: W0', or one with another such adapter merged.
        """
        residual, share = residual_of(self, adapter), 0.0
        if residual is not None:
            share -= self.scaling[adapter]
            if self._base_is_merging and not self._residual_is_merged():
                share += residual.scaling
        if residual is None or not share:
            return super().get_delta_weight(adapter)
        now = factors_of(self, adapter)
        stored = now[1]
        exact = torch.promote_types(stored.dtype, torch.float32)  # 16 bits of a difference, not of what it is taken of
        A, B, A0, B0 = (factor.to(stored).to(exact) for factor in (*now, residual.A, residual.B))
        delta = self.scaling[adapter] * (B @ A) + share * (B0 @ A0)
        return (delta.T if self.fan_in_fan_out else delta).to(stored.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with replaced(self, "_base_is_merging", True):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        with replaced(self, "_base_is_merging", True):
            super().unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        self._forget(adapter_name)
        super().delete_adapter(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        """Forget how an adapter was started; put back what the last one that counts from a residual took out."""
        if self.residual_adapters == {adapter_name}:
            with onload_layer(self):  # of a base that accelerate keeps elsewhere
                if self._residual_is_merged():
                    self.unmerge()
                self.restore_base()
        self.residual_adapters -= {adapter_name}
        self.started -= {adapter_name}
        self._not_trained_yet -= {adapter_name}
        self._of_null_basis -= {adapter_name}
        self.drop_basis(adapter_name)
        frozen = self.frozen_peft_weight_names
        self.frozen_peft_weight_names = {name: parts for name, parts in frozen.items() if name != adapter_name}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give back the base layer, as PEFT's `merge_and_unload` and `unload` ask: merged, or the original."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self._residual_is_merged():
            self.restore_base()
        return self.get_base_layer()

    def get_base_weight(self) -> torch.Tensor:
        """Return W0, the original weight: a new tensor where it is not stored whole."""
        weight = super().get_base_weight()
        if self.residual is None or self._residual_is_merged():
            return weight
        delta = self.residual.delta().to(weight.device)
        return (weight.double() + (delta.T if self.fan_in_fan_out else delta)).to(weight.dtype)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        if self.residual is not None:
            raise UserError("set_base_weight: the base carries a residual; unload the adapter first")
        super().set_base_weight(weight_data)

    @property
    def residual_taken_out_of_base(self) -> torch.Tensor:
        """The entry of that name in the state dict; PyTorch's distributed checkpoints look each one up."""
        return torch.tensor(self._known_residual.scaling)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """Return PEFT's state, an adapter that counts from a residual as [A; A0], [B, −B0]: for the original weight.

        The base's own weight is W0' there, as an entry says: nothing but a layer with this same residual takes the state.
        """
        self._project_moved()
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.residual is None:
            return state
        for name in self.residual_adapters:
            keys = [f"{prefix}{part}.{name}.weight" for part in ("lora_A", "lora_B")]
            if state[keys[0]].numel():  # ZeRO-3 leaves nothing where a weight is not gathered
                state |= zip(keys, self.residual.joined(*(state[key] for key in keys)))
        state[prefix + TAKEN_OUT] = self.residual_taken_out_of_base
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take what `state_dict` gave, A and B without A0 and −B0.

        Raises:
            UserError: it belongs to another residual than this layer's, or to none.
        """
        module, from_residual = prefix.rstrip("."), state_dict.pop(prefix + TAKEN_OUT, None) is not None
        if from_residual and self.residual is None:
            raise UserError(
                f"{module}: the state to load has a residual taken out of its base, this model has not; start the model "
                "from the same initialization first, or load the saved adapter onto the original model"
            )
        if self.residual is not None and not from_residual and f"{prefix}base_layer.weight" in state_dict:
            raise UserError(
                f"{module}: the state to load has its whole base, this model's lacks a residual; load it into a model "
                "made anew"
            )
        for name in self.residual_adapters:
            keys = [f"{prefix}{part}.{name}.weight" for part in ("lora_A", "lora_B")]
            if not any(key in state_dict and state_dict[key].numel() for key in keys):
                continue  # not there, or ZeRO-3's empty stand-in
            complete = all(key in state_dict for key in keys)
            found = self._known_residual.split(*(state_dict[key] for key in keys)) if complete else None
            if found is None:
                raise UserError(
                    f"{module}: the factors to load do not start where adapter {name!r} does; load them under another "
                    "adapter name, or onto the original model"
                )
            state_dict |= zip(keys, found)
        for name in self.bases:
            A = state_dict.get(f"{prefix}lora_A.{name}.weight")
            if A is not None and A.numel() and A.shape == factors_of(self, name)[0].shape:
                self._check_inside(name, A, module)
        self._take_as_projected()
        if args and args[0].get("assign_to_params_buffers"):  # another tensor will be A
            self._projected = {}
        self.started |= {name for name in self.lora_A if f"{prefix}lora_A.{name}.weight" in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_inside(self, adapter_name: str, A: torch.Tensor, module: str) -> None:
        """Raise a UserError for an A to load that is not in the span where the adapter's is kept."""
        basis = self.bases[adapter_name]
        A = A.detach().to(basis.vectors.device)
        basis.project_(inside := A.clone())
        if torch.dist(A, inside) > OUTSIDE * torch.linalg.matrix_norm(A):
            raise UserError(
                f"{module}: the factors to load leave the null basis that adapter {adapter_name!r} is kept in; load them "
                "under another adapter name, or onto the original model"
            )


class LoraNullQuantizedLinear(LoraNullLinear):
    """The same on a base whose weight is stored quantized and is never written to.

    Under v1 the residual is a second, frozen low-rank path, W0 x + s·(B A x − B0 A0 x), for as long as its adapter takes
    part; disabling the adapter leaves exactly the base.
    """

    def subtract_residual(self, adapter_name: str) -> None:
        super().subtract_residual(adapter_name)
        # Every forward pass reads it, and one that moves it first breaks the graph of torch.compile.
        self.residual = self._known_residual.to(factors_of(self, adapter_name)[0].device)

    def _add_to_base(self, residual: Residual, sign: int) -> None:
        """Leave the stored weight alone: nothing was taken out of it."""

    def get_base_weight(self) -> torch.Tensor:
        return weight_of(self)

    def _missing_scale(self) -> float:
        return super()._missing_scale() - (0.0 if self.residual is None else self.residual.scaling)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._project_moved()
        if self._has_one_adapter(args, kwargs) and self.active_adapters[0] in self.residual_adapters:
            return self._offset_forward(x)
        return super().forward(x, *args, **kwargs)

    def _offset_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute W0 x + (s·B A x − s·B0 A0 x), the difference first: at the start it is exactly zero."""
        name = self.active_adapters[0]
        self._check_rank(name)
        (A, B), scaling, residual = factors_of(self, name), self.scaling[name], self._known_residual
        if (residual.A.device, residual.A.dtype) != (A.device, A.dtype):  # the model was moved or cast
            self.residual = residual = residual._replace(A=residual.A.to(A), B=residual.B.to(B))
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, A.dtype)
        now = nn.functional.linear(_scaled(nn.functional.linear(x, A), scaling), B)
        start = nn.functional.linear(_scaled(nn.functional.linear(x, residual.A), scaling), residual.B)
        return (result + (now - start)).to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UserError("merge: the base is quantized, and its stored weights are left alone; merge into the original")


_swap = hotswap.hotswap_adapter_from_state_dict


@functools.wraps(_swap)
def _swap_unless_started(
    model: nn.Module, state_dict: Mapping[str, Any], adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraNullLinear) and adapter_name in {*layer.residual_adapters, *layer.bases}:
            why = "its A is kept in a basis" if layer.residual is None else "its base carries a residual"
            raise UserError(f"adapter {adapter_name!r}: no hot swap, {why}; load the new adapter under another name")
    _swap(model, state_dict, adapter_name, *args, **kwargs)


# A swap writes past the layer, into the factors' data: it has no method of the layer's to refuse it in, and leaves no trace.
hotswap.hotswap_adapter_from_state_dict = _swap_unless_started


def _scaled(hidden: torch.Tensor, scaling: float) -> torch.Tensor:
    return hidden if scaling == 1 else hidden * scaling


def lora_null_layer(base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> LoraNullLinear:
    """Return the layer that suits a linear, plain or quantized."""
    base = base_layer.get_base_layer() if isinstance(base_layer, LoraLayer) else base_layer
    kind = LoraNullQuantizedLinear if is_quantized(base) else LoraNullLinear
    return kind(base_layer, adapter_name, config, **kwargs)
