"""PEFT's `forgetting` against its definition, computed in float64 one text at a time."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer
from world import make_world, write_rows

from lora_null.eval_harness import ForgettingTask, evaluate
from lora_null.recipes.__main__ import main
from lora_null.utils.errors import UserError

TEXTS = ["the old town", "a king of the north " * 9, "x1", "rivers, hills and 27 lakes"]


def plain_losses(model, max_length):
    """The cross-entropies in float64 of each text's tokens but the first."""
    model, losses = model.double().eval(), []
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"][:max_length]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probs.gather(-1, ids[0, 1:, None])[:, 0].numpy())
    model.float()
    return losses


@pytest.mark.parametrize("max_length", [12, 768])
def test_it_is_the_rise_of_the_mean_loss_over_all_tokens(model, peft_model, tokenizer, tmp_path, max_length):
    task = ForgettingTask("wiki", TEXTS, max_length)
    base = evaluate(model, tokenizer, [task], batch_size=64, reference_dir=tmp_path, record_reference=True)
    found = evaluate(peft_model, tokenizer, [task], batch_size=3, reference_dir=tmp_path)
    before, after = plain_losses(model, max_length), plain_losses(peft_model, max_length)
    rise = np.concatenate(after).mean() - np.concatenate(before).mean()
    assert found.metrics["wiki forgetting"].value == pytest.approx(rise, rel=1e-4)
    assert found.metrics["wiki loss"].value == pytest.approx(np.concatenate(after).mean(), rel=1e-5)
    again = evaluate(model, tokenizer, [task], batch_size=2, reference_dir=tmp_path)  # PEFT's 4, halved
    changed = abs(again.metrics["wiki loss"].value - base.metrics["wiki loss"].value)
    assert base.noise == pytest.approx({"wiki loss": changed, "wiki forgetting": changed}, abs=1e-12)
    assert base.metrics["wiki forgetting"].value == 0 and base.metrics["wiki forgetting"].role == "retention"
    means = [a.mean() - b.mean() for a, b in zip(after, before)]
    assert found.samples["wiki forgetting"] == pytest.approx(means, abs=1e-4)
    counts = np.array([len(x) for x in after])
    residuals = counts * (np.array(means) - rise)
    stderr = (4 / 3 * (residuals**2).sum()) ** 0.5 / counts.sum()
    assert found.metrics["wiki forgetting"].stderr == pytest.approx(stderr, rel=1e-3)


@pytest.mark.parametrize(("given", "again"), [(3, 1), (4, 2), (8, 2), (64, 2), (1, 2)])
def test_the_base_is_measured_again_in_other_batches_also_where_one_holds_all(
    model, tokenizer, tmp_path, monkeypatch, given, again
):
    run, sizes = ForgettingTask.run, []

    def counted(task, model, tokenizer, options):
        sizes.append(options.batch_size)
        return run(task, model, tokenizer, options)

    monkeypatch.setattr(ForgettingTask, "run", counted)
    monkeypatch.setattr(ForgettingTask, "max_batch_size", None)
    task, options = ForgettingTask("wiki", TEXTS, 768), {"reference_dir": tmp_path, "record_reference": True}
    assert len(TEXTS) == 4
    evaluate(model, tokenizer, [task], batch_size=given, **options)
    assert sizes == [given, again]


def test_a_text_is_cut_at_its_end_whatever_the_tokenizer_does(model, tokenizer):
    task = ForgettingTask("wiki", TEXTS, 12)
    expected = evaluate(model, tokenizer, [task]).metrics
    tokenizer.truncation_side = "left"
    assert evaluate(model, tokenizer, [task]).metrics == expected and tokenizer.truncation_side == "left"


def test_without_the_base_only_the_loss_is_known(peft_model, tokenizer, tmp_path):
    assert set(evaluate(peft_model, tokenizer, [ForgettingTask("w", TEXTS)]).metrics) == {"w loss"}
    evaluate(peft_model, tokenizer, [ForgettingTask("w", TEXTS)], reference_dir=tmp_path, record_reference=True)
    with pytest.raises(UserError, match="recorded for other texts"):
        evaluate(peft_model, tokenizer, [ForgettingTask("w", TEXTS)], limit=2, reference_dir=tmp_path)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "has no texts"), (["ab", ""], "text 1 must be a text"), (["ab", "b"], "text 1 has only 1 token")],
)
def test_texts_that_cannot_be_scored(model, tokenizer, texts, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, tokenizer, [ForgettingTask("w", texts)])


def entry(folder, rows, **changes):
    write_rows(folder / "texts.jsonl", rows)
    written = json.dumps({"forgetting": "wiki", "path": str(folder / "texts.jsonl")} | changes)
    return f"eval.retention=[{written}]"


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"text": "a b"}],
            {"field": "txt"},
            "eval.retention.field: the data has no field 'txt' (did you mean 'text'?)",
        ),
        ([{"text": "a b"}, {"text": "c"}], {}, "eval.retention: row 2 of "),
        ([{"text": "a b"}, {"text": None}], {}, "eval.retention: row 2 of "),
        ([{"text": "a b"}], {"max_length": 1}, "max_length"),
        ([{"text": "a b"}], {"path": "./nowhere.jsonl"}, "no file or folder ./nowhere.jsonl"),
    ],
)
def test_mistakes_in_a_recipe_are_told_before_the_model_loads(tmp_path, capsys, rows, changes, message):
    words = [str(make_world(tmp_path)), entry(tmp_path, rows, **changes)]
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_a_recipe_reports_it(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    words = ["--method", "lora", "eval.task=[]", "training.max_steps=2", entry(tmp_path, rows, limit=3)]
    assert main([str(make_world(tmp_path)), *words]) == 0
    base, lora = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert base["metrics"]["wiki forgetting"]["value"] == 0 and lora["metrics"]["wiki loss"]["n"] == 3
    rise = lora["metrics"]["wiki loss"]["value"] - base["metrics"]["wiki loss"]["value"]
    assert lora["metrics"]["wiki forgetting"]["value"] == pytest.approx(rise, abs=1e-9)
    assert "rise of the loss over the base's on general text" in (tmp_path / "out/report.md").read_text()
