"""A tiny random Llama with a tiny character-level tokenizer, and small local files of documents."""

import json

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer


def tiny_peft_model(seed: int = 0):
    model = get_peft_model(tiny_model(seed), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture
def peft_model():
    return tiny_peft_model()


@pytest.fixture
def pairs():
    """Prompts and answers of different lengths, one of them sharing a token with its prompt."""
    return [(f"Q: {'why ' * i}?\nA:", f" {'because ' * (i % 3)}{i}") for i in range(1, 8)]


def writer(folder):
    """Return a function that writes rows as a jsonl file of the folder and returns its path."""

    def write_rows(name, rows):
        path = folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


@pytest.fixture(scope="session")
def write_once(tmp_path_factory):
    """As `write`, for files that several tests read."""
    return writer(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def nq_file(write_once):
    return write_once("nq.jsonl", [{"question": f"who is number {i}", "answer": [f"n{i}", f"m{i}"]} for i in range(7)])


@pytest.fixture(scope="session")
def sciq_file(write_once):
    rows = [
        {"question": f"what is {i}", "support": f"it is {i * i}", "correct_answer": f"{'c' * (i % 4)}{i}"}
        | {f"distractor{k}": f"{'d' * k}{i}" for k in (1, 2, 3)}
        for i in range(9)
    ]
    return write_once("sciq.jsonl", rows)


@pytest.fixture(scope="session")
def lambada_file(write_once):
    return write_once(
        "lambada.jsonl", [{"text": f"a short text {i} ends in word{i}", "domain": None} for i in range(6)]
    )


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with the tiny model and its tokenizer in `model`, and a nonzero adapter in `adapter`."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(max_position_embeddings=2048).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_peft_model().save_pretrained(folder / "adapter")
    return folder
