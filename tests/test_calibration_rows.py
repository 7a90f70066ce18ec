"""What a user may pass as calibration data: masks count, shapes are told apart by type, a stream is read as far as needed."""

import numpy as np
import pandas as pd
import pytest
import torch
from chats import assistant, chat_tokenizer, user
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from tiny import tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader
from trainers import ROWS, quick
from transformers import LlamaForCausalLM
from trl import SFTConfig, pack_dataset

from lora_null import LoraNullConfig
from lora_null.batches import texts_in
from lora_null.trainer import CalibrationArgs, LoraNullSFTTrainer, calibration_windows
from lora_null.trainer.calibration_data import as_batches, padded_batches
from lora_null.utils.errors import UserError

TEXTS = [f"town {i} lies {'far ' * (i % 4)}off" for i in range(40)]
CUT = CalibrationArgs(samples=6, max_length=20, mode="separate")
IDS = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]


def tokens(batches):
    return sorted(tuple(row[mask.bool()].tolist()) for batch in batches for row, mask in zip(*batch.values()))


def expected(texts=TEXTS, args=CUT, tokenizer=None):
    windows = calibration_windows(texts, tokenizer or tiny_tokenizer(), args)
    return tokens(padded_batches(windows, 0))


def same(data, args=CUT):
    batches = as_batches(data, tiny_tokenizer(), args)
    assert all(list(batch) == ["input_ids", "attention_mask"] for batch in batches)
    return tokens(batches)


def padded(side="right", width=40):
    def row(ids):
        fill, ones = [0] * (width - len(ids)), [1] * len(ids)
        left = side == "left"
        return {
            "input_ids": fill + ids if left else ids + fill,
            "attention_mask": [0] * len(fill) + ones if left else ones + [0] * len(fill),
        }

    return [row(ids) for ids in IDS]


