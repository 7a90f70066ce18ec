"""`training.report_to`: what a tracker is told, and one run of it for each method."""

from types import SimpleNamespace

import pytest
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from world import make_world

from lora_null.recipes.__main__ import main
from lora_null.recipes.callbacks import Trackers
from lora_null.recipes.processes import bars


@pytest.fixture
def told(monkeypatch):
    """Stand in for TensorBoard; return what each run of it was called, was told, and whether it was ended."""
    runs = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            runs.append({"name": args.run_name, "logs": [], "ended": 0})

        def on_log(self, args, state, control, logs=None, **_):
            assert not runs[-1]["ended"]
            runs[-1]["logs"].append(logs)

        def on_train_end(self, args, state, control, **_):
            runs[-1]["ended"] += 1

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    return runs


def test_drift_and_the_table_are_logged_and_each_method_has_its_run(told, tmp_path):
    recipe = make_world(tmp_path)
    assert main([str(recipe), "--method", "lora,lora-null-v2", "training.report_to=tensorboard"]) == 0
    assert [run["name"] for run in told] == ["tiny lora", "tiny lora-null-v2"]
    for run in told:
        steps, last = [log for log in run["logs"] if "loss" in log], run["logs"][-1]
        assert len(steps) == 4 and all("drift_mean" in log for log in steps) and run["ended"] == 1
        assert {"eval_facts kl", "eval_base facts nll", "eval_numbers nll", "eval_drift_mean"} <= last.keys()
        assert last["eval_base facts kl"] == 0 < last["eval_facts kl"]


def test_a_grid_names_its_runs_by_their_settings_and_shows_no_bars_where_none_are_wanted(told, tmp_path, capsys):
    words = ["--method", "lora", "--seeds", "0,1", "training.report_to=tensorboard", "training.run_name=mine"]
    assert main([str(make_world(tmp_path)), *words, "training.disable_tqdm=true"]) == 0
    assert [run["name"] for run in told] == ["mine lora seed=0", "mine lora seed=1"]
    assert "%|" not in capsys.readouterr().err


def test_a_folder_for_all_of_tensorboard_has_one_for_each_run():
    board = object.__new__(integration_utils.TensorBoardCallback)  # which asks whether TensorBoard is installed
    board.logging_dir = "boards"
    args = SimpleNamespace(report_to=["tensorboard"], run_name="tiny lora")
    Trackers(SimpleNamespace(args=args, callback_handler=SimpleNamespace(callbacks=[board])))
    assert board.logging_dir == "boards/tiny lora"


def test_a_log_has_few_states_of_a_bar(capsys):
    with bars(hidden=False):
        for _ in tqdm(range(100), miniters=1, mininterval=0):
            pass
    assert capsys.readouterr().err.count("%|") == 2  # the first and the last
