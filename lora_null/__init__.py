"""LoRA-Null: start LoRA adapters in the null space of the activations that carry a model's knowledge.

The names below are imported when they are first asked for, so that a command's --help does not wait for PyTorch.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_null.config import LoraNullConfig
    from lora_null.initialize import LayerReport, initialize_lora_null_weights
    from lora_null.layer import keep_in_null_basis
    from lora_null.utils.errors import UserError

__all__ = ["LayerReport", "LoraNullConfig", "UserError", "initialize_lora_null_weights", "keep_in_null_basis"]
__version__ = "0.1.0"

_HOME = {"LoraNullConfig": "config", "LayerReport": "initialize", "initialize_lora_null_weights": "initialize"}
_HOME |= {"UserError": "utils.errors", "keep_in_null_basis": "layer"}

_folder = Path(__file__).parent
if (_folder / "recipes").is_file():  # a checkout whose links were not made (Windows): the folders lie beside this one
    __path__.append(str(_folder.resolve().parent))

for _name in ("backends.cpu.ops", "autograd._functions"):
    # bitsandbytes, which PEFT imports wherever it is installed, reports a kernel that nobody asked for, and every cast.
    logging.getLogger(f"bitsandbytes.{_name}").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
