"""Hundreds of generated rows through the recipe reader: each is trained on as it is meant, or refused by number.

What is meant is known to the generator. The labels are those of the chat template's own {% generation %} blocks, which the
reader never sees, since its template has none.
"""

import csv
import json
import random

import pytest
from chats import BLOCKS, TOOLS, chat_tokenizer
from tiny import tiny_tokenizer
from world import write_rows

from lora_null.eval_harness.documents import read_documents
from lora_null.recipes.config.schema import CalibrationSection, DataSection
from lora_null.recipes.data.calibration import calibration_sources
from lora_null.recipes.data.examples import RowReader, tokenize, training_data
from lora_null.recipes.data.formats import detect_format
from lora_null.trainer import CalibrationArgs, calibration_windows
from lora_null.utils.chat import adds_bos
from lora_null.utils.values import as_text, is_conversation

WORDS = [
    "who",
    "is",
    "it",
    "42",
    "x=1",
    "été",
    "naïve",
    "日本",
    "🙂",
    "{a}",
    "a\n\nb",
    "  two",
    "<b>",
    "%s",
    "\\n",
    "Noneth",
]
PYTHON = ("{'", "[{'", "None<", "None\n", ": nan", "b'")


def text_of(rng):
    long = rng.random() < 0.02
    return " ".join(rng.choice(WORDS) for _ in range(4000 if long else rng.randint(1, 6)))


def conversation(rng):
    """Return messages as they are meant, in OpenAI's plain form, and which are learned."""
    said, learned = [], []

    def say(role, is_learned=False, **more):
        said.append({"role": role, "content": text_of(rng), **more})
        learned.append(is_learned)

    if rng.random() < 0.4:
        say("system")
    for _ in range(rng.randint(1, 3)):
        say("user")
        if rng.random() < 0.3:
            function = {"name": f"f{rng.randint(0, 9)}", "arguments": {"x": text_of(rng), "n": rng.randint(0, 9)}}
            say("assistant", True, tool_calls=[{"type": "function", "function": function}])
            if rng.random() < 0.7:
                del said[-1]["content"]
            say("tool")
        say("assistant", rng.random() < 0.8)
    if rng.random() < 0.1:
        say("user")
    return said, learned


def disguised(rng, said, learned):
    """Return the same conversation in one of the forms that people write."""
    share = rng.random() < 0.3 and not any("tool_calls" in message for message in said)
    rows = []
    for message, is_learned in zip(json.loads(json.dumps(said)), learned):
        if message["role"] == "assistant" and (not is_learned or rng.random() < 0.2):
            message["weight"] = int(is_learned)
        if "content" not in message and rng.random() < 0.5:
            message["content"] = rng.choice([None, ""])
        for call in message.get("tool_calls", ()):
            if rng.random() < 0.5:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if isinstance(message.get("content"), str) and message["content"] and rng.random() < 0.3:
            at = rng.randint(0, len(message["content"]))
            message["content"] = [
                {"type": "text", "text": part} for part in (message["content"][:at], message["content"][at:])
            ]
        if share:
            names = {"user": "human", "assistant": "gpt"}
            role = message.pop("role")
            message = {"from": names.get(role, role), "value": message.pop("content"), **message}
        if rng.random() < 0.2:
            message = {**rng.choice([{"tool_calls": None}, {"name": None}, {"id": 7}, {"weight": None}]), **message}
        rows.append(message)
    return rows


def spoil(rng, rows):
    """Return a conversation that cannot be meant."""
    bad = rng.choice(rows)
    key = "content" if "content" in bad or "role" in bad else "value"
    others = [
        float("nan"),
        {"text": {"a": 1}},
        {"a": ["x"]},
        True,
        [["x"]],
        [{"type": "image_url", "image_url": "x"}],
        [5],
    ]
    kind = rng.randint(0, 6)
    if kind == 0:
        bad[key] = rng.choice(others)
    elif kind == 1:
        bad["weight"] = rng.choice([0.5, 2, "yes", float("nan"), -1])
    elif kind == 2:
        return rng.choice([[], None, "user: a", 5, float("nan"), {"a": 1}, [None], [[]], ["a", "b"], True, [5, 6]])
    elif kind == 3:
        bad.pop("role", None), bad.pop("from", None)
    elif kind == 4:
        rows[-1] = {"role": "assistant", "content": rng.choice([None, "", " \n", []])}
    elif kind == 5:
        rows.append({"role": "assistant", "tool_calls": rng.choice([[{"f": 1}], "soon", [5], {"function": "g"}])})
    else:
        rows.insert(
            rng.randint(0, len(rows)),
            rng.choice([None, "hi", 5, [], {"content": "x"}, {"role": None, "content": "x"}]),
        )
    return rows


