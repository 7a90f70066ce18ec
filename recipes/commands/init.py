"""`lora-null init`: calibrate and solve, and leave an initial adapter without training it."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from lora_null.utils.errors import UserError


def add_parser(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    init = commands.add_parser(
        "init",
        help="write an initial adapter and its factors",
        description="Calibrate, solve, and write DIR/adapter (a plain LoRA for the original model, for any trainer to "
        "continue) and DIR/init (for a recipe: method.init=DIR). A killed run continues where it was.",
    )
    init.set_defaults(run=run)
    _add_model(init)
    _add_calibration(init)
    init.add_argument(
        "--variant", choices=("v1", "v2"), default="v2", help="v2: B = 0, train B alone; v1: train A and B"
    )
    init.add_argument("--rank", type=int, default=128, help="r (default 128)")
    init.add_argument("--alpha", type=float, help="numerator of the scaling (default: the rank, s = 1)")
    init.add_argument(
        "--target-modules", default="all-linear", help="names separated by commas, a regex, or all-linear"
    )
    init.add_argument("--out", required=True, type=Path, help="folder to write")
    init.add_argument("--residual", action="store_true", help="v1: also write DIR/model, W0 − s·B0A0, and A, B alone")
    init.add_argument("--no-cache", action="store_true", help="neither use nor fill the cache of initializations")


def _add_model(init: argparse.ArgumentParser) -> None:
    init.add_argument("--model", required=True, help="hub id or local folder")
    init.add_argument("--revision", help="hub revision")
    init.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the base")
    init.add_argument("--quantization", choices=("nf4", "int8"), help="store the base's linears so (bitsandbytes)")
    init.add_argument("--device", help="where layers run and are solved (default: the accelerator if there is one)")
    init.add_argument(
        "--low-memory", action="store_true", help="leave the weights in their files, read layer by layer"
    )


def _add_calibration(init: argparse.ArgumentParser) -> None:
    init.add_argument("--calibration", required=True, help="hub id, local file or folder of the texts to keep")
    init.add_argument("--split", default="train")
    init.add_argument("--field", default="question", help="field that holds the text")
    init.add_argument("--template", help="text made of a row's fields, such as 'Q: {question}'")
    init.add_argument("--samples", type=int, default=256, help="number of windows (default 256)")
    init.add_argument("--max-length", type=int, default=1024, help="tokens of a window, at most (default 1024)")
    init.add_argument("--mode", choices=("packed", "separate"), default="packed")
    init.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    """Write DIR/adapter and DIR/init.

    Raises:
        UserError: a mistake in the options, the model or the calibration data, or an output folder that is in use.
    """
    if arguments.residual and (arguments.variant != "v1" or arguments.low_memory):
        raise UserError("--residual: only with --variant v1, and not with --low-memory")
    if arguments.quantization and (arguments.residual or arguments.low_memory):
        raise UserError("--quantization: not with --residual or --low-memory, which need the weights as they are")
    if (arguments.out / "adapter").exists():
        raise UserError(f"--out: {arguments.out} holds an adapter already, choose another folder")
    from accelerate import PartialState

    from lora_null.adapters.plain import save_plain_adapter
    from lora_null.initialize import InitOptions, start_adapter
    from lora_null.utils.distributed import together

    state = PartialState(cpu=arguments.device == "cpu")
    batches = together(lambda: _batches(arguments), what="calibration")
    peft_model, weights = together(lambda: _model(arguments), what="initialization")
    options = InitOptions(
        device=_device(arguments.device, state), weights=weights, seed=arguments.seed, cache=not arguments.no_cache
    )
    report, _ = start_adapter(peft_model, batches, options, folder=arguments.out / "init")
    if state.is_main_process:
        save_plain_adapter(peft_model, arguments.out / "adapter")
        if arguments.residual:
            _save_residual(peft_model, arguments.out)
        print(report)
        print(f"written: {arguments.out / 'adapter'} for any trainer, {arguments.out / 'init'} for method.init=")
    state.wait_for_everyone()  # nobody leaves while another still needs it
    state.destroy_process_group()


def _device(name: str | None, state: Any) -> Any:
    import torch

    try:
        return torch.device(name) if name else state.device
    except RuntimeError as error:
        raise UserError(f"--device: {str(error).splitlines()[0]}") from None


def _sections(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from lora_null.recipes.config.schema import CalibrationSection, ModelSection

    model = ModelSection(
        name_or_path=arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
    )
    calibration = CalibrationSection(
        path=arguments.calibration,
        split=arguments.split,
        field=arguments.field,
        template=arguments.template,
        samples=arguments.samples,
        max_length=arguments.max_length,
        mode=arguments.mode,
    )
    return model, calibration


def _batches(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from lora_null.recipes.data.rows import calibration_texts
    from lora_null.recipes.models.bases import load_config, load_tokenizer, resolve_name
    from lora_null.trainer.calibration_data import CalibrationArgs, as_batches
    from lora_null.utils.limits import fit_windows, position_limit

    model, calibration = _sections(arguments)
    name = resolve_name(model)
    tokenizer, limit = load_tokenizer(model, name), position_limit(load_config(model, name))
    texts = calibration_texts(calibration, tokenizer)
    length = fit_windows(calibration.max_length, CalibrationArgs.max_length, limit, "--max-length")
    cut = CalibrationArgs(calibration.samples, length, calibration.mode, arguments.seed)
    return as_batches(texts, tokenizer, cut)


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the PEFT model, and the files its weights are still in, or None."""
    from huggingface_hub import snapshot_download
    from peft import get_peft_model

    from lora_null.config import LoraNullConfig
    from lora_null.recipes.models.bases import load_base, load_config, resolve_name
    from lora_null.recipes.models.quantization import check_stored

    section, _ = _sections(arguments)
    name = resolve_name(section)
    shape = load_config(section, name)
    check_stored(section, shape)
    targets = arguments.target_modules
    config = LoraNullConfig(
        r=arguments.rank,
        lora_alpha=arguments.rank if arguments.alpha is None else arguments.alpha,
        target_modules=targets.split(",") if "," in targets else targets,
        variant=arguments.variant,
        task_type="CAUSAL_LM",
    )
    if not arguments.low_memory:
        return get_peft_model(load_base(section, name), config), None
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, revision=arguments.revision))
    return model_in_files(folder, shape, section, config)


