"""Values that are not text never become text unseen: files of every kind, fields of every kind, evaluation documents."""

import contextlib
import copy
import json
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from chats import TOOLS, assistant, chat_tokenizer, user
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from world import make_world, write_rows

from lora_null.eval_harness.documents import FILE_KINDS, BadRow, read_documents, with_lists
from lora_null.eval_harness.lm_eval.task import LmEvalTask
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import DATA_FILES, CalibrationSection, DataSection, MTBenchEntry
from lora_null.recipes.data.calibration import calibration_sources
from lora_null.recipes.data.examples import read_examples, training_data
from lora_null.recipes.data.rows import field_text, load_documents
from lora_null.recipes.eval_tasks import EvalContext, eval_tasks
from lora_null.utils.errors import UserError
from lora_null.utils.values import as_text, as_written, is_conversation

TEXTS = [
    ("text", "text"),
    (None, ""),
    (7, "7"),
    (2.5, "2.5"),
    (Decimal("1.10"), "1.10"),
    (np.int64(3), "3"),
    (np.float32(0.5), "0.5"),
    (np.str_("a"), "a"),
    (torch.tensor(4), "4"),
    (["one"], "one"),
    (("one", "one"), "one"),
    (np.array(["one"], dtype=object), "one"),
    ([], ""),
]
ANSWERS = [
    (["first", "second"], "first"),
    ([1, 2], "1"),
    ({"text": ["it", "this"], "answer_start": [0, 3]}, "it"),
    ({"text": [], "answer_start": []}, ""),
    ({"text": np.array(["it"], dtype=object), "answer_start": np.array([0])}, "it"),
    ({"value": "it", "aliases": ["It"]}, "it"),
]
ANSWERS_IN_PYTHON = [
    "[{'name': 'Ann', 'role': 'manager'}]",
    "[{'city': 'Paris', 'from': '10:00', 'value': 3}]",
    "{'from': 'USD', 'to': 'EUR', 'value': 10}",
    "[{'type': 'text', 'name': 'email'}]",
    "[{'type': 'context'}]",
    "{'role': 'admin'}\nprint({'value': 1})",
    "{'role': 'admin', 'value': 1}",
    "{'name': 'f'}",
]
NO_TEXT = [
    (True, "is a bool"),
    (np.bool_(True), "is a bool"),
    (float("nan"), "is NaN"),
    (np.float64("nan"), "is NaN"),
    (float("inf"), "is infinite"),
    (pd.NA, "is a NAType"),
    (pd.NaT, "is a NaTType"),
    (pd.Timestamp("2020-01-01"), "is a Timestamp"),
    (b"bytes", "is a bytes"),
    ({"a": 1}, "is a dict"),
    ({"text": {"text": "a"}}, "is a dict"),
    ([["a"]], "holds a list"),
    ([{"a": 1}], "holds a dict"),
    ([float("nan")], "holds NaN"),
    ({"a"}, "is a set"),
    ("{'text': array(['k0'], dtype=object), 'answer_start': array([0])}", "is answers as Python prints them"),
    ("{'role': 'assistant', 'content': 'a0'}", "is messages as Python prints them"),
    ("{'value': 'a', 'aliases': ['a']}", "is answers as Python prints them"),
    ("{'messages': [{'role': 'user'}]}", "is messages as Python prints them"),
    (["[{'weight': 1, 'role': 'user', 'content': 'a'}]"], "holds messages as Python prints them"),
    ("[{'type': 'text', 'text': 'q0'}]", "is messages as Python prints them"),
]


@pytest.mark.parametrize("text", ANSWERS_IN_PYTHON)
def test_what_python_prints_may_well_be_an_answer(text):
    assert as_text(text) == as_text(text, answer=True) == text and not is_conversation(text)


@pytest.mark.parametrize("value, text", TEXTS, ids=lambda value: repr(value)[:20])
def test_what_is_text(value, text):
    assert as_text(value) == as_text(value, answer=True) == text


@pytest.mark.parametrize("value, text", ANSWERS, ids=lambda value: repr(value)[:20])
def test_where_an_answer_is_meant(value, text):
    assert as_text(value, answer=True) == text
    with pytest.raises(ValueError, match=r"is a list of several (texts|numbers)|is a dict"):
        as_text(value)


@pytest.mark.parametrize("value, reason", NO_TEXT, ids=lambda value: repr(value)[:20])
def test_what_is_no_text(value, reason):
    for answer in (False, True):
        with pytest.raises(ValueError, match=reason):
            as_text(value, answer=answer)


ROWS = [
    {"a": "007", "b": "NA", "c": "null"},
    {"a": "1e5", "b": "", "c": ' x, \n"y" '},
    {"a": "-0", "b": "nan", "c": "True"},
]


