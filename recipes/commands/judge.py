"""`lora-null judge`: grade MT-Bench answers in FastChat's format with a judge model."""

from lora_null.eval_harness.__main__ import grade as run

__all__ = ["run"]
