"""A hub that takes connections and never answers, as behind a firewall that holds packets: asked once, told in one line."""

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from huggingface_hub.utils import get_session
from world import make_world

from lora_null.recipes import hub
from lora_null.recipes.commands import main
from lora_null.recipes.private_names import hub_client


@pytest.fixture
def online(monkeypatch):
    """Undo what a process has found out of the hub, before the test and after it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    hub.watch_hub.cache_clear(), hub._ask.cache_clear()
    yield
    hub.watch_hub.cache_clear(), hub._ask.cache_clear()
    huggingface_hub.set_client_factory(hub_client)


@pytest.fixture
def silent(online, monkeypatch):
    """Return a socket in the hub's place, where nobody answers, soon given up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.1)
        yield listening


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a recipe of local files, with its model in the hub's cache too, as me/tiny."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    path, kept = make_world(tmp_path, method={"name": "lora", "rank": 4}), tmp_path / "hub" / "models--me--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("c0")
    shutil.copytree(tmp_path / "model", kept / "snapshots" / "c0")
    return path


NOT_THERE = "error: {0}: cannot load 'no/where'"
COMMANDS = {
    "model": ("train {0}/tiny.yaml model.name_or_path=no/where", "model.name_or_path"),
    "data": ("train {0}/tiny.yaml data.path=no/where", "data.path"),
    "new": ("new --model no/where --data {0}/numbers.jsonl --out {0}/new.yaml", "--model"),
    "init": ("init --model me/tiny --calibration no/where --rank 4 --out {0}/init", "--calibration"),
    "cached": ("train {0}/tiny.yaml model.name_or_path=me/tiny --show-samples 1", None),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_hub_that_does_not_answer_is_asked_once(silent, recipe, capsys, name):
    words, wrong = COMMANDS[name]
    assert main(words.format(recipe.parent).split()) == (2 if wrong else 0)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("the hub", "error"))]
    assert "does not answer" in told[0] and "HF_HUB_OFFLINE=1 does so without asking" in told[0]
    assert (not wrong and len(told) == 1) or NOT_THERE.format(wrong) in told[1]
    silent.accept()
    with pytest.raises(BlockingIOError):  # nobody else has come
        silent.accept()


def test_nothing_is_asked_where_nothing_lies_on_a_hub(silent, recipe):
    assert main(["train", str(recipe), "--show-samples", "1"]) == 0
    with pytest.raises(BlockingIOError):
        silent.accept()
    with ThreadPoolExecutor() as pool, pytest.raises(Exception, match="timed out"):  # as TRL's telemetry asks
        pool.submit(lambda: get_session().head(huggingface_hub.constants.ENDPOINT, timeout=0.1)).result()
    assert not hub._ask.cache_info().currsize


def test_a_hub_that_refuses_has_answered(online, monkeypatch):
    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

    with HTTPServer(("127.0.0.1", 0), Refuses) as server, ThreadPoolExecutor() as pool:
        pool.submit(server.handle_request)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub._ask()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not os.environ["HF_HUB_OFFLINE"]
