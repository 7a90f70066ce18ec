"""Trained parameters from configurations alone: every row of the paper's tables, and the matched ranks."""

from functools import cache

import pytest

from lora_null import UserError
from lora_null.recipes.config.schema import parse_recipe
from lora_null.recipes.models.bases import known_shape
from lora_null.recipes.models.plan import _count, matched_rank, plan_methods, with_method
from lora_null.recipes.report.paper import MODELS, paper_rows
from lora_null.trainer.methods import make_method

HUB = {paper: hub for hub, paper in MODELS.items()}
# What the paper prints against what its models have.
SWAPPED = {("1c", "lora-fa", 128), ("1c", "lora-fa", 235), ("2c", "lora-fa", 128), ("2c", "lora-fa", 244)}
ADAPTER_ON_TOP = {
    "LLaMA-3-8B": "8366M",
    "LLaMA-3.1-8B": "8366M",
    "LLaMA-3.2-3B": "3407M",
}  # the model + LoRA's r = 128


def recipe(hub, method="lora", **section):
    raw = {
        "model": {"name_or_path": hub},
        "method": {"name": method, **section},
        "calibration": {"path": "c.jsonl"},
        "data": {"path": "d.jsonl"},
    }
    return parse_recipe(raw, "test")


@cache
def trained(paper_model, name, rank):
    """Parameters that train; those of adapters from one count at r = 1, as they grow in proportion to r."""
    if rank not in (None, 1):
        return rank * trained(paper_model, name, 1)
    method = make_method(name)
    model = with_method(recipe(HUB[paper_model]), known_shape(HUB[paper_model]), method, rank)
    return _count(model, method.trainable(model))


def printed(count):
    return f"{round(count / 1e6)}M"


def test_every_row_of_the_papers_tables():
    odd = {}
    for row in paper_rows():
        if row.params:
            ours = printed(trained(row.model, row.method, row.rank))
            if ours != row.params:
                odd[row.table, row.model, row.method, row.rank] = (row.params, ours)
    full = {key: value for key, value in odd.items() if key[2] == "full"}
    assert {(key[1], value[0]) for key, value in full.items()} == set(ADAPTER_ON_TOP.items())
    for (_, model, _, _), (theirs, _) in full.items():
        total = trained(model, "full", None) + trained(model, "lora", 128)
        assert abs(int(theirs[:-1]) - total / 1e6) < 1.5
    assert {(table, method, rank) for table, _, method, rank in odd.keys() - full.keys()} == SWAPPED


def test_the_swapped_rows_are_right_the_other_way_round():
    for model, matched in (("LLaMA-2-7B", 235), ("LLaMA-3-8B", 244)):
        shown = {row.rank: row.params for row in paper_rows() if row.task_group == "instruction" and row.model == model
                 and row.method == "lora-fa"}  # fmt: skip
        assert shown[128] == printed(trained(model, "lora-fa", matched))
        assert shown[matched] == printed(trained(model, "lora-fa", 128))


@pytest.mark.parametrize(
    "model, rank, wanted",
    [("LLaMA-2-7B", 128, 235), ("LLaMA-3-8B", 128, 243), ("LLaMA-3.1-8B", 128, 243), ("LLaMA-3.2-3B", 128, 251),
     ("LLaMA-2-7B", 32, 58)],
)  # fmt: skip
def test_v2_matched_to_lora(model, rank, wanted):
    section = recipe(HUB[model], "lora-null-v2", rank=rank, match="lora")
    found = matched_rank(section, known_shape(HUB[model]), "lora-null-v2")
    assert found == wanted
    assert trained(model, "lora-null-v2", found) <= trained(model, "lora", rank)
    assert trained(model, "lora-null-v2", found + 1) > trained(model, "lora", rank)


def test_matched_to_a_count():
    hub = HUB["LLaMA-2-7B"]
    section = recipe(hub, "lora, lora-null-v2, full", match="320M")
    assert [plan.rank for plan in plan_methods(section, known_shape(hub))] == [128, 235, None]
    with pytest.raises(UserError, match="rank 1, more than 1K"):
        matched_rank(recipe(hub, match="1K"), known_shape(hub), "lora")
    with pytest.raises(UserError, match=r"eva deals out the ranks .*; method\.options\.eva\.rho=1"):
        matched_rank(recipe(hub, match="320M"), known_shape(hub), "eva")
    with pytest.raises(UserError, match="rank_pattern"):
        matched_rank(recipe(hub, match="1M", rank_pattern={"q_proj": 3}), known_shape(hub), "lora")


@pytest.mark.parametrize("match", ["lroa", "0", "-3M", "M", "inf"])
def test_nonsense_to_match(match):
    with pytest.raises(UserError, match="neither a count of parameters"):
        recipe("x/y", match=match)