def model_in_files(folder: Path, shape: Any, section: Any, config: Any) -> tuple[Any, Any]:
    """Return a PEFT model with real A and B, zero, on a base without weights (meta device), and the files of those."""
    import torch
    from peft import get_peft_model

    from lora_null.checkpoint_reader import WeightFiles
    from lora_null.layer import adapted_layers
    from lora_null.recipes.models.bases import empty_model

    weights = WeightFiles(folder, getattr(torch, section.dtype))
    peft_model = get_peft_model(empty_model(shape, section), config, low_cpu_mem_usage=True)
    for layer in adapted_layers(peft_model).values():
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.weight = torch.nn.Parameter(
                torch.zeros(factor.weight.shape, dtype=torch.float32), requires_grad=factor.weight.requires_grad
            )
    return peft_model, weights


def _save_residual(peft_model: Any, out: Path) -> None:
    """Write the paper's own form: the base W0 − s·B0A0 as a model, and A, B alone as an adapter for it."""
    import torch

    from lora_null.adapters.plain import state_of
    from lora_null.layer import adapted_layers
    from lora_null.utils.files import write_safetensors

    layers = adapted_layers(peft_model)
    state = state_of(
        {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in layers.items()}
    )
    config = copy.copy(peft_model.peft_config["default"])
    config.carries_residual, config.base_model_name_or_path = False, str(out / "model")
    write_safetensors(out / "model_adapter" / "adapter_model.safetensors", state, {})
    config.save_pretrained(out / "model_adapter")
    for layer in layers.values():
        layer.residual = None  # the base that is written next keeps what was taken out of it
    with torch.no_grad():
        peft_model.unload().save_pretrained(out / "model")
