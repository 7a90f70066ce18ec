"""Kills, preemption, full disks and second runs: nothing half-written is taken, nothing whole is lost."""

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from engine_worlds import world
from filelock import FileLock
from kill_harness import harness, outcome, run
from safetensors import SafetensorError
from transformers import TrainerControl
from world import make_world

from lora_null.recipes import run as recipes_run
from lora_null.recipes.__main__ import main
from lora_null.recipes.callbacks import SaveOnSignal, WriteLog
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.output import check_output_folder
from lora_null.recipes.results import Row, write_row
from lora_null.trainer.checkpoints import BEGUN_FILE, is_whole, last_checkpoint, mark_complete, remove_old
from lora_null.utils.errors import UserError
from lora_null.utils.files import LOCK_FILE, locked, replacing, replacing_folder
from lora_null.utils.startup import exit_status


def test_killed_runs_end_as_an_unbroken_one(tmp_path):
    recipe = make_world(tmp_path, method={"name": "roselora,lora-null-v1", "rank": 4})
    found = harness(recipe, tmp_path, kills=6, seed=1)
    assert len(found["points"]) == 6 and all(point["status"] == -signal.SIGKILL for point in found["points"])
    assert set(found["ends"]) == {"equal"}, found


def test_the_harness_sees_a_difference(tmp_path):
    recipe = make_world(tmp_path, method={"name": "lora", "rank": 4})
    assert run(recipe, tmp_path / "one") == run(recipe, tmp_path / "two", "seed=1") == 0
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one.keys() == two.keys() and not set(one.values()) & set(two.values())


def end_before_training(words):
    recipes_run.evaluate_base = lambda job: os.kill(os.getpid(), signal.SIGTERM)
    return main(words)


def test_sigterm_outside_training_ends_at_once(tmp_path):
    recipe, said = make_world(tmp_path, method={"name": "lora", "rank": 4}), tmp_path / "said.txt"
    assert world(1, [str(recipe)], said, run=end_before_training) == [143]
    assert "Traceback" not in said.read_text()


