"""Peak memory of each process that initializes and trains a model together with others (FSDP2): nobody holds it whole.

    python tests/benchmarks/shards.py               # a random Llama of 2 GB, four processes over gloo
    python tests/benchmarks/shards.py --layers 8    # of 239 MB

v1 is initialized on few tokens and trained for two steps, once with the weights in their files until they are sharded,
and once with a model that every process loads whole, which takes the first one's initialization from the cache. Memory
above what the process held when everything was imported is polled: its own (anonymous pages, RssAnon), and what it maps of
files (RssFile), which the kernel may take back. "start" ends with the factors, "read" when each process has its shards.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import datasets
import torch
from engine_worlds import world
from memory import RssPeak
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig

from lora_null import LoraNullConfig
from lora_null.initialize import InitOptions
from lora_null.trainer import LoraNullSFTTrainer

# The layers of large models are larger than 32 MB, of which glibc gives every freed block back; of these smaller ones too.
MMAP_THRESHOLD = 4 << 20
# width, inner, vocabulary, rank, calibration windows, their length
FULL, QUICK = (1024, 1024, 512, 8, 17, 64), (32, 48, 101, 4, 4, 16)
WAYS = ("files", "whole")
PHASES = ("start", "read", "step")


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=70, help="of 29 MB")
    options = parser.parse_args()
    count = 2 if options.quick else options.processes
    shape = (2, *QUICK) if options.quick else (options.layers, *FULL)
    facts = common.machine(torch.device("cpu"))
    print(common.headline(facts))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD)  # read when a process starts
    with tempfile.TemporaryDirectory() as name:
        sizes = _write(Path(name), shape)
        os.environ["LORA_NULL_CACHE"] = f"{name}/cache"
        runs = {way: _run(Path(name), way, count) for way in WAYS}
    _print(sizes, runs, count)
    common.write_json(options.out / "shards.json", {"machine": facts, "sizes": sizes, "runs": runs})


def _write(folder: Path, shape: tuple[int, ...]) -> dict[str, int]:
    layers, width, inner, words, rank, *_ = shape
    config = LlamaConfig(vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=width // 16, num_key_value_heads=width // 16)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    (folder / "shape.json").write_text(json.dumps(shape))
    layer = model.model.layers[0]
    factors = sum(rank * sum(p.shape) for n, p in layer.named_parameters() if n.endswith("proj.weight"))
    return {
        "model": sum(p.nbytes for p in model.parameters()),
        "layer": sum(p.nbytes for p in layer.parameters()),
        "factors": 4 * layers * factors,
    }


def _run(folder: Path, way: str, count: int) -> list[dict[str, Any]]:
    common.note(f"{count} processes, {way}")
    found = world(count, [str(folder), way], folder / f"{way}.txt", "fsdp2", train, seconds=3600)
    if any(found):
        raise SystemExit(f"{(folder / f'{way}.txt').read_text()[-4000:]}\nexit statuses: {found}")
    return [json.loads((folder / f"{way}-{index}.json").read_text()) for index in range(count)]


class _Phases(RssPeak, TrainerCallback):
    """The most memory of each phase above the floor; a trainer tells when it has read its shards."""

    phase, seconds = PHASES[0], 0.01

    def __enter__(self) -> _Phases:
        self.by_phase: dict[str, tuple[int, ...]] = {}
        super().__enter__()
        return self

    def _look(self) -> None:
        above = tuple(now - before for now, before in zip(self.now(), self.before))
        self.by_phase[self.phase] = tuple(map(max, self.by_phase.get(self.phase, above), above))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.phase = "step"


class _Trainer(LoraNullSFTTrainer):
    peak: _Phases

    def _prepare(self, **options: Any) -> None:
        super()._prepare(**options)
        self.peak.phase = "read"


def train(words: list[str]) -> int:
    """Initialize and train in one of the processes; write its peaks."""
    try:
        _train(Path(words[0]), words[1])
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _train(folder: Path, way: str) -> None:
    *_, vocabulary, rank, windows, length = json.loads((folder / "shape.json").read_text())
    ids = torch.randint(4, vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    arguments = SFTConfig(
        output_dir=str(folder / way), max_steps=2, per_device_train_batch_size=1, bf16=False, save_strategy="no",
        gradient_checkpointing=False, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    with _Phases() as peak:
        name = str(folder / "model")
        trainer = _Trainer(
            model=name if way == "files" else AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids[:, :16].tolist() * 2}),
            processing_class=tiny_tokenizer(),
            peft_config=LoraNullConfig(r=rank, variant="v1"),
            calibration_dataset=batches,
            init_options=InitOptions(min_tokens=1, progress=False, cache=True),
            preflight="off",
        )
        trainer.add_callback(peak)  # after the one that reads the shards
        trainer.peak = peak
        trainer.train()
    (folder / f"{way}-{os.environ['RANK']}.json").write_text(json.dumps(peak.by_phase))


def _print(sizes: dict[str, int], runs: dict[str, list[dict[str, Any]]], count: int) -> None:
    told = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    bound = sizes["model"] / count + sizes["layer"]
    print(f"{told}; model / {count} + a layer: {bound / 1e6:.0f} MB")
    head = ("weights", "process", *(f"{phase}: {kind}" for phase in PHASES for kind in ("own MB", "mapped MB")))
    rows = [
        [way, index, *(f"{size / 1e6:.0f}" for phase in PHASES for size in found[phase])]
        for way, processes in runs.items()
        for index, found in enumerate(processes)
    ]
    common.print_table("peak memory of each process above its floor", head, rows)


if __name__ == "__main__":
    main()