class TestMasksOfReadyRowsCount:
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("kind", ["list", "numpy", "tensors", None, "torch", "np"])
    def test_windows(self, side, kind):
        rows = padded(side)
        if kind in (None, "torch", "np"):
            rows = Dataset.from_list(rows).with_format({"np": "numpy"}.get(kind, kind))
        elif kind != "list":
            make = np.array if kind == "numpy" else torch.tensor
            rows = [{key: make(value) for key, value in row.items()} for row in rows]
        assert same(rows) == sorted(map(tuple, IDS))

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_batches(self, kind):
        rows = padded("left")
        batches = [
            {key: kind([row[key] for row in rows[i : i + 8]]) for key in rows[0]} for i in range(0, len(rows), 8)
        ]
        assert same(batches) == sorted(map(tuple, IDS))
        assert [len(batch["input_ids"]) for batch in as_batches(batches, tiny_tokenizer(), CUT)] == [8] * 5
        assert same(DataLoader(Dataset.from_list(rows).with_format("torch"), batch_size=8)) == sorted(map(tuple, IDS))

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_positions_are_kept(self, kind):
        """Of packed rows; padding is cut off with its positions, and what has none is padded as ever."""
        rows = [{key: kind(x) for key, x in row.items()} for row in padded("left")[:3]]
        rows[1]["position_ids"] = kind([0] * (40 - len(IDS[1])) + [i % 4 for i in range(len(IDS[1]))])
        placed, others = as_batches(rows, tiny_tokenizer(), CUT)
        assert placed["input_ids"].tolist() == [IDS[1]] and placed["attention_mask"].tolist() == [[1] * len(IDS[1])]
        assert placed["position_ids"].tolist() == [[i % 4 for i in range(len(IDS[1]))]]
        assert tokens([others]) == sorted(tuple(IDS[i]) for i in (0, 2))
        batch = {key: torch.as_tensor(rows[1][key])[None] for key in rows[1]}
        assert as_batches([batch], tiny_tokenizer(), CUT)[0]["position_ids"].tolist() == [
            list(rows[1]["position_ids"])
        ]

    @pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
    def test_rows_that_trl_has_packed(self, strategy):
        rows = pack_dataset(Dataset.from_dict({"input_ids": IDS}), seq_length=64, strategy=strategy)
        assert len(rows) < len(IDS)
        assert same(rows) == same(list(rows)) == same(rows.with_format("torch")) == sorted(map(tuple, IDS))
        batches = as_batches(DataLoader(rows.with_format("torch"), batch_size=1), tiny_tokenizer(), CUT)
        assert sorted(tuple(text["input_ids"].tolist()) for x in batches for text in texts_in(x)) == same(rows)
        behind = [{key: x[::-1] for key, x in row.items()} for row in padded("left")]
        cut = [{**row, "seq_lengths": [2, len(ids) - 2]} for row, ids in zip(behind, IDS)]
        cut[0]["attention_mask"] = [bool(x) for x in cut[0]["attention_mask"]]
        assert same(cut) == sorted(tuple(part) for ids in IDS for part in (ids[::-1][:2], ids[::-1][2:]))

    def test_what_a_tokenizer_gives(self):
        encoded = tiny_tokenizer()(TEXTS, padding=True)
        assert (
            same(encoded)
            == same(tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
            == sorted(map(tuple, IDS))
        )
        assert same(tiny_tokenizer()(TEXTS)) == sorted(map(tuple, IDS))

    def test_what_changes_nothing_may_stand_beside_the_tokens(self):
        beside = {"token_type_ids": [0] * 9, "labels": [5] * 9, "pixel_values": None}
        rows = [{"input_ids": ids, **beside} for ids in IDS]
        assert same(rows) == sorted(map(tuple, IDS))

    def test_without_a_mask_nothing_is_padding(self):
        assert same([{"input_ids": ids} for ids in IDS]) == sorted(map(tuple, IDS))
        assert same([{"input_ids": torch.tensor([ids])} for ids in IDS]) == sorted(map(tuple, IDS))

    def test_what_this_model_reads_beside_tokens_is_refused_and_other_columns_are_not(self, tmp_path):
        class Reads(LlamaForCausalLM):
            def forward(self, input_ids=None, visual=None, image_embeds=None, **kwargs):
                return super().forward(input_ids, **kwargs)

        beside = dict(source="web", images=["a.png"], labels=[5] * 8, completion_mask=[1] * 8, kwargs=3, use_cache=True, logits_to_keep=1)  # fmt: skip
        rows = [{"input_ids": list(range(5, 13)), **beside, "visual": 0, "image_embeds": None} for _ in range(40)]

        def batches(*more):
            model = Reads(tiny_model().config)
            return LoraNullSFTTrainer(
                model=model, args=SFTConfig(**quick(tmp_path)), train_dataset=ROWS, calibration_dataset=[*rows, *more],
                peft_config=LoraNullConfig(r=4, target_modules=["q_proj"]), processing_class=tiny_tokenizer(),
            ).calibration_batches  # fmt: skip

        assert sum(len(batch["input_ids"]) for batch in batches()) == 40
        for name in ("visual", "image_embeds"):
            with pytest.raises(UserError, match=f"calibration: row 41 has {name}, which changes what is read"):
                batches({**rows[0], name: torch.ones(3, 4)})

    @pytest.mark.parametrize(
        "row, reason",
        [
            ({"input_ids": [5, 6, 0, 0]}, r"row 2 is padded \(token 0\) and has no attention_mask"),
            ({"input_ids": [0, 0, 5]}, "row 2 is padded"),
            ({"input_ids": [5, 6], "attention_mask": [1]}, r"row 2: input_ids \[2\], torch.int64, with a mask \[1\]"),
            ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "row 2 has no tokens"),
            ({"input_ids": [5, 6], "attention_mask": [1, 2]}, "row 2 has an attention_mask that holds other numbers"),
            ({"input_ids": []}, "row 2"),
            ({"input_ids": ["a"]}, "row 2: "),
            ({"input_ids": [0.5]}, "row 2: "),
            ({"input_ids": None}, "row 2: "),
            ({"input_ids": [5, 6], "position_ids": [0]}, r"row 2: input_ids \[2\] with position_ids \[1\]"),
            ({"input_ids": [[5, 6]]}, "row 2: "),
            ({"input_ids": [5, 6], "seq_lengths": [1]}, "row 2 has seq_lengths that do not add up to its tokens"),
            ({"input_ids": [5, 6], "seq_lengths": [3, -1]}, "row 2 has seq_lengths that do not add up to its tokens"),
            ({"input_ids": [5, 6], "seq_lengths": 2}, "row 2 has seq_lengths that do not add up to its tokens"),
            ({"input_ids": [5, 6], "token_type_ids": [0, 1]}, "row 2 has token_type_ids, which changes what is read"),
            ({"input_ids": [5, 6], "pixel_values": torch.rand(3, 4, 4)}, "row 2 has pixel_values"),
            ({"text": "a"}, "row 2 has no input_ids"),
            ("a", "row 2 has no input_ids"),
        ],
    )
    def test_refused_by_number(self, row, reason):
        with pytest.raises(UserError, match=reason):
            as_batches([{"input_ids": [5, 6, 7]}, row], tiny_tokenizer(), CUT)


