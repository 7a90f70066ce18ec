"""Two processes share the work and report what one process reports."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import two_processes
from engine_worlds import world
from safetensors.torch import load_file

from lora_null.eval_harness import Evaluation


@pytest.fixture
def folder(saved, tmp_path, pairs, nq_file, sciq_file, write):
    asked = {
        "task_id": "t",
        "entry_point": "one",
        "canonical_solution": "",
        "test": "def check(f):\n    assert f() == 1",
    }
    write("code.jsonl", [asked | {"prompt": f"def one():\n    return {i}  #"} for i in (1, 2)])
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    for path in (saved / "model", saved / "adapter", Path(nq_file), Path(sciq_file)):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_two_processes_equal_one_and_compute_each_request_once(folder, pairs):
    for count in (1, 2):
        ended = world(count, [str(folder)], folder / "said.txt", run=two_processes.main)
        errors = [(folder / f"said-{index}.txt").read_text() for index in range(count)]
        assert ended == [0] * count, errors
    one = json.loads((folder / "process0-of-1.json").read_text())
    two = [json.loads((folder / f"process{index}-of-2.json").read_text()) for index in range(2)]
    assert sorted(two[0]["requests"] + two[1]["requests"]) == sorted(one["requests"])
    assert two[0]["requests"] and two[1]["requests"]
    # Twice: the base is measured again in batches of another size, for the noise floor.
    assert [each["scored"] for each in two] == [2 * 4, 2 * 3] and one["scored"] == 2 * len(pairs)
    assert "%|" in errors[0] and "%|" not in errors[1]  # bars on the first process only
    said = [
        [
            json.loads(line)["choices"]
            for line in (folder / f"out-{n}" / "mt_bench" / "answers.jsonl").read_text().splitlines()
        ]
        for n in (1, 2)
    ]
    assert len(said[0]) == 5 and said[0] == said[1]
    for moment in ("before", "after"):
        evaluations = [Evaluation.from_json(result[moment]) for result in (one, *two)]
        assert evaluations[1] == evaluations[2]
        for name, metric in evaluations[0].metrics.items():
            metric, shared = asdict(metric), asdict(evaluations[1].metrics[name])
            numbers = {key: metric[key] for key in ("value", "stderr") if metric[key] is not None}
            assert {key: shared[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-7), name
            assert shared | numbers == metric
            assert evaluations[1].samples[name] == pytest.approx(evaluations[0].samples[name], rel=1e-4, abs=1e-7)
    files = [load_file(folder / f"references-{world}" / "a.safetensors") for world in (1, 2)]
    assert set(files[0]) == set(files[1]) == {str(i) for i in range(len(pairs))}