def meant(tokenizer, said, learned):
    """The tokens and labels by the blocks of the chat template itself."""
    found = tokenizer.apply_chat_template(
        said, chat_template=BLOCKS, return_dict=True, return_assistant_tokens_mask=True
    )
    text = tokenizer.apply_chat_template(said, chat_template=TOOLS, tokenize=False)
    assert tokenizer(text)["input_ids"] == found["input_ids"]
    turns = iter([is_learned for message, is_learned in zip(said, learned) if message["role"] == "assistant"])
    labels, last, keep = [], 0, False
    for token, mask in zip(found["input_ids"], found["assistant_masks"]):
        keep = next(turns) if mask and not last else keep
        labels.append(token if mask and keep else -100)
        last = mask
    return found["input_ids"], labels


@pytest.mark.parametrize("seed", range(2))
def test_conversations(tmp_path, seed):
    rng, rows, expected = random.Random(seed), [], []
    for _ in range(250):
        said, learned = conversation(rng)
        given = disguised(rng, said, learned)
        spoiled = rng.random() < 0.35
        rows.append(
            {"messages": spoil(rng, given) if spoiled else given, "n": rng.choice([1, "x", None, [1], {"a": 2}])}
        )
        expected.append(None if spoiled or not any(learned) else (said, learned))
        if rng.random() < 0.05:
            rows[-1].pop("messages")
            expected[-1] = None
    tokenizer = chat_tokenizer()
    section = DataSection(
        path=str(write_rows(tmp_path / "rows.jsonl", rows)), messages="messages", template="chat", on_bad_row="skip"
    )
    data = training_data(section, tokenizer, preferences=False, max_length=None)
    assert [row.row for row in data.bad] == [n for n, wanted in enumerate(expected, 1) if wanted is None]
    assert len({row.reason for row in data.bad}) > 15
    found = dict(zip([example.row for example in data.examples], data.rows))
    for number, wanted in enumerate(expected, start=1):
        if wanted is not None:
            ids, labels = meant(tokenizer, *wanted)
            assert (found[number]["input_ids"], found[number]["labels"]) == (ids, labels)
            assert not any(word in tokenizer.decode(ids) for word in PYTHON)


class Said(str):
    """A text that stands in a message, where the white space around it is the conversation's own."""

    def strip(self):
        return self


def value(rng, answer):
    """Return a value of a field, and the text that it stands for; None where it must be refused."""
    text = text_of(rng)
    number, other = rng.choice([0, 7, -3, 2.5, 10**20]), text_of(rng)
    choices = [
        (text, text),
        (number, str(number)),
        ([text], text),
        ([text, text], text),
        ([text, other + "!"], text if answer else None),
        ([number, other], str(number) if answer else None),
        ({"text": [text, other], "answer_start": [0, 3]}, text if answer else None),
        ({"value": text, "aliases": [other]}, text if answer else None),
        ([{"role": "assistant" if answer else "user", "content": text}], Said(text)),
        ({"from": "gpt" if answer else "human", "value": text}, Said(text)),
    ]
    refused = [
        None,
        "",
        " \n ",
        [],
        float("nan"),
        float("inf"),
        True,
        False,
        {},
        {"a": {"b": text}},
        [[text]],
        [{"a": 1}],
    ]
    refused += [[None, text], {"text": {"text": text}}, [float("nan")], [True], {"text": [], "answer_start": []}]
    refused += [
        [{"role": "assistant" if answer else "user", "content": bad}] for bad in (None, {"a": 1}, float("nan"))
    ]
    return (rng.choice(refused), None) if rng.random() < 0.3 else rng.choice(choices)


def as_said(answer):
    """A text with the indentation of its first line, of which one space is none; a message as it is."""
    indentation = answer[: len(answer) - len(answer.lstrip())].rpartition("\n")[2]
    return answer if isinstance(answer, Said) else indentation * (indentation != " ") + answer.strip()


def joined(answer):
    said, front = as_said(answer), answer[: len(answer) - len(answer.lstrip())]
    return f" {said}" if said == answer.strip() else "\n" * ("\n" in front) + said


@pytest.mark.parametrize("template", ["qa", "chat"])
def test_prompts_and_responses(tmp_path, template):
    rng, tokenizer, rows, expected = random.Random(5), chat_tokenizer(), [], []
    for _ in range(250):
        (prompt, asked), (response, answered) = value(rng, False), value(rng, True)
        rows.append({"prompt": prompt, "response": response, "tools": rng.choice([None, []])})
        expected.append(None if None in (asked, answered) else (asked.strip(), answered))
    section = DataSection(path=str(write_rows(tmp_path / "rows.jsonl", rows)), template=template, on_bad_row="skip")
    data = training_data(section, tokenizer, preferences=False, max_length=None)
    assert [row.row for row in data.bad] == [n for n, wanted in enumerate(expected, 1) if wanted is None]
    for example, tokens in zip(data.examples, tokenize(data.examples, template, tokenizer)):
        asked, answered = expected[example.row - 1]
        before, after = {
            "qa": (f"Question: {str(asked).strip()}\nAnswer:", f"{joined(str(answered))}</s>"),
            "chat": (f"<user>{asked}\n<assistant>", f"{as_said(answered)}</s>\n"),
        }[template]
        assert list(tokens.ids) == tokenizer(before + after)["input_ids"]
        start = next(i for i, label in enumerate(tokens.labels) if label != -100)
        assert list(tokens.labels) == [-100] * start + list(tokens.ids[start:])
        prompt = tokenizer(before)["input_ids"]
        assert list(tokens.ids[:start]) == prompt[:start] and len(prompt) - start in (
            0,
            1,
        )  # 1: a token that joins both
        assert not any(word in tokenizer.decode(tokens.ids) for word in PYTHON)


