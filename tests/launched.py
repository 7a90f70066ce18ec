"""What `accelerate launch --config_file` makes of a shipped configuration."""

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import lora_null.recipes.config.load as load

CONFIGURATIONS = load.RECIPES / "accelerate"


def arguments_of(name: str):
    """Return the launcher's arguments with the configuration's values laid in by accelerate itself."""
    words = ["--config_file", str(CONFIGURATIONS / f"{name}.yaml"), "-m", "lora_null.recipes", "math"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def environment_of(name: str) -> dict[str, str]:
    """Return what the launched processes find in their environment of the engine."""
    arguments = arguments_of(name)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        found = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        found = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
