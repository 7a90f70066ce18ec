"""Whether the hub answers, asked once: its libraries ask for each file again and again, for minutes where nobody answers."""

from __future__ import annotations

import functools
import logging
import os
import threading
from typing import Any

import datasets
from huggingface_hub import constants, set_client_factory

from lora_null.recipes.private_names import hub_client
from lora_null.utils.errors import first_line
from lora_null.utils.startup import launched_index

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  # that the hub may take to connect, and again to answer


@functools.cache
def watch_hub() -> None:
    """Let the first request to the hub, if one is made, wait until it is known whether the hub answers.

    If not, a line says so, and this process takes only what is cached from then on; that request too fails at once. Where
    HF_HUB_OFFLINE is set, to 0 or 1, nothing is asked.
    """
    if not (os.environ.get("HF_HUB_OFFLINE") or constants.is_offline_mode()):
        set_client_factory(_watched_client)


def _watched_client() -> Any:
    def ask_first(_: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # not in TRL's telemetry, which has one of its own
            _ask()

    client = hub_client()
    client.event_hooks["request"].insert(0, ask_first)
    return client


@functools.cache
def _ask() -> None:
    try:
        with hub_client() as client:
            client.head(constants.ENDPOINT, timeout=ANSWER_SECONDS, follow_redirects=False)
    except Exception as error:  # of httpx or httpx2
        os.environ["HF_HUB_OFFLINE"] = "1"  # which PEFT reads each time; the other two have read it
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        if launched_index() == 0:
            logger.warning(
                f"the hub {constants.ENDPOINT} does not answer ({first_line(error)}): only what is cached is taken; "
                "HF_HUB_OFFLINE=1 does so without asking"
            )
