"""One process of test_process_mistakes.py: what each case ends in, as JSON."""

import contextlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from accelerate import PartialState
from peft import get_peft_model
from tiny import random_batches, tiny_model

import lora_null.start
from lora_null import LoraNullConfig, UserError
from lora_null.calibration import measure_inputs
from lora_null.eval_harness import Evaluation
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.recipes import caches, measure, output
from lora_null.trainer.methods.from_peft import EVA
from lora_null.utils.distributed import all_gather, on_first_process, together
from lora_null.utils.files import write_text

BATCHES = random_batches(count=4)
INDEX = int(os.environ["RANK"])


def poisoned(batch):
    """A token in one batch whose embedding is NaN: the process that runs this batch meets it, the other does not."""
    model = tiny_model()
    model.model.embed_tokens.weight.data[77] = float("nan")
    ids = [b["input_ids"].masked_fill(b["input_ids"] == 77, 5) for b in BATCHES]
    ids[batch][2, 0] = 77
    return model, [{**b, "input_ids": i} for b, i in zip(BATCHES, ids)]


def start(model=None, batches=BATCHES, folder=None, config=None, **options):
    peft_model = get_peft_model(model or tiny_model(), LoraNullConfig(**{"r": 4, **(config or {})}))
    start_adapter(peft_model, batches, InitOptions(min_tokens=1, progress=False, **options), folder=folder)


def only_on(index, act):
    if index == INDEX:
        act()


def refuse(*_, **__):
    raise UserError("a mistake of one process")


@contextlib.contextmanager
def broken(place, name, index):
    """Let a function of a module refuse on one process."""
    plain = getattr(place, name)
    if index == INDEX:
        setattr(place, name, refuse)
    try:
        yield
    finally:
        setattr(place, name, plain)


def dense(form):
    model, batches = poisoned(1)  # of process 1
    start(model, batches, form=form)


def drift_only():
    model, batches = poisoned(3)
    peft_model = get_peft_model(model, LoraNullConfig(r=4))
    measure_inputs(peft_model, adapted_layers(peft_model), batches, progress=False)


def while_solving(index):
    from lora_null import solver as solving

    with broken(solving, "null_factors", index):
        start(folder=None)


def damaged(folder):
    place = folder / "damaged"
    if INDEX == 0:
        start_alone = place / "factors.model.layers.0.safetensors"
        start_alone.parent.mkdir()
        start_alone.write_bytes(b"no tensors")
        (place / "layers.json").write_text("{")
    start(folder=place)


def cannot_write(folder):
    with broken(lora_null.start, "write_json", 0):
        start(folder=folder / "finish")


def zero_on_one():
    model = tiny_model()
    if INDEX == 1:
        model.model.layers[0].mlp.up_proj.weight.data.zero_()
    start(model)


def kept_base(folder):
    """A base that an earlier run evaluated: the first process fetches it before the other one looks."""
    caches.bases_folder = lambda: folder / "kept"
    target = folder / "base"
    only_on(0, lambda: write_text(folder / "kept" / "key" / "eval.json", Evaluation({}, {}, 0.0).to_json()))
    end = time.monotonic() + 20
    while INDEX == 1 and not (target / "eval.json").is_file() and time.monotonic() < end:
        time.sleep(0.01)
    measure._find_or_measure(target, [], "key", refuse)


def two_folders(folder):
    """One path that names another folder on each machine, in which an earlier attempt has left a recipe."""
    with contextlib.chdir(folder), broken(output, "claim", None):
        os.makedirs(here := f"machine{INDEX}/out")
        os.chdir(Path(here).parent)
        write_text(Path("out", "recipe.yaml"), "")
        output.claim, output.SHARED_SECONDS = lambda *_, **__: None, 0.5
        recipe = SimpleNamespace(output_dir="out", calibration=SimpleNamespace(cache=True))
        with output.hold_output_folder(recipe, 0, dict, resume=False, overwrite=False):
            pass


def eva():
    """Two bases that differ: both take what the first process deals out."""
    args = SimpleNamespace(disable_tqdm=True)
    config = EVA().config(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    trainer = SimpleNamespace(model=get_peft_model(tiny_model(seed=INDEX), config), args=args)
    found = EVA().compute(trainer, [{**b, "labels": b["input_ids"]} for b in BATCHES])
    mine, other = all_gather({name: tensor.tolist() for name, tensor in found.items()})
    assert mine and mine == other


CASES = {
    "NaN, layers": lambda folder: dense("layers"),
    "NaN, hooks": lambda folder: dense("hooks"),
    "NaN, drift": lambda folder: drift_only(),
    "rank": lambda folder: start(config={"r": 4 if INDEX == 0 else 33}),
    "too few tokens": lambda folder: start(batches=BATCHES if INDEX == 0 else []),
    "other texts": lambda folder: start(batches=BATCHES if INDEX == 0 else BATCHES[::-1]),
    "other seed": lambda folder: start(seed=INDEX),
    "other base": lambda folder: start(tiny_model(seed=INDEX)),
    "zero weight": lambda folder: zero_on_one(),
    "solving on 0": lambda folder: while_solving(0),
    "solving on 1": lambda folder: while_solving(1),
    "damaged": damaged,
    "writing": cannot_write,
    "data": lambda folder: together(lambda: only_on(1, refuse)),
    "two folders": two_folders,
    "first": lambda folder: on_first_process(refuse),
    "none": lambda folder: start(folder=folder / "fine"),
    "kept base": kept_base,
    "EVA": lambda folder: eva(),
}


def main(folder: Path) -> None:
    PartialState(cpu=True)  # as the command joins its processes
    told = {}
    for name, act in CASES.items():
        try:
            act(folder)
            told[name] = None
        except Exception as error:
            told[name] = f"{'UserError' if isinstance(error, UserError) else type(error).__name__}: {error}"
        dist.barrier()  # nobody is left behind in another collective
    (folder / f"told-{INDEX}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