MIXED = [
    {"a": 1, "m": [user("x"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": {"p": 1}}}])]},
    {
        "a": "one",
        "m": [user("x"), assistant(None, tool_calls=[{"function": {"name": "g", "arguments": {"q": None}}}])],
    },
    {"a": {"b": [1]}, "z": 10**30},
    {"a": ["x", 2, None]},
]


COLUMNS = [  # what a cell of a csv may hold as text
    ["k0", "K 0", 'it\'s (array([1]) "so")'],
    ["k0"],
    {"text": ["k0", "K0)"], "answer_start": [0, 3]},
    {"value": "k0", "aliases": ["k0", "K0"]},
    {"messages": [user("x"), assistant("y")]},
    [{"weight": 1, **user("x")}, {"weight": 0, **assistant("y\n} {")}],
    assistant("y"),
    [{"type": "text", "text": "q0"}],
]


def as_arrays(value):
    """Return a value as pandas gives what it read from parquet: lists as arrays of objects, at any depth."""
    if isinstance(value, dict):
        return {key: as_arrays(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    array = np.array(value) if isinstance(value[0], int) else np.empty(len(value), dtype=object)
    array[:] = [as_arrays(inner) for inner in value]
    return array


class TestFilesAsTheyWereWritten:
    def test_a_csv_keeps_its_cells(self, tmp_path):
        pd.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
        assert read_documents([tmp_path / "a.csv"], "x").rows == ROWS

    @pytest.mark.parametrize("value", COLUMNS, ids=lambda value: str(value)[:24])
    @pytest.mark.parametrize("how", ["pandas", "NumPy", "JSON"])
    def test_a_column_of_lists_or_dicts_in_a_csv(self, tmp_path, value, how, capsys):
        written = {"pandas": str, "JSON": json.dumps, "NumPy": lambda value: str(as_arrays(value))}[how](value)
        pd.DataFrame({"q": ["[x", "y", "z"], "a": [written, "", written]}).to_csv(tmp_path / "a.csv", index=False)
        rows = read_documents([tmp_path / "a.csv"], "x").rows
        if isinstance(value[0] if isinstance(value, list) else None, str):
            assert [as_text(row["a"]) for row in rows] == [written, "", written]
            assert field_text(rows[2], "a", answer=True) == value[0] and copy.deepcopy(rows[2]["a"]).items == value
            assert with_lists(rows[2])["a"] == value and type(as_text(rows[2]["a"])) is str
            assert "'a' holds lists written as text; the first" in capsys.readouterr().out
            rows = [{**row, "a": getattr(row["a"], "items", "")} for row in rows]
        assert rows == [{"q": "[x", "a": value}, {"q": "y", "a": ""}, {"q": "z", "a": value}]

    @pytest.mark.parametrize(
        "cell",
        ['{"name": "f", "arguments": {}}', "{'name': 'f'}", '[{"name": "f"}]', "[1, 2]", "[True, None]", "{'a', 'b'}", "[('a', 'b')]", "[x]", r"['\d']"],
    )  # fmt: skip
    def test_a_column_that_may_well_be_texts(self, tmp_path, cell):
        for cells in ([cell, cell], ["['a']", "b", "b"], ["['a']", cell, cell]):
            pd.DataFrame({"q": "x", "a": cells}).to_csv(tmp_path / "a.csv", index=False)
            found = [row["a"] for row in read_documents([tmp_path / "a.csv"], "x").rows]
            assert found == cells == [as_text(value, answer=True) for value in found]

    def test_what_cannot_be_read_is_given_up_at_once(self):
        """Escaped JSON, LaTeX and nests as deep as a page, which took minutes."""
        for cell in (r"{\"a\": \"b\", " * 4000, r"[\'" * 20_000, "[" * 100_000):
            assert as_written(cell) is cell

    def test_two_columns_of_one_name_in_a_parquet(self, tmp_path):
        table = pyarrow.Table.from_arrays([pyarrow.array(["1"])] * 2, names=["a", "a"])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match="two columns are called 'a'"):
            read_documents([tmp_path / "a.parquet"], "x")

    def test_class_labels_are_read_by_their_names(self, tmp_path, monkeypatch):
        label = datasets.ClassLabel(names=["no", "yes"])
        kinds = {"q": datasets.Value("string"), "a": label, "many": [label], "in": {"x": label}}
        rows = [{"q": "x", "a": 1, "many": [1, 0], "in": {"x": 0}}, {"q": "y", "a": -1, "many": [], "in": {"x": None}}]
        labeled = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
        pyarrow.parquet.write_table(labeled.data.table, tmp_path / "a.parquet")
        named = [
            {"q": "x", "a": "yes", "many": ["yes", "no"], "in": {"x": "no"}},
            {"q": "y", "a": None, "many": [], "in": {}},
        ]
        assert read_documents([tmp_path / "a.parquet"], "x").rows == named
        task = LmEvalTask("nq_open", path=str(tmp_path / "a.parquet"), fields={"question": "q", "answer": "q"})
        (leaf,) = task.loaded["tasks"].values()
        assert [doc["a"] for doc in leaf.eval_docs] == [1, -1]  # the rules of its tasks count their choices
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: labeled)
        assert load_documents("hub/id", subset=None, split="train", where="data").rows == named
        data = DataSection(path=str(tmp_path / "a.parquet"), prompt="q", response="a", on_bad_row="skip")
        found = training_data(data, tiny_tokenizer(), preferences=False, max_length=None)
        assert found.examples[0].written.text.endswith("yes</s>") and found.bad == [BadRow(2, "empty 'a'")]

    def test_class_labels_in_lists_as_earlier_versions_described_them(self, tmp_path):
        label = {"names": ["no", "yes"], "_type": "ClassLabel"}
        features = {
            "one": [label],
            "two": [[label]],
            "rows": [{"x": label}],
            "old": {"feature": {"x": label}, "_type": "Sequence"},
        }
        rows = {"one": [[1]], "two": [[[1, 0], [0]]], "rows": [[{"x": 1}]], "old": [{"x": [0, 1]}]}
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        pyarrow.parquet.write_table(pyarrow.table(rows).replace_schema_metadata(metadata), tmp_path / "a.parquet")
        named = {"one": ["yes"], "two": [["yes", "no"], ["no"]], "rows": [{"x": "yes"}], "old": {"x": ["no", "yes"]}}
        assert read_documents([tmp_path / "a.parquet"], "x").rows == [named]

    @pytest.mark.parametrize("written", [None, b"null", b"[]", b"not json", b'{"info": {"features": []}}'])
    def test_what_is_no_number_of_a_class_stays(self, tmp_path, written):
        """Texts in the place of labels, as pyarrow leaves them under the features of before, and features of other forms."""
        kinds = datasets.Features({"a": datasets.ClassLabel(names=["no", "yes"])})
        table = datasets.Dataset.from_list([{"a": 1}], features=kinds).data.table
        metadata = table.schema.metadata if written is None else {b"huggingface": written}
        odd = {"_type": "x", "feature": "y", "names": "z"}
        table = pyarrow.table({"a": ["new"], "b": [0.5], "odd": [odd]}).replace_schema_metadata(metadata)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert read_documents([tmp_path / "a.parquet"], "x").rows == [{"a": "new", "b": 0.5, "odd": odd}]
        kinds = datasets.Features({"odd": {name: datasets.Value("string") for name in odd}})
        labeled = datasets.Dataset.from_list([{"odd": odd}], features=kinds)
        pyarrow.parquet.write_table(labeled.data.table, tmp_path / "a.parquet")
        assert read_documents([tmp_path / "a.parquet"], "x").rows == [{"odd": odd}]

    def test_whole_numbers_of_a_csv(self, tmp_path):
        (tmp_path / "a.csv").write_text("n,zip,big\n1,01,12345678901234567890\n-2,10,1\n")
        rows = read_documents([tmp_path / "a.csv"], "x").rows
        assert rows == [{"n": 1, "zip": "01", "big": "12345678901234567890"}, {"n": -2, "zip": "10", "big": "1"}]

    @pytest.mark.parametrize(
        "text, last",
        [
            ('a, b, c d\nx, "y, z", w\n', "w"),
            ('a; b; "c d"\nx; y, z; w\n', "w"),
            ('a,b,c d\nx,"y, z", w\n', " w"),  # where the header has none, it is the cell's own
        ],
    )
    def test_a_space_after_each_comma_is_no_part_of_a_cell(self, tmp_path, text, last):
        (tmp_path / "a.csv").write_text(text)
        assert read_documents([tmp_path / "a.csv"], "x").rows == [{"a": "x", "b": "y, z", "c d": last}]

    @pytest.mark.parametrize("text", ['[\n{"a": 1, "a": 2},\n{"a": 1}\n]', '{"a": [1], "b": {"x": 1, "x": 2}}'])
    def test_a_key_that_is_there_twice(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"as json \(two keys of an object are called '[ax]'\)"):
            read_documents([tmp_path / "a.json"], "x", keep_bad=True)

    @pytest.mark.parametrize(
        "text, reason",
        [
            ("a,b\n1,2\n1\n", "row 2: 1 cells under 2 columns"),
            ("a,a\n1,2\n", "two columns are called 'a'"),
            ("a,b\n", "a header and no rows"),
            ('a,b\n"1"x,2\n', "',' expected after '\"'"),
            ("a\n\xff\n".encode("latin-1"), "can't decode byte 0xff"),
        ],
    )
    def test_a_broken_csv(self, tmp_path, text, reason):
        (tmp_path / "a.csv").write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(UserError) as raised:
            read_documents([tmp_path / "a.csv"], "x")
        assert reason in str(raised.value) and "\n" not in str(raised.value)

    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    def test_mixed_types_in_a_column(self, tmp_path, suffix):
        path = tmp_path / f"a.{suffix}"
        path.write_text(json.dumps(MIXED)) if suffix == "json" else write_rows(path, MIXED)
        assert read_documents([path], "x").rows == MIXED

    def test_a_parquet_without_what_arrow_fills_in(self, tmp_path):
        rows = [{"m": [{"role": "user", "content": "x"}]}, {"m": [{"role": "assistant", "weight": 0}]}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert read_documents([tmp_path / "a.parquet"], "x").rows == rows


ENTRIES = [{"question": f"q{i}", "answer": [f"a{i}"]} for i in range(3)]
CONVERSATION = [user("a"), assistant("b")]
WHOLE_FILES = {  # what stands in a .json file → its rows
    "an array": (ENTRIES, ENTRIES),
    "columns": ({"question": ["q0", "q1"], "answer": [["a"], "b"]}, [{"question": "q0", "answer": ["a"]}, {"question": "q1", "answer": "b"}]),
    "pandas' columns by index": (json.loads(pd.DataFrame(ENTRIES).to_json()), ENTRIES),
    "pandas' columns of a part": (json.loads(pd.DataFrame(ENTRIES)[1:].to_json()), ENTRIES[1:]),
    "rows under one key": ({"entries": ENTRIES}, ENTRIES),
    "rows beside what is said of them": ({"Version": 1.1, "info": {"a": 1}, "Data": ENTRIES, "tags": ["a"]}, ENTRIES),
    "one row beside its passages": ({"question": "q", "passages": ENTRIES}, [{"question": "q", "passages": ENTRIES}]),
    "one row": ({"question": "q", "answer": ["a", "b"]}, [{"question": "q", "answer": ["a", "b"]}]),
    "one conversation": ({"messages": CONVERSATION}, [{"messages": CONVERSATION}]),
    "one row of conversations": ({"prompt": CONVERSATION, "chosen": CONVERSATION[:1]}, [{"prompt": CONVERSATION, "chosen": CONVERSATION[:1]}]),
    "columns of conversations": ({"messages": [CONVERSATION] * 2}, [{"messages": CONVERSATION}] * 2),
}  # fmt: skip


def node(parent, role=None, *parts, **more):
    """A message of ChatGPT's export, below another one."""
    message = {"author": {"role": role}, "content": {"content_type": "text", "parts": list(parts)}, "recipient": "all"}
    return {"parent": parent, "message": message | {"metadata": {}} | more if role else None, "children": []}


def turn(sender, text, *content):
    return {"uuid": "u", "sender": sender, "text": text, "content": list(content), "attachments": []}


HIDDEN = {"is_visually_hidden_from_conversation": True}
CHATGPT = {
    "root": node(None), "s": node("root", "system", ""),
    "memo": node("s", "user", "be brief", metadata=HIDDEN), "u": node("memo", "user", "what is 6*7?"),
    "first": node("u", "assistant", "43"),  # written again
    "call": node("u", "assistant", "6*7", recipient="python"), "ran": node("call", "tool", "42"),
    "thought": node("ran", "assistant", content={"content_type": "thoughts", "thoughts": []}), "a": node("thought", "assistant", "It is 42."),
    "more": node("a", "assistant", "Anything else?"), "unanswered": node("more", "user", "no"),
}  # fmt: skip
NOTE = "This block is not supported on your current device yet."
CLAUDE = [
    turn("human", "what is 6*7?", {"type": "text", "text": "what is 6*7?"}),
    turn("human", ""),
    turn("assistant", f"Wait.\n```\n{NOTE}\n```\n\nIt is 42.", {"type": "text", "text": "It is 42."}, {"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "name": "x", "input": {}}),
    turn("assistant", f"```\n{NOTE}\n```\nAnything else?"),
]  # fmt: skip
EXPORTS = {
    "ChatGPT": {"title": "t", "create_time": 1.5, "mapping": CHATGPT, "current_node": "unanswered"},
    "Claude": {"uuid": "u", "name": "n", "account": {"uuid": "u"}, "chat_messages": CLAUDE},
}
EMPTY = {  # other keys of such a chat, which leave no question with its answer
    "ChatGPT": [{"current_node": "u"}, {"current_node": None}, {"mapping": {"u": node("u", "user", "q")}, "current_node": "u"}],
    "Claude": [{"chat_messages": []}, {"chat_messages": CLAUDE[:2]}, {"chat_messages": [None, {"sender": []}]}],
}  # fmt: skip


@pytest.mark.parametrize("of", EXPORTS)
def test_exported_chats_are_conversations(tmp_path, of):
    chat = EXPORTS[of]
    (tmp_path / "conversations.json").write_text(json.dumps([chat, *(chat | other for other in EMPTY[of])]))
    (tmp_path / "user.json").write_text('{"id": "me"}')
    (tmp_path / "shared_conversations.json").write_text('[{"id": "s"}]')
    found = load_documents(str(tmp_path), subset=None, split="train", where="data", keep_bad=True)
    said = [user("what is 6*7?"), assistant("It is 42.\n\nAnything else?")]
    empty = {"ChatGPT": 3, "Claude": 2}  # the one that begins with a blank question is no row, but told
    assert [row["messages"] for row in found.rows] == [said, *[[]] * empty[of]]
    kept = CalibrationSection(path=str(tmp_path))
    assert len(calibration_sources(kept, chat_tokenizer())[0].texts) == 1  # a row without a text is left out
    assert read_documents([tmp_path / "user.json"], "x").rows == [{"id": "me"}]
    write_rows(tmp_path / "rows.jsonl", [{"chat_messages": said, "mapping": {}}])
    assert read_documents([tmp_path / "rows.jsonl"], "x").rows == [{"chat_messages": said, "mapping": {}}]
    data = DataSection(path=str(tmp_path / "rows.jsonl"), messages="messages", template="chat")
    write_rows(tmp_path / "rows.jsonl", [chat, chat | EMPTY[of][0]])
    data.on_bad_row = "skip"
    found = training_data(data, chat_tokenizer(), preferences=False, max_length=None)
    assert [(row.row, row.reason) for row in found.bad] == [(2, "a conversation without turns")]
    (example,) = found.examples
    assert example.written.text == "<user>what is 6*7?\n<assistant>It is 42.\n\nAnything else?</s>\n"


def claude(*turns):
    return {"chat_messages": list(turns)}


def chatgpt(*messages):
    tree = {str(i): {"message": message, "parent": str(i - 1)} for i, message in enumerate(messages)}
    return {"mapping": tree, "current_node": str(len(messages) - 1)}


def said(role, *parts, **more):
    kind = {"content_type": "text" if all(isinstance(part, str) for part in parts) else "multimodal_text"}
    return node(None, role, **{"content": kind | {"parts": list(parts)}} | more)["message"]


def files(*names):
    return [{"file_name": name} for name in names]


def tool_use(name):
    return {"type": "tool_use", "name": name, "input": {}}


Q, A = turn("human", "Hi"), turn("assistant", "Hello!")
LEASE = {"file_name": "paste.txt", "extracted_content": "The tenant pays 300."}
FILE, PICTURE = {"metadata": {"attachments": [{"name": "a.pdf"}]}}, {"content_type": "image_asset_pointer"}
HEARD = [
    {"content_type": "audio_transcription", "text": "Hi"},
    {"content_type": "real_time_user_audio_video_asset_pointer", "frames_asset_pointers": []},
]
SEEN = [HEARD[0], HEARD[1] | {"frames_asset_pointers": [PICTURE]}]
ASKED = [said("user", "Hi"), said("assistant", "Hello!")]
REPLY = {"role": "assistant", "content": "You pay 300."}
PART = [user("Hi"), assistant("Hello!")]


def branches(*above):
    """A chat of two questions with an answer each; which message stands above each of the four."""
    turns = zip("abcd", above, (turn("human", "Ho"), A, Q, A))
    return claude(*(each | {"uuid": name, "parent_message_uuid": parent} for name, parent, each in turns))


SHOWN = {  # a chat → its messages, and the kind of what ends it early
    "a document alone": (claude(Q, A, turn("human", "") | {"attachments": [LEASE]}, turn("assistant", "You pay 300.")), [*PART, user("The tenant pays 300."), REPLY], None),
    "documents, also named as files": (claude(turn("human", "What?") | {"attachments": [LEASE, LEASE], "files": files("paste.txt")}, turn("assistant", "You pay 300.")), [user("What?" + "\n\nThe tenant pays 300." * 2), REPLY], None),
    "a file without its text": (claude(Q, A, turn("human", "What?") | {"files": files("a.png")}, turn("assistant", "You pay 300.")), PART, "file"),
    "an attachment without its text": (claude(Q, A, turn("human", "What?") | {"attachments": files("a.pdf")}, turn("assistant", "You pay 300.")), PART, "file"),
    "an image in parts": (claude(Q, A, turn("human", "What?", {"type": "text", "text": "What?"}, {"type": "image"}), turn("assistant", "300.")), PART, "image"),
    "a file first": (claude(turn("human", "") | {"files": files("a.png")}, A, Q, A), [], "file"),
    "a blank question": (claude(Q, A, turn("human", ""), turn("assistant", "You pay 300.")), PART, "blank"),
    "an artifact": (claude(Q, A, turn("human", "Write."), turn("assistant", "Here:", tool_use("search")), turn("assistant", "", tool_use("artifacts"))), PART, "artifacts"),
    "an edited question": (branches("0", "a", "0", "c"), PART, None),
    "an edited question, nothing above": (branches(None, "a", None, "c"), PART, None),
    "no branches": (branches("0", "0", "0", "0"), [user("Ho"), assistant("Hello!"), *PART], None),
    "a turn that is missing": (branches("0", "a", "b", "lost"), [user("Ho"), assistant("Hello!"), *PART], None),
    "files without a name": (claude(Q, A, turn("human", "What?") | {"attachments": [LEASE | {"file_name": ""}], "files": [{"file_name": ""}]}, turn("assistant", "300.")), PART, "file"),
    "a question without content": (chatgpt(*ASKED, said("user", content={"parts": None}), said("assistant", "So.")), PART, "unknown"),
    "a picture alone": (chatgpt(*ASKED, said("user", PICTURE), said("assistant", "A cat.")), PART, "image"),
    "a picture beside a question": (chatgpt(*ASKED, said("user", PICTURE, "What?"), said("assistant", "A cat.")), PART, "image"),
    "a file beside a question": (chatgpt(*ASKED, said("user", "What?", **FILE), said("assistant", "300.")), PART, "file"),
    "a picture first": (chatgpt(said("user", PICTURE), said("assistant", "A cat."), *ASKED), [], "image"),
    "a picture that was drawn": (chatgpt(*ASKED, said("user", "Draw."), said("assistant", "Gladly."), said("tool", PICTURE), said("user", "Why?"), said("assistant", "So.")), PART, "image"),
    "a canvas": (chatgpt(*ASKED, said("user", "Write."), said("assistant", "{}", recipient="canmore.create_textdoc"), said("assistant", "Done.")), PART, "canmore"),
    "a question of another kind": (chatgpt(*ASKED, said("user", content={"content_type": "app_pairing_content"}), said("assistant", "So.")), PART, "app_pairing_content"),
    "what was said aloud": (chatgpt(said("user", *HEARD), ASKED[1]), PART, None),
    "what was said and shown": (chatgpt(said("user", *SEEN), ASKED[1]), [], "real_time_user_audio_video"),
    "citations": (chatgpt(ASKED[0], said("assistant", "Hel\ue203lo\ue204! \ue200cite\ue202turn0search1\ue202turn0view0\ue201【4†source】")), PART, None),
    "names": (chatgpt(ASKED[0], said("assistant", '\ue200entity\ue202["word","Hello","greeting"]\ue201\ue200url\ue202!\ue202turn0search1\ue201')), PART, None),
}  # fmt: skip


@pytest.mark.parametrize("chat", SHOWN)
def test_what_an_exported_chat_shows_is_learned_whole_or_not_at_all(tmp_path, capsys, chat):
    """No answer without what it answers, none glued to an earlier one; the rest is told."""
    entry, messages, held = SHOWN[chat]
    (tmp_path / "chats.json").write_text(json.dumps([entry]))
    with contextlib.nullcontext() if messages else pytest.raises(UserError, match="has no documents"):
        assert read_documents([tmp_path / "chats.json"], "x").rows == [{"messages": messages}]
    told = f"read in chats.json: 1 of 1 chats only up to a turn that is not text alone (1 {held})\n"
    assert capsys.readouterr().out == (told if held else "")


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_a_json_file_that_is_one_object(tmp_path, kind, capsys):
    whole, rows = WHOLE_FILES[kind]
    (tmp_path / f"{kind}.json").write_text(json.dumps(whole, indent=1))
    assert read_documents([tmp_path / f"{kind}.json"], "x").rows == rows
    told = f"read in {kind}.json: the rows under 'Data', and not what stands beside them: Version, info, tags\n"
    assert capsys.readouterr().out == (told if "Version" in whole else "")


def test_a_long_line_behind_spaces(tmp_path):
    (tmp_path / "a.txt").write_text("  " + "x" * 1600 + "\n\n\t\t " + "y" * 1600)
    texts = [row["text"] for row in read_documents([tmp_path / "a.txt"], "x").rows]
    assert [len(text) for text in texts] == [1500, 100, 1500, 100]


@pytest.mark.parametrize("path", ["", "train"])
def test_a_split_may_be_a_folder(tmp_path, path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_rows(tmp_path / split / "part-0.jsonl", [{"question": split, "answer": "a"}] * 2)
    (tmp_path / "datasheet.md").write_text("About these data.")
    found = load_documents(str(tmp_path / path), subset=None, split="train", where="data")
    assert [row["question"] for row in found.rows] == ["train"] * 2


def test_files_of_two_kinds(tmp_path):
    for name in ("train-1.csv", "train-2.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(
        UserError, match=r"data\.path: files of two kinds, .*train-1\.csv and train-2\.jsonl; name one"
    ):
        load_documents(str(tmp_path), subset=None, split="train", where="data")


def test_an_entry_is_data_by_the_kinds_that_are_read():
    assert set(DATA_FILES) == set(FILE_KINDS)  # named in the schema once more, which does not wait for their readers


def test_columns_by_index_are_paired_by_it_and_a_conversation_is_no_companion_of_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"q": {"0": "q0", "1": "q1"}, "a": {"1": "a1", "0": "a0"}}))
    assert read_documents([tmp_path / "a.json"], "x").rows == [{"q": "q0", "a": "a0"}, {"q": "q1", "a": "a1"}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": CONVERSATION, "data": [{"x": 1}]}))
    with pytest.raises(UserError, match="one object of lists of different lengths: messages 2, data 1"):
        read_documents([tmp_path / "a.json"], "x")


@pytest.mark.parametrize(
    "whole, reason",
    [
        (
            {"question": ["q0", "q1"], "answer": ["a"]},
            "one object of lists of different lengths: question 2, answer 1",
        ),
        (
            {"train": ENTRIES, "test": ENTRIES},
            "lists of rows under 'train' and 'test'; write one to a file of its own, or columns as rows",
        ),
        ({"id-1": ENTRIES[0], "id-2": ENTRIES[1]}, "2 objects under keys such as 'id-1'; write the rows as a list"),
        (
            {"1": {"messages": CONVERSATION}, "2": {"messages": CONVERSATION}},
            "2 objects under keys such as '1'",
        ),
    ],
)
def test_an_object_that_may_be_read_in_several_ways(tmp_path, whole, reason):
    (tmp_path / "a.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=reason):
        read_documents([tmp_path / "a.json"], "x")


FIELDS = [  # a text made of fields, a row → the text
    ("{input text}", {"input text": "x"}, "x"),
    ("{a.b}: {c-d} {é}", {"a.b": 1, "c-d": ["2"], "é": None}, "1: 2 "),
    ("{{{a}}} {{a}} }}{{", {"a": "x"}, "{x} {a} }{"),
    ("odd name", {"odd name": "x"}, "x"),
    ("{a}", {"{a}": "itself", "a": "x"}, "itself"),
    ("{a}{b}", {"a": "{b}", "b": "{a}"}, "{b}{a}"),
]
WRONG_FIELDS = [
    ("{input txt}", "no field 'input txt' (did you mean 'input text'?)"),
    ("input txt", "no field 'input txt' (did you mean 'input text'?)"),
    ('{"a": {input text}}', "a { without its partner"),
    ("{a: b}", "no field 'a: b'"),
    ("{input text", "a { without its partner"),
    ("input text}", "a } without its partner"),
    ("{{input text}}", "names no field"),
    ("{}", "no field ''"),
]


class TestFieldsByTheColumnsNames:
    @pytest.mark.parametrize("spec, row, text", FIELDS)
    def test_found(self, tmp_path, spec, row, text):
        path = str(write_rows(tmp_path / "rows.jsonl", [row | {"response": "r"}] * 2))
        if text.strip():
            data = DataSection(path=path, prompt=spec, template="plain")
            data = training_data(data, tiny_tokenizer(), preferences=False, max_length=None)
            assert data.examples[0].written.messages[0] == {"role": "user", "content": text.strip()}
        field = {"template": spec} if "{" in spec else {"field": spec}
        assert calibration_sources(CalibrationSection(path=path, **field), tiny_tokenizer())[0].texts == [text] * 2

    @pytest.mark.parametrize("spec, reason", WRONG_FIELDS)
    def test_refused(self, tmp_path, spec, reason):
        path = str(write_rows(tmp_path / "rows.jsonl", [{"input text": "x", "response": "r"}]))
        with pytest.raises(UserError) as raised:
            data = DataSection(path=path, prompt=spec)
            training_data(data, tiny_tokenizer(), preferences=False, max_length=None)
        assert reason in str(raised.value) and str(raised.value).startswith("data.prompt: ")
        with pytest.raises(UserError, match=r"^calibration\.template: "):
            calibration_sources(CalibrationSection(path=path, template=spec), tiny_tokenizer())

    @pytest.mark.parametrize(
        "template, reason",
        [("{promt}", "no field {promt}"), ("{prompt", "a { without"), ("{{prompt}}", "no {prompt}")],
    )
    def test_templates_of_prompts(self, tmp_path, capsys, template, reason):
        recipe = make_world(tmp_path)
        assert main([str(recipe), "--dry-run", f"data.template={json.dumps(template)}"]) == 2
        assert reason in capsys.readouterr().err
        entry = f"[{{answers: n, path: x.jsonl, template: {json.dumps(template)}}}]"
        assert main([str(recipe), "--dry-run", f"eval.task={entry}"]) == 2
        assert reason in capsys.readouterr().err

    def test_braces_in_a_template_of_prompts(self, tmp_path):
        path = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "{x}", "response": "r"}]))
        data = DataSection(path=path, template="{{{prompt}}}\nA:")
        data = training_data(data, tiny_tokenizer(), preferences=False, max_length=None)
        assert data.examples[0].written.text == "{{x}}\nA: r</s>"


class TestCalibrationTexts:
    def test_of_every_kind(self, tmp_path):
        rows = [
            {"t": value}
            for value in ("a", 7, ["b", "c"], {"text": ["d"], "answer_start": [0]}, CONVERSATION, "", None)
        ]
        path = str(write_rows(tmp_path / "rows.jsonl", rows))
        tokenizer = chat_tokenizer("{{ bos_token }}" + TOOLS)
        texts = calibration_sources(CalibrationSection(path=path, field="t"), tokenizer)[0].texts
        assert texts == ["a", "7", "b", "d", "<s><user>a\n<assistant>b</s>\n"]  # the tokenizer adds no first token
        adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = adds
        texts = calibration_sources(CalibrationSection(path=path, field="t"), tokenizer)[0].texts
        assert texts[-1] == "<user>a\n<assistant>b</s>\n"  # it does

    @pytest.mark.parametrize(
        "value, reason",
        [
            ({"a": 1}, "'t' is a dict, not text"),
            (float("nan"), "'t' is NaN, not text"),
            ([["a"]], "'t' holds a list, not text"),
            (CONVERSATION, "a conversation, and the model has no chat template"),
        ],
    )
    def test_refused_by_row(self, tmp_path, value, reason):
        path = str(write_rows(tmp_path / "rows.jsonl", [{"t": "a"}, {"t": value}]))
        with pytest.raises(UserError) as raised:
            calibration_sources(CalibrationSection(path=path, field="t"), tiny_tokenizer())
        assert str(raised.value) == f"calibration: 1 of 2 rows cannot be used: 1 {reason} (row 2)"


def tasks(tmp_path, rows, **entry):
    path = write_rows(tmp_path / "docs.jsonl", rows)
    recipe = make_world(tmp_path, eval={"task": [{"path": str(path), **entry}]})
    return eval_tasks(EvalContext(load_recipe(str(recipe)), tiny_tokenizer()))


class TestEvaluationDocuments:
    def test_answers(self, tmp_path):
        rows = [
            {"q x": "a", "r": {"text": ["1", "2"], "answer_start": [0, 1]}},
            {"q x": 5, "r": 6},
            {"q x": [user("b")], "r": [assistant("c")]},
        ]
        (task,) = tasks(tmp_path, rows, answers="n", prompt="q x", response="r", template="{prompt} =")
        assert task.pairs == [("a =", " 1"), ("5 =", " 6"), ("b =", " c")]
        (task,) = tasks(tmp_path, rows[:2], answers="n", prompt="{q x}?", response="r", offset=1)
        assert task.pairs == [("Question: 5?\nAnswer:", " 6")]
        (task,) = tasks(tmp_path, [{"problem": "1+1", "solution": "count on", "answer": "2"}], answers="n")
        assert task.pairs == [("Question: 1+1\nAnswer:", " 2")]  # the solution is what is learned

    @pytest.mark.parametrize("bad", [{"a": 1}, float("nan"), [["x"]], None, True])
    def test_answers_that_are_none(self, tmp_path, bad):
        rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": bad}]
        with pytest.raises(UserError, match=r"^eval.task: 1 of 2 rows cannot be used: 1 .*'answer'.* \(row 2\)"):
            tasks(tmp_path, rows, answers="n")

    def test_preferences_over_several_turns(self, tmp_path):
        shared = [user("a"), assistant("b"), user("c")]
        rows = [{"chosen": [*shared, assistant("yes")], "rejected": [*shared, assistant("no")]}]
        (task,) = tasks(tmp_path, rows, preferences="p")
        text = tiny_tokenizer().decode(task.chosen[0].ids)
        assert text == "Question: a\nAnswer: b</s>\n\nQuestion: c\nAnswer: yes</s>"
        assert tiny_tokenizer().decode(task.rejected[0].ids).endswith("c\nAnswer: no</s>")

    @pytest.mark.parametrize("turn, reason", [({"a": 1}, "a turn is a dict"), (float("nan"), "a turn is NaN")])
    def test_mt_bench(self, tmp_path, turn, reason):
        row = {"question_id": 1, "category": "math", "turns": ["one", turn]}
        with pytest.raises(UserError, match=f"MT-Bench: row 1 cannot be used: {reason}"):
            tasks(tmp_path, [row], mt_bench="m")

    def test_mt_bench_is_asked_as_rows_are_written(self, tmp_path):
        rows = [{"question_id": 1, "category": "math", "turns": ["one", "two"]}]
        recipe = load_recipe(str(make_world(tmp_path)), ["data.template=plain"])
        recipe.eval.task = [MTBenchEntry(mt_bench="m", path=str(write_rows(tmp_path / "docs.jsonl", rows)))]
        (task,) = (task for task in eval_tasks(EvalContext(recipe, tiny_tokenizer())) if task.name == "m")
        talk = [{"messages": [user(" one\n"), assistant("yes"), user("two\n"), assistant("no")]}]
        data = DataSection(path=str(write_rows(tmp_path / "talk.jsonl", talk)), messages="messages", template="plain")
        (example,), _ = read_examples(data, tiny_tokenizer(), preferences=False)
        assert (
            task.ask([(" one\n", "yes")], "two\n") + "no</s>" == example.written.text == "one\nyes</s>\n\ntwo\nno</s>"
        )

    def test_documents_of_lm_eval_with_mixed_columns(self, tmp_path):
        rows = [{"question": 1, "answer": ["a"]}, {"question": "two", "answer": ["b", 2], "more": {"x": 1}}]
        path = str(write_rows(tmp_path / "nq.jsonl", rows))
        (leaf,) = LmEvalTask("nq_open", path=path).loaded["tasks"].values()
        assert [leaf.doc_to_text(doc) for doc in leaf.eval_docs] == ["Q: 1?\nA:", "Q: two?\nA:"]
