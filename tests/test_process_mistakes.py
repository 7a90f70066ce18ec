"""A mistake found on any process of several ends all of them in the same line, and none waits for one that is gone."""

import json
from pathlib import Path

import pytest
from engine_worlds import world

SAME = {
    "NaN, layers": "sample 3 of batch 2 gives NaN or infinite inputs at model.layers.0.self_attn.q_proj",
    "NaN, hooks": "sample 3 of batch 2 gives NaN or infinite inputs at model.layers.0",
    "NaN, drift": "sample 3 of batch 4 gives NaN or infinite inputs at model.layers.0",
    "rank": "r: 33 is larger than model.layers.0.self_attn.q_proj allows",
    "too few tokens": "there is no batch to measure",
    "other texts": "adapter, calibration batches or settings differ between the processes",
    "other seed": "adapter, calibration batches or settings differ between the processes",
    "other base": "the base weights differ between the processes",
    "zero weight": "the weight of model.layers.0.mlp.up_proj is zero",
    "solving on 0": "a mistake of one process",
    "solving on 1": "a mistake of one process",
    "damaged": "layers.json: damaged, not valid JSON",
    "writing": "a mistake of one process",
    "data": "a mistake of one process",
    "two folders": "out is not one folder for all processes",
    "first": "a mistake of one process",
}


def tell(words):
    import process_mistakes  # which asks for its index as it is imported

    process_mistakes.main(Path(words[0]))
    return 0


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    ended = world(2, [str(folder)], folder / "said.txt", run=tell)
    assert ended == [0, 0], (folder / "said.txt").read_text()[-3000:]
    return [json.loads((folder / f"told-{index}.json").read_text()) for index in (0, 1)]


@pytest.mark.parametrize("case", SAME)
def test_every_process_ends_in_the_same_line(told, case):
    assert told[0][case] == told[1][case]
    assert told[0][case].startswith("UserError: ") and SAME[case] in told[0][case]
    assert "\n" not in told[0][case]


def test_without_a_mistake_all_finish(told):
    assert told[0]["none"] is told[1]["none"] is None


@pytest.mark.parametrize("case", ["kept base", "EVA"])
def test_what_one_process_has_is_what_every_one_takes(told, case):
    assert told[0][case] is told[1][case] is None
