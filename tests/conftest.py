"""No test reads or writes the user's own kept evaluations."""

import pytest

from lora_null.recipes import base_cache


@pytest.fixture(autouse=True)
def own_base_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("base_evaluations")
    monkeypatch.setattr(base_cache, "folder", lambda: folder)
