"""`lora-null check`: is this folder a sound adapter, and how is it served."""

from __future__ import annotations

import argparse

from lora_null.adapters.base_hash import FINGERPRINT, QUANTIZATION, checkpoint_on_disk
from lora_null.adapters.inspection import check_adapter, describe, is_untrained, serve_command
from lora_null.adapters.saved import read_adapter
from lora_null.adapters.truncate import MOST_LOST, lost_in_16_bits
from lora_null.recipes.trained import QUANTIZED_NOTE, base_of, check_holds_one_result
from lora_null.utils.errors import UserError


def run(arguments: argparse.Namespace) -> int:
    """Print what is wrong, or that nothing is and the command that serves it; return 1 or 0.

    Raises:
        UserError: the folder holds no adapter, or its base cannot be found.
    """
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder}: no such folder")
    check_holds_one_result(arguments.folder)
    inner = arguments.folder / "adapter"
    adapter = read_adapter(inner if inner.is_dir() else arguments.folder)
    base = base_of(adapter, arguments.base, trust=arguments.trust_remote_code)
    files = checkpoint_on_disk(base.name, base.section.revision)
    findings = check_adapter(adapter, base.empty, files)
    for finding in findings:
        print(finding)
    if findings:
        print(f"not sound: {len(findings)} finding{'s' if len(findings) > 1 else ''} in {adapter.folder}")
        return 1
    if files is None or FINGERPRINT not in adapter.metadata:
        print("note: the base could not be compared, its files or its hash are not here")
    if QUANTIZATION in adapter.metadata and getattr(base.config, "quantization_config", None) is None:
        print(f"note: {QUANTIZED_NOTE.format(adapter.metadata[QUANTIZATION])}")
    lost = max(lost_in_16_bits(A, B) for A, B in adapter.pairs().values())
    if lost > MOST_LOST:
        print(
            f"note: its factors nearly cancel: held in 16 bits, as vLLM and transformers' load_adapter do, up to {lost:.0%} of a "
            "layer's change is lost; lora-null export writes factors that lose none of it"
        )
    if is_untrained(adapter):
        print("note: not trained yet, every B is zero: served as it is, it changes nothing")
    print(f"sound: {describe(adapter)}, for {base.name}")
    own = base.section.trust_remote_code
    print(f"serve: {serve_command(adapter, base.name, base.section.revision, trust=own)}")
    return 0
