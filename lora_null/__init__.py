"""LoRA-Null: start LoRA adapters in the null space of the activations that carry a model's knowledge."""

import logging
from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "recipes").is_dir() and (_checkout / "recipes" / "__init__.py").is_file():
    # Imported straight from a source checkout, where the subpackages lie beside this folder, not inside it.
    __path__.append(str(_checkout))

for _name in ("backends.cpu.ops", "autograd._functions"):
    # bitsandbytes, which PEFT imports wherever it is installed, reports a kernel that nobody asked for, and every cast.
    logging.getLogger(f"bitsandbytes.{_name}").setLevel(logging.ERROR)

from lora_null.config import LoraNullConfig  # noqa: E402
from lora_null.initialize import LayerReport, initialize_lora_null_weights  # noqa: E402
from lora_null.utils.errors import UserError  # noqa: E402

__all__ = ["LayerReport", "LoraNullConfig", "UserError", "initialize_lora_null_weights"]