COLUMN = {"text": TEXTS}
SHAPES = {
    "a tuple": tuple(TEXTS),
    "rows": [{"text": text, "n": i} for i, text in enumerate(TEXTS)],
    "a dict of lists": COLUMN,
    "a DataFrame": pd.DataFrame(COLUMN),
    "a Series": pd.Series(TEXTS),
    "an array": np.array(TEXTS),
    "a data set": Dataset.from_dict(COLUMN),
    "a column of a data set": Dataset.from_dict(COLUMN)["text"],
    "the only split": DatasetDict(test=Dataset.from_dict(COLUMN)),
    "the training split": DatasetDict(test=Dataset.from_dict({"text": ["no"]}), train=Dataset.from_dict(COLUMN)),
    "a stream that ends": IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
}


@pytest.mark.parametrize("mode", ["separate", "packed"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_same_windows_in_every_shape(kind, mode):
    args = CalibrationArgs(samples=6, max_length=20, mode=mode)
    assert same(SHAPES[kind], args) == expected(args=args)


def test_a_generator():
    assert same(iter(TEXTS)) == expected()


def test_a_string_is_one_text():
    text, packed = " ".join(TEXTS), CalibrationArgs(samples=6, max_length=20)
    assert same(text, packed) == expected([text], packed)


def test_numbers_and_missing_texts(caplog):
    assert same(["a b c", 7, None, ""]) == expected(["a b c", "7"])
    assert "2 of 4 rows have no text and are left out" in caplog.text


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: {"messages": m}, lambda m: {"conversations": m}, lambda m: {"text": m}]
)
def test_conversations_through_the_chat_template(wrap):
    talks = [[user(text), assistant("yes")] for text in TEXTS]
    batches = as_batches([wrap(talk) for talk in talks], chat_tokenizer(), CUT)
    assert tokens(batches) == expected([f"<user>{text}\n<assistant>yes</s>\n" for text in TEXTS])
    with pytest.raises(UserError, match=r"row 1 cannot be used: 'messages' holds half a character"):
        as_batches([{"messages": [user("\udc00"), assistant("so")]}], chat_tokenizer(), CUT)
    with pytest.raises(UserError, match=r"row 1 cannot be used: .*a conversation, and the model has no chat template"):
        as_batches([wrap(talk) for talk in talks], tiny_tokenizer(), CUT)


def test_rows_of_several_kinds_whose_other_fields_are_none():
    talk, more = [user("why"), assistant("so")], {"tools": [{"type": "function", "function": {"name": "f"}}]}
    rows = [{"text": None, "messages": talk, **more}, {"text": "a b c", "messages": None}, {"text": None}]
    batches = as_batches(rows, chat_tokenizer(), CUT)
    of_pandas = as_batches(pd.DataFrame({"text": ["a b c", None, np.nan]}), chat_tokenizer(), CUT)
    assert tokens(of_pandas) == expected(["a b c"])
    tools = '<tools>[{"type": "function", "function": {"name": "f"}}]\n'
    assert tokens(batches) == expected([f"{tools}<user>why\n<assistant>so</s>\n", "a b c"])


