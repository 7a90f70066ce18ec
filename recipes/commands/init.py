"""`lora-null init`: calibrate and solve, and leave an initial adapter without training it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import shtab

from lora_null.utils.errors import UserError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser's subcommands."""
    parser = commands.add_parser(
        "init",
        help="write an initial adapter and its factors",
        description="Calibrate, solve, and write DIR/adapter (a plain LoRA for the original model, for any trainer to "
        "continue) and DIR/init (for a recipe: method.init=DIR). A killed run continues where it was.",
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, help="folder to write").complete = shtab.DIRECTORY
    add("--variant", choices=("v1", "v2"), default="v2", help="v2: B = 0, train B alone; v1: train A and B")
    add("--rank", type=int, default=128, help="r (default 128)")
    add("--alpha", type=float, help="numerator of the scaling (default: the rank, s = 1)")
    add("--target-modules", default="all-linear", help="names separated by commas, a regex, or all-linear")
    add("--no-cache", action="store_true", help="neither use nor fill the cache of initializations")
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="hub id or local folder").complete = shtab.DIRECTORY
    add("--revision", help="hub revision")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the base")
    add("--quantization", choices=("nf4", "int8"), help="store the base's linears so (bitsandbytes)")
    add("--device", help="where layers run and are solved (default: the accelerator if there is one)")
    add("--low-memory", action="store_true", help="leave the weights in their files, read layer by layer")
    add = parser.add_argument_group("calibration").add_argument
    add("--calibration", required=True, help="hub id, local file or folder of the texts to keep").complete = shtab.FILE
    add("--split", default="train", help="split of a data set (default train); a single file is its own")
    add("--field", default="question", help="field that holds the text (default question)")
    add("--template", help="text made of a row's fields, such as 'Q: {question}'")
    add("--samples", type=int, default=256, help="number of windows (default 256)")
    add("--max-length", type=int, default=1024, help="tokens of a window, at most (default 1024)")
    add("--mode", choices=("packed", "separate"), default="packed", help="texts joined and cut, or one text a window")
    add("--seed", type=int, default=0, help="seed of what is drawn at random (default 0)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write DIR/adapter and DIR/init.

    Raises:
        UserError: a mistake in the options, the model or the calibration data, or an output folder that is in use.
    """
    if arguments.quantization and arguments.low_memory:
        raise UserError("--quantization: not with --low-memory, which reads the weights as they are")
    if (arguments.out / "adapter").exists():
        raise UserError(f"--out: {arguments.out} holds an adapter already, choose another folder")
    from accelerate import PartialState

    from lora_null.adapters.plain import save_plain_adapter
    from lora_null.initialize import InitOptions, start_adapter
    from lora_null.utils.distributed import is_first_process, together

    state = PartialState(cpu=arguments.device == "cpu")
    batches = together(lambda: _batches(arguments), what="calibration")
    peft_model, weights = together(lambda: _model(arguments), what="initialization")
    options = InitOptions(
        device=_device(arguments.device, state), weights=weights, seed=arguments.seed, cache=not arguments.no_cache
    )
    report, _ = start_adapter(peft_model, batches, options, folder=arguments.out / "init")
    if is_first_process():
        save_plain_adapter(peft_model, arguments.out / "adapter")
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
    """Return what the options say as a recipe's sections `model` and `calibration`."""
    from lora_null.recipes.config.schema import CalibrationSection, ModelSection, parse_section

    given = vars(arguments)
    model = {key: given[key] for key in ("revision", "dtype", "quantization")} | {"name_or_path": given["model"]}
    keys = ("split", "field", "template", "samples", "max_length", "mode")
    calibration = {key: given[key] for key in keys} | {"path": given["calibration"]}
    return (
        parse_section(ModelSection, "model", model),
        parse_section(CalibrationSection, "calibration", calibration),
    )


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
    return as_batches(texts, tokenizer, CalibrationArgs(calibration.samples, length, calibration.mode, arguments.seed))


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the PEFT model, and the files that its weights are still in, or None."""
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