def drop_a_sigterm(words):
    """What the handler raises in a callback of a weak reference, Python drops."""

    def evaluate_base(job):
        referred = set()
        reference = weakref.ref(referred, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del referred
        assert reference() is None
        time.sleep(20)

    recipes_run.evaluate_base = evaluate_base
    return main(words)


def test_a_sigterm_that_python_drops_is_sent_again(tmp_path):
    recipe, said = make_world(tmp_path, method={"name": "lora", "rank": 4}), tmp_path / "said.txt"
    assert world(1, [str(recipe)], said, run=drop_a_sigterm) == [143]
    assert "Traceback" not in said.read_text() and "Exception ignored" not in said.read_text()


def test_a_training_that_begins_twice_gives_the_signals_back():
    """As `auto_find_batch_size` makes it, whose first attempt has no end."""
    before = [signal.getsignal(number) for number in SaveOnSignal.SIGNALS]
    callback, state = SaveOnSignal(), SimpleNamespace(global_step=1, is_world_process_zero=True)
    for _ in range(2):
        callback.on_train_begin(None, state, None)
    assert signal.getsignal(signal.SIGTERM) == callback._remember
    callback.on_train_end(None, state, None)
    assert [signal.getsignal(number) for number in SaveOnSignal.SIGNALS] == before


def test_a_signal_ends_a_saved_step_before_others_take_it_for_the_last():
    callback, state, control = (
        SaveOnSignal(),
        SimpleNamespace(global_step=1, is_world_process_zero=False),
        TrainerControl(),
    )
    callback.asked = signal.SIGTERM
    callback.on_epoch_end(None, state, control)  # it came after the step: nothing is saved yet
    callback.on_step_end(None, state, control)
    assert control.should_save and control.should_training_stop
    with pytest.raises(SystemExit) as ended:
        callback.on_epoch_end(None, state, control)
    assert ended.value.code == 143


def test_a_signal_during_the_exchange_is_kept_for_the_next_step(monkeypatch):
    """Python's handler runs when the exchange returns, whose result does not know of it yet."""
    callback, control = SaveOnSignal(), TrainerControl()
    callback.group = object()
    arrives = iter([signal.SIGTERM])

    def exchange(asked, *_, group):
        for number in arrives:
            callback._remember(number, None)

    monkeypatch.setattr("torch.distributed.all_reduce", exchange)
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    callback.on_step_end(None, state, control)
    assert not control.should_training_stop  # the other processes do not know of it
    callback.on_step_end(None, state, control)
    assert control.should_save and control.should_training_stop


def test_a_signal_after_the_last_step_is_not_said_to_have_saved_it(capsys):
    callback, state = SaveOnSignal(), SimpleNamespace(global_step=1, is_world_process_zero=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        callback.on_train_begin(None, state, None)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            callback.on_train_end(None, state, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "--resume" not in capsys.readouterr().err


LAUNCHES = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"  # as accelerate does
LAUNCHED = """
import os, signal, sys, time
from lora_null.utils.startup import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
end_with_launcher()
{}
print(os.getpid(), flush=True)
time.sleep(20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(
    ("name", "after", "variables", "told"),
    [
        ("accelerate", "", {}, True),
        ("accelerate", "end_with_launcher(0)", {}, False),  # after Ctrl-C
        ("accelerate", "", {"LOCAL_RANK": "0"}, False),  # which its launcher tells itself
        ("start_many.py", "", {}, False),
    ],
)
def test_one_process_hears_that_accelerate_launch_was_ended(tmp_path, name, after, variables, told):
    (tmp_path / name).write_text(LAUNCHES)
    own = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    launcher = subprocess.Popen(
        [sys.executable, str(tmp_path / name), LAUNCHED.replace("{}", after)],
        env=own | {"ACCELERATE_MIXED_PRECISION": "no", **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(launcher.stdout.readline())
    launcher.terminate()
    launcher.wait()
    if told:
        assert launcher.stdout.readline() == "told\n"
    else:
        assert not select.select([launcher.stdout], [], [], 0.2)[0]
    os.kill(child, signal.SIGKILL)


def make_checkpoint(folder, step, size=100):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(bytes(size))
    mark_complete(path)
    return path


def test_the_last_whole_checkpoint_is_taken(tmp_path):
    for step in (2, 10, 9):
        make_checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    with open(tmp_path / "checkpoint-10" / "optimizer.pt", "r+b") as file:
        file.truncate(50)
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
    (tmp_path / "checkpoint-9" / "complete.json").unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "complete.json").write_text('{"optimizer.pt":')
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None


def test_old_checkpoints_go_by_their_number_when_the_clock_went_backwards(tmp_path):
    for step in (1, 2, 3):
        path = make_checkpoint(tmp_path, step)
        os.utime(path, (1e9 - step, 1e9 - step))
    (tmp_path / "checkpoint-4").mkdir()  # half-written
    make_checkpoint(tmp_path, 5)
    (tmp_path / "checkpoint-5" / "complete.json").unlink()
    (tmp_path / "checkpoint-5" / BEGUN_FILE).write_text("{}")
    remove_old(tmp_path / "checkpoint-3", keep=2, best=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert is_whole(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "keep, best, left", [(1, None, [2]), (2, None, [1, 2]), (3, None, [1, 2, 9]), (1, 9, [2, 9]), (2, 8, [2, 8])]
)
def test_later_steps_of_an_earlier_run_go_before_what_this_one_has_written(tmp_path, monkeypatch, keep, best, left):
    for step in (8, 9, 1, 2):
        newest = make_checkpoint(tmp_path, step)
    monkeypatch.chdir(tmp_path)
    remove_old(newest, keep=keep, best=best and f"checkpoint-{best}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in left]


def test_checkpoints_of_another_trainer_are_left(tmp_path):
    """Which do not say whether they are whole: a folder that a plain trainer wrote before is not emptied."""
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-1" / "complete.json").unlink()
    remove_old(tmp_path / "checkpoint-2", keep=None, best=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert run(make_world(folder, method={"name": "lora-null-v1", "rank": 4}), folder / "out") == 0
    return folder


def unfinished(finished, folder):
    """Copy a run that has trained and saved its checkpoints but written no result."""
    shutil.copytree(finished / "out", folder / "run" / "out")
    method = folder / "run" / "out" / "lora-null-v1"
    for path in (method / "row.json", method / "eval.json", *(folder / "run" / "out").glob("re*.*")):
        if path.name != "recipe.yaml":
            path.unlink()
    return folder / "run", method


def resume(folder, finished):
    return run(finished / "tiny.yaml", folder / "out", "--resume")


def test_a_run_killed_after_its_last_step_takes_no_other(finished, tmp_path):
    """With a constant learning rate: the trainer alone would take a fifth step of the full size."""
    recipe = make_world(tmp_path, method={"name": "lora-null-v1", "rank": 4})
    constant = "training.lr_scheduler_type=constant"
    assert run(recipe, tmp_path / "out", constant) == 0
    folder, _ = unfinished(tmp_path, tmp_path / "copy")
    assert run(recipe, folder / "out", "--resume", constant) == 0
    assert outcome(folder / "out") == outcome(tmp_path / "out")


@pytest.mark.parametrize("damage", ["no seal", "cut short", "half a log line", "stale part files", "no checkpoint"])
def test_damage_costs_steps_and_nothing_else(finished, tmp_path, damage):
    folder, method = unfinished(finished, tmp_path)
    if damage == "no seal":
        (method / "checkpoint-4" / "complete.json").unlink()
    elif damage == "cut short":
        os.truncate(method / "checkpoint-4" / "optimizer.pt", 10)
    elif damage == "half a log line":
        with open(method / "train_log.jsonl", "a") as file:
            file.write('{"step": 4, "lo')
    elif damage == "stale part files":
        for place in (folder / "out", method, method / "adapter"):
            (place / ".recipe.yaml.123.part").write_text("half")
    else:
        for path in method.glob("checkpoint-*"):
            shutil.rmtree(path)
    assert resume(folder, finished) == 0
    assert outcome(folder / "out") == outcome(finished / "out")
    assert not list((folder / "out").rglob("*.part"))
    assert [json.loads(line)["step"] for line in (method / "train_log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_finished_run_that_has_lost_something_is_none(finished, tmp_path, capsys):
    out, recipe = tmp_path / "out", load_recipe(str(finished / "tiny.yaml"), output_dir=str(tmp_path / "out"))
    shutil.copytree(finished / "out", out)
    for lost in ("adapter", "adapter/adapter_model.safetensors", "eval.json", "../results.json"):
        (out / "lora-null-v1" / lost).rename(tmp_path / "lost")
        with pytest.raises(UserError, match="holds an unfinished run; --resume continues it"):
            check_output_folder(recipe, resume=False, overwrite=False)
        (tmp_path / "lost").rename(out / "lora-null-v1" / lost)
    with pytest.raises(UserError, match="holds a finished run"):
        check_output_folder(recipe, resume=True, overwrite=False)
    (out / "lora-null-v1" / "adapter" / "adapter_model.safetensors").unlink()
    assert main([str(out / "recipe.yaml"), "--resume"]) == 0
    assert "lora-null-v1: was finished and its adapter or model is gone; the method goes" in capsys.readouterr().err
    assert outcome(out) == outcome(finished / "out")


def test_two_runs_never_write_one_folder(tmp_path, capsys):
    recipe = make_world(tmp_path, method={"name": "lora", "rank": 4})
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert main([str(recipe)]) == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_folder_was_removed_ends_and_leaves_the_next_one_alone(tmp_path, replaced):
    """The lock goes with the folder, so that another run may have begun in a new one of its name."""
    folder = tmp_path / "run"

    def log():
        WriteLog(folder / "lora" / "train_log.jsonl", ()).on_log(None, state, None, logs={"loss": 1.0})

    def row():
        write_row(folder / "lora", Row(method="lora"))

    def adapter():
        with replacing_folder(folder / "lora" / "adapter"):
            pass

    def read():
        (folder / "recipe.yaml").read_text()

    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    for write in (log, row, adapter, *([] if replaced else [read])):
        (folder / "lora").mkdir(parents=True)
        with pytest.raises(UserError, match="was removed or replaced"), locked(folder):
            row()
            shutil.rmtree(folder)
            if replaced:
                (folder / "lora").mkdir(parents=True)
                FileLock(folder / LOCK_FILE).acquire().lock.release()
            write()
        assert not replaced or not list((folder / "lora").iterdir())
        shutil.rmtree(folder, ignore_errors=True)


def on_a_full_disk(words):
    save = torch.save

    def full(value, path, *rest, **options):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        return save(value, path, *rest, **options)

    torch.save = full
    return main(words)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    recipe, said = make_world(tmp_path, method={"name": "lora", "rank": 4}), tmp_path / "said.txt"
    status = world(1, [str(recipe)], said, run=on_a_full_disk)
    told = [line for line in said.read_text().splitlines() if line.startswith("error: no space left on the disk")]
    assert status == [1] and len(told) == 1, said.read_text()[-2000:]
    assert "Traceback" not in said.read_text()
    assert last_checkpoint(tmp_path / "out" / "lora").name == "checkpoint-2"


def test_a_full_disk_is_known_in_every_wrapping(capsys, tmp_path):
    def torch_says():
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    def wrapped():
        raise RuntimeError("cannot write") from OSError(errno.EDQUOT, "full")

    def safetensors_says():
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")

    def a_quota_says():
        raise OSError(errno.EFBIG, "File too large")

    def a_write_says(error):
        with replacing(tmp_path / "cache" / "file"):
            raise error

    def an_adapter_says(error):
        with replacing_folder(tmp_path / "run" / "adapter"):
            raise error

    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")):
        assert exit_status(lambda error=error: a_write_says(error)) == 1
        assert f"error: no space left on the disk of {tmp_path / 'cache'};" in capsys.readouterr().err
        assert exit_status(lambda error=error: an_adapter_says(type(error)(*error.args))) == 1
        assert f"error: no space left on the disk of {tmp_path / 'run'};" in capsys.readouterr().err
    assert exit_status(a_quota_says) == 1
    assert "error: a file is larger than the system lets one be (ulimit -f)" in capsys.readouterr().err
    assert exit_status(torch_says) == exit_status(safetensors_says) == exit_status(wrapped) == 1
    with pytest.raises(RuntimeError, match="a fault of ours"):
        exit_status(lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    said = capsys.readouterr().err
    assert (
        said.count("error: no space left") == 2 and said.count("error: a file could not be written, as on a full") == 1
    )


def test_no_pickle_of_a_checkpoint_is_run(finished, tmp_path):
    """Resuming reads optimizer and random state with weights_only: a planted pickle is refused, not executed."""
    folder, method = unfinished(finished, tmp_path)

    class Planted:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    shutil.rmtree(method / "checkpoint-4")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Planted(), method / "checkpoint-2" / name)
    mark_complete(method / "checkpoint-2")
    assert resume(folder, finished) != 0
    assert not (tmp_path / "executed").exists()