LABELED = Dataset.from_dict({"text": [0, 1]}).cast_column("text", ClassLabel(names=["no", "yes"]))
REFUSED = [
    ([*TEXTS, float("nan")], "row 41 cannot be used: is NaN, not text"),
    ([b"a"], "row 1 cannot be used: is a bytes, not text"),
    ([*TEXTS, "a\ud800b"], r"row 41 cannot be used: holds half a character \(a lone surrogate\)"),
    ([{"text": "a\ud800b"}], "row 1 cannot be used: 'text' holds half a character"),
    ([["a", "b"]], "row 1 cannot be used: is a list of several texts"),
    ([[5, 6]], "row 1 cannot be used: is a list of several numbers"),
    ([{"text": {"a": 1}}], "row 1 cannot be used: 'text' is a dict, not text"),
    ([True], "row 1 cannot be used: is a bool"),
    (["a", {"question": "b"}], "row 2 needs a field text, messages, conversations or input_ids, found question"),
    ({"text": ["a"], "n": [1, 2]}, "a dict of lists of different lengths"),
    (DatasetDict(a=Dataset.from_dict(COLUMN), b=Dataset.from_dict(COLUMN)), r"pass one of its splits \(a, b\)"),
    (LABELED, "the text is a number of a class"),
    (LABELED["text"], "the text is a number of a class"),
    (b"bytes", "a bytes; pass the rows"),
    ({"a", "b"}, "a set; pass the rows"),
    (5, "a int; pass the rows"),
    (iter(()), "the data set is empty"),
    ({}, "row 1 needs a field"),
    ([None], "the data set holds no text"),
]


@pytest.mark.parametrize("data, reason", REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused_by_type(data, reason):
    with pytest.raises(UserError, match=reason) as raised:
        as_batches(data, tiny_tokenizer(), CUT)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_is_no_text(tmp_path, kind):
    (tmp_path / "texts.jsonl").write_text("{}")
    for path in (tmp_path / "texts.jsonl", tmp_path):
        with pytest.raises(UserError, match="a path; pass the rows"):
            as_batches(kind(path), tiny_tokenizer(), CUT)


class Endless:
    """Counts the rows that are taken of an endless stream."""

    def __init__(self, row):
        self.row, self.read = row, 0

    def __iter__(self):
        while True:
            self.read += 1
            yield self.row(self.read)


class TestAnEndlessStreamIsReadAsFarAsNeeded:
    def test_separate_texts(self):
        stream = Endless(lambda i: {"text": TEXTS[i % 40]})
        assert len(same(stream)) == 6 and stream.read == 16 * 6
        assert same(Endless(stream.row)) == expected([TEXTS[i % 40] for i in range(1, 97)])

    def test_packed_until_the_windows_are_full(self):
        args = CalibrationArgs(samples=6, max_length=200)
        rows = Dataset.from_list([{"text": TEXTS[i % 40]} for i in range(500)])
        taken, original = [], Dataset.__getitem__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dataset, "__getitem__", lambda self, i: taken.append(i) or original(self, i))
            assert len(same(rows)) == 6
        assert len(taken) == 16 * 6 and len(set(taken)) == 16 * 6 and max(taken) > 16 * 6  # at random, not the first
        stream = Endless(lambda i: "abc")
        assert [len(window) for window in same(stream, args)] == [200] * 6
        assert stream.read == 400

    def test_windows_and_batches(self):
        stream = Endless(lambda i: {"input_ids": [4 + i, 5, 6]})
        assert len(same(stream)) == 6 and stream.read == 6
        stream = Endless(lambda i: {"input_ids": torch.full((4, 3), 4 + i)})
        assert len(same(stream)) == 8 and stream.read == 2

    def test_nothing_but_empty_texts(self):
        stream = Endless(lambda i: "")
        with pytest.raises(UserError, match="holds no text"):
            as_batches(stream, tiny_tokenizer(), CUT)
        assert stream.read < 10_000

    def test_from_datasets(self):
        read = []

        def rows():
            for i in range(10_000):
                read.append(i)
                yield {"text": TEXTS[i % 40]}

        assert len(same(IterableDataset.from_generator(rows))) == 6 and len(read) < 200