def test_conversations_in_a_csv_are_conversations_by_any_name(tmp_path):
    said = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they"}]
    other = [said[0], {"role": "assistant", "content": "[nobody]"}]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["better", "worse", "note"], [json.dumps(said), json.dumps(other), "[1]"]])
    (row,) = read_documents([tmp_path / "rows.csv"], "data").rows
    assert row == {"better": said, "worse": other, "note": "[1]"}
    section = DataSection(path=str(tmp_path / "rows.csv"), response="better", rejected="worse", template="chat")
    (example,) = training_data(section, chat_tokenizer(), preferences=True, max_length=None).examples
    texts = ["<user>who?\n<assistant>they</s>\n", "<user>who?\n<assistant>[nobody]</s>\n"]
    assert [example.written.text, example.rejected.text] == texts
    section = CalibrationSection(path=str(tmp_path / "rows.csv"), field="better", samples=1)
    (source,) = calibration_sources(section, chat_tokenizer())
    assert source.texts == texts[:1]


@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "Python"])
def test_messages_as_text_are_messages_in_every_door(tmp_path, write):
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they"}]
    rows, text = [{"talk": write(talk), "good": write(talk), "bad": "no"}], "<user>who?\n<assistant>they</s>\n"
    path, options = str(write_rows(tmp_path / "rows.jsonl", rows)), {"preferences": False, "max_length": None}
    section = DataSection(path=path, messages="talk", template="chat")
    assert training_data(section, chat_tokenizer(), **options).examples[0].written.text == text
    section = DataSection(path=path, prompt=None, response="good", rejected="talk", template="chat")
    reader = RowReader(section, list(rows[0]), "data", preferences=True, first=rows[0])
    assert reader.messages(rows[0])[0] == talk
    (source,) = calibration_sources(CalibrationSection(path=path, field="talk", samples=1), chat_tokenizer())
    assert source.texts == [text]
    window = calibration_windows([{"messages": write(talk)}], chat_tokenizer(), CalibrationArgs(mode="separate"))
    assert chat_tokenizer().decode(window[0]) == text
    assert detect_format(rows, ["talk"], "data").keys == {"messages": "talk"}


def test_an_answer_in_json_is_no_conversation():
    for text in ('{"from": "Rome", "to": "Paris"}', '[{"from": "Rome", "to": "Paris"}]', "[1, 2]", "[nobody]"):
        assert not is_conversation(text) and as_text(text) == text
    for text in ("[{'role': 'user', 'content': array([1])}]", "[{'role': 'user' 'content'"):
        with pytest.raises(ValueError, match="is messages as Python prints them"):
            as_text(text)


@pytest.mark.parametrize("bad", [b"bytes", {1, 2}, object(), 1j, range(3), {"text": b"x"}, [b"x"]])
def test_what_no_file_holds(bad):
    good = {"prompt": "a", "response": "b"}
    reader = RowReader(DataSection(path="x"), list(good), "data", preferences=False, first=good)
    for name in good:
        with pytest.raises(ValueError, match=rf"^'{name}' "):
            reader.example(1, {**good, name: bad}, chat_tokenizer())


def test_only_the_last_piece_of_a_text_has_an_end(tmp_path):
    (tmp_path / "a.txt").write_text("The mill was built in 1832. " * 150)
    (tmp_path / "b.md").write_text("It burned.")
    data = DataSection(path=str(tmp_path), text="text", template="plain")
    examples = training_data(data, tiny_tokenizer(), preferences=False, max_length=None).examples
    assert [example.written.text.endswith("</s>") for example in examples] == [False, False, True, True]
    assert all(example.written.text.removesuffix("</s>").endswith(".") for example in examples)
    row = {"text": "a", "last": False}
    data.path = str(write_rows(tmp_path / "rows.jsonl", [row]))  # a field of a data file means nothing
    (example,) = training_data(data, tiny_tokenizer(), preferences=False, max_length=None).examples
    assert example.written.text == "a</s>"


@pytest.mark.parametrize(
    "text", ["<s>a question, an answer</s>", "<s>a question, an answer </s>\n", "a question, an answer"]
)
def test_a_text_that_holds_its_special_tokens_gets_no_others(tmp_path, text):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    data = DataSection(path=str(write_rows(tmp_path / "rows.jsonl", [{"text": text}])), text="text")
    (example,) = training_data(data, tokenizer, preferences=False, max_length=None).examples
    assert example.written.text.count("</s>") == 1 and example.written.text.endswith("</s>")
    assert example.written.text.startswith("<s>") == (text.startswith("<s>") and not adds_bos(tokenizer))
    assert example.written.spans == [(0, len(example.written.text))]
