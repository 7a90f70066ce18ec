"""`lora-null init`: calibrate and solve, and leave an initial adapter without training it."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from accelerate import PartialState

from lora_null.adapters.plain import save_plain_adapter
from lora_null.checkpoint_reader import adapters_in_memory
from lora_null.config import LoraNullConfig
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers, factors_of
from lora_null.recipes import caches
from lora_null.recipes.config.schema import (
    CalibrationSection,
    ModelSection,
    calibration_entry,
    module_names,
    parse_section,
)
from lora_null.recipes.data.calibration import calibration_sources, cut_windows, window_args
from lora_null.recipes.environment import computes_bf16, precision_line
from lora_null.recipes.models.bases import Base, empty_model, load_base, load_tokenizer, open_base
from lora_null.recipes.models.quantization import check_stored
from lora_null.recipes.output import check_place, check_space
from lora_null.recipes.processes import join_processes
from lora_null.targets import add_adapter, check_layers
from lora_null.trainer.calibration_data import padded_batches
from lora_null.utils.distributed import is_first_process, together
from lora_null.utils.errors import UserError, first_line
from lora_null.utils.files import replacing_folder


def run(arguments: argparse.Namespace) -> None:
    """Write DIR/adapter and DIR/init.

    Raises:
        UserError: a mistake in the options, the model or the calibration data, or an output folder that is in use.
    """
    if arguments.quantization and arguments.low_memory:
        raise UserError("--quantization: not with --low-memory, which reads the weights as they are")
    if (arguments.out / "adapter").exists():
        raise UserError(f"--out: {arguments.out} holds an adapter already, choose another folder")
    join_processes(cpu=arguments.device == "cpu")
    state = PartialState()
    if arguments.dtype == "auto":
        native = computes_bf16()
        arguments.dtype = "bfloat16" if native else "float32"
        if is_first_process():
            print(precision_line(native, ["--dtype"]))
    check_place(arguments.out, "--out")
    keys = ("revision", "dtype", "quantization")
    given = {key: getattr(arguments, key) for key in keys} | {"name_or_path": arguments.model}
    base = Base(parse_section(ModelSection, "model", given))
    device, config = _device(arguments.device, state), _config(arguments)
    together(lambda: _check(base, config, arguments))
    batches = _batches(base, arguments)
    peft_model, weights = together(lambda: _model(base, arguments, config))
    options = InitOptions(device=device, weights=weights, seed=arguments.seed, cache=not arguments.no_cache)
    report, _ = start_adapter(peft_model, batches, options, folder=arguments.out / "init")
    if is_first_process():
        with replacing_folder(arguments.out / "adapter") as made:
            save_plain_adapter(peft_model, made)
        print(report)
        print(f"written: {arguments.out / 'adapter'} for any trainer, {arguments.out / 'init'} for method.init=")
    state.wait_for_everyone()  # nobody leaves while another still needs it
    state.destroy_process_group()


def _device(name: str | None, state: Any) -> Any:
    try:
        device = torch.device(name) if name else state.device
        torch.zeros(1, dtype=torch.float64, device=device)  # is it here, and does it solve?
        return device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"--device: {first_line(error)}") from None


def _batches(base: Base, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    given = vars(arguments)
    keys = ("split", "field", "template", "samples", "max_length", "mode")
    entry = {key: given[key] for key in keys} | calibration_entry(given["calibration"])
    calibration = parse_section(CalibrationSection, "calibration", entry)

    def check() -> tuple[Any, ...]:
        tokenizer = load_tokenizer(base)
        cut = window_args(calibration, arguments.seed, base.config, "--max-length")
        sources = calibration_sources(calibration, tokenizer)
        if arguments.low_memory and any(source.texts is None for source in sources):
            raise UserError("--calibration: not self with --low-memory: the model writes with all its weights loaded")
        return tokenizer, cut, sources, cut_windows(sources, tokenizer, cut)

    tokenizer, cut, sources, windows = together(check)
    if any(source.texts is None for source in sources):
        windows = caches.written_windows(base, tokenizer, sources, cut, not arguments.no_cache)
    if is_first_process():
        print(f"calibration: {'; '.join(windows.covered)}")
    windows.check_tokens()
    return padded_batches(windows.ids, tokenizer.pad_token_id)


def _config(arguments: argparse.Namespace) -> LoraNullConfig:
    return LoraNullConfig(
        r=arguments.rank,
        lora_alpha=arguments.rank if arguments.alpha is None else arguments.alpha,
        target_modules=module_names(arguments.target_modules),
        variant=arguments.variant,
        null_multiple=arguments.null_multiple,
        null_energy=arguments.null_energy,
        **({} if arguments.start is None else {"start": arguments.start}),
        revision=arguments.revision,
        task_type="CAUSAL_LM",
    )


def _check(base: Base, config: LoraNullConfig, arguments: argparse.Namespace) -> None:
    """Put the adapter on the model without weights, before the model itself is loaded to write texts; look for space."""
    check_stored(base.section, base.config)
    wrapped = add_adapter(empty_model(base.config, base.section), copy.deepcopy(config), low_cpu_mem_usage=True)
    layers = adapted_layers(wrapped, "default")
    check_layers(wrapped, layers)
    size = sum(4 * factor.numel() for layer in layers.values() for factor in factors_of(layer))
    check_space(arguments.out, (3 if config.starts_from_residual else 2) * size, "--out")  # init/ and adapter/


def _model(base: Base, arguments: argparse.Namespace, config: LoraNullConfig) -> tuple[Any, Any]:
    """Return the PEFT model, and the files that its weights are still in, or None."""
    model, weights = open_base(base) if arguments.low_memory else (load_base(base), None)
    with adapters_in_memory():
        return add_adapter(model, copy.deepcopy(config)), weights
