"""`lora-null judge`: grade MT-Bench answers in FastChat's format with a judge model."""

from __future__ import annotations

import argparse

from lora_null.eval_harness.__main__ import grade


def run(arguments: argparse.Namespace) -> int:
    """Grade a file of answers; return 0, or 1 where the endpoint fails.

    Raises:
        UserError: a file that cannot be read, or an endpoint that cannot be asked.
    """
    return grade(arguments)
