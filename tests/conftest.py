"""Tests keep their own cache, so that they never read or push out what the user's cache holds."""

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers that take all cores, and spin there while
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # they wait, stand in each other's way
    gc.disable()  # until all tests are collected: imports make many objects, which stay

import pytest

from lora_null.utils.distributed import print_once
from lora_null.utils.files import cache_root
from lora_null.utils.startup import show_messages


def pytest_collection_finish():
    """Leave what imports have made out of garbage collections: every run makes several, of half a second each.

    And write no bytecode of what tests import: a file that is edited within a second would be taken for the one before.
    """
    sys.dont_write_bytecode = True
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def first_time():
    """What a process says once is said in every test."""
    print_once.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def no_power_cut():
    """What tests write need not outlive the machine: nothing waits until it is on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    show_messages()
    real, own = cache_root(), tmp_path_factory.mktemp("cache")
    for weights in real.glob("SmolLM2*"):
        (own / weights.name).symlink_to(weights)
    before = os.environ.get("LORA_NULL_CACHE")
    os.environ["LORA_NULL_CACHE"] = str(own)
    yield
    if before is None:
        del os.environ["LORA_NULL_CACHE"]
    else:
        os.environ["LORA_NULL_CACHE"] = before
