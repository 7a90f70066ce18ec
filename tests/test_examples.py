"""Training rows: what is learned, token for token, and every bad row by number."""

import gzip
import json
import re

import pytest
from chats import CONFIG, assistant, learned, user
from datasets import Dataset
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from world import make_world, write_rows

from lora_null.eval_harness.documents import read_documents
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import DataSection
from lora_null.recipes.data.examples import tokenize, training_data
from lora_null.recipes.data.templates import TEMPLATES, render
from lora_null.recipes.preview import show_samples
from lora_null.utils.errors import UserError

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [("Add 1 and 2.", "3"), ("And 4?", "That is 7.")]


@pytest.fixture
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = CHATML
    return made


def section(path, **options):
    return DataSection(path=str(path), **{"template": "qa", **options})


@pytest.mark.parametrize("template", ["qa", "alpaca", "plain", "chat"])
def test_the_same_tokens_as_trl(tmp_path, tokenizer, template):
    rows = [{"prompt": f"what is {i}+{i}", "completion": f"it is {2 * i}"} for i in range(6)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = training_data(
        section(path, response="completion", template=template), tokenizer, preferences=False, max_length=200
    )
    if template == "chat":
        message = {"prompt": "user", "completion": "assistant"}
        rows = [{k: [{"role": message[k], "content": text}] for k, text in row.items()} for row in rows]
    else:
        rows = [dict(zip(row, render(template, row["prompt"], row["completion"]))) for row in rows]
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(output_dir=str(tmp_path), max_length=200, **CONFIG),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for key in ("input_ids", "labels"):
        assert data.rows[key] == trainer.train_dataset[key]


@pytest.mark.parametrize("template", ["qa", "chat"])
def test_the_same_preferences_as_trl(tmp_path, tokenizer, template):
    rows = [{"prompt": f"what is {i}", "chosen": f"it is {i}", "rejected": "no idea"} for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = training_data(
        section(path, response="chosen", template=template), tokenizer, preferences=True, max_length=99
    )
    trainer = DPOTrainer(
        model=tiny_model(),
        ref_model=tiny_model(),
        args=DPOConfig(output_dir=str(tmp_path), max_length=99, **CONFIG),
        train_dataset=data.rows,
        processing_class=tokenizer,
    )
    for side in ("chosen", "rejected"):
        ours = tokenize(data.examples, template, tokenizer, rejected=side == "rejected")
        for tokens, row in zip(ours, trainer.train_dataset):
            assert list(tokens.ids) == row["prompt_ids"] + row[f"{side}_ids"]
            assert list(tokens.labels) == [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]


CODE = {"prompt": "def f(x):\n", "response": "    y = x\n    return y\n"}
BODY = "    y = x\n    return y</s>"


@pytest.mark.parametrize(
    ("template", "end"),
    [("plain", f"def f(x):\n{BODY}"), ("qa", BODY), ("chat", f"<assistant>{BODY}\n")],
)
@pytest.mark.parametrize("front", ["", "\n", " \n\r\n"])
def test_the_indentation_of_a_response_is_kept(tmp_path, tokenizer, template, end, front):
    row = {**CODE, "response": front + CODE["response"]}
    messages = [user(CODE["prompt"]), assistant(row["response"])]
    for rows, keys in [(row, {}), ({"messages": messages}, {"messages": "messages"})]:
        if keys and template == "chat":  # which gets messages as they are
            continue
        path = write_rows(tmp_path / "rows.jsonl", [rows])
        data = training_data(section(path, template=template, **keys), tokenizer, preferences=False, max_length=None)
        (written,) = [example.written for example in data.examples]
        assert written.text.endswith(end) and written.text[slice(*written.spans[0])].strip("\n") == BODY


@pytest.mark.parametrize("template", ["plain", "qa"])
def test_a_line_break_before_an_indented_response_is_kept(tmp_path, tokenizer, template):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "def f(x):", "response": "\n" + CODE["response"]}])
    data = training_data(section(path, template=template), tokenizer, preferences=False, max_length=None)
    assert data.examples[0].written.text.endswith(f":\n{BODY}")


@pytest.mark.parametrize("template", ["plain", "qa", "alpaca", "chat"])
def test_one_space_in_front_of_a_response_changes_nothing(tmp_path, tokenizer, template):
    rows = [{"prompt": "1+2? ", "response": space + "it is 3"} for space in ("", " ", "\n", "\n ")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = training_data(section(path, template=template), tokenizer, preferences=False, max_length=None)
    assert len({example.written.text for example in data.examples}) == 1
    text = data.examples[0].written.text
    assert text.endswith(
        {"plain": "1+2? it is 3</s>", "chat": "1+2?\n<assistant>it is 3</s>\n"}.get(template, ": it is 3</s>")
    )


@pytest.mark.parametrize("front", ["", "\n", "\t", "  "])
def test_the_indentation_of_a_text_is_kept(tmp_path, tokenizer, front):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{front}one\n  two\n"}])
    data = training_data(section(path, text="text", template="plain"), tokenizer, preferences=False, max_length=None)
    assert data.examples[0].written.text == front.strip("\n") + "one\n  two</s>"


def said(who, what, user, assistant):
    return [{who: role, what: text} for turn in TURNS for role, text in zip((user, assistant), turn)]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_every_assistants_turn_is_learned(tmp_path, tokenizer, template):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": said("role", "content", "user", "assistant")}])
    data = training_data(
        section(path, messages="messages", template=template), tokenizer, preferences=False, max_length=None
    )
    (tokens,) = tokenize(data.examples, template, tokenizer)
    joined = {"alpaca": [": 3</s>", ": That is 7.</s>"], "chat": ["3</s>\n", "That is 7.</s>\n"]}[template]
    assert learned(tokens, tokenizer) == joined
    text = tokenizer.decode(tokens.ids)
    assert text.index("Add 1 and 2.") < text.index("3</s>") < text.index("And 4?") < text.index("That is 7.</s>")
    if template == "alpaca":
        first, second = (TEMPLATES["alpaca"].replace("{prompt}", prompt) for prompt, _ in TURNS)
        assert text == f"{first} 3</s>\n\n{second} That is 7.</s>"


@pytest.mark.parametrize("keys", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
def test_conversations_of_both_kinds(tmp_path, tokenizer, keys):
    path = write_rows(tmp_path / "rows.jsonl", [{"conversations": said(*keys)}])
    data = training_data(section(path, messages="conversations"), tokenizer, preferences=False, max_length=None)
    turns = [make(text) for turn in TURNS for make, text in zip((user, assistant), turn)]
    assert [(example.row, example.written.messages) for example in data.examples] == [(1, turns)]


def test_binarized_ultrafeedback_as_the_hub_has_it(tmp_path, tokenizer):
    said = lambda text: [{"role": "user", "content": "why"}, {"role": "assistant", "content": text}]  # noqa: E731
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "why", "chosen": said("so"), "rejected": said("no")}])
    data = training_data(section(path, response="chosen"), tokenizer, preferences=True, max_length=None)
    assert data.rows[:] == {"prompt": ["Question: why\nAnswer:"], "chosen": [" so</s>"], "rejected": [" no</s>"]}


def test_a_prompt_of_several_fields(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Sum", "input": "1 2", "response": "3"}])
    data = training_data(section(path, prompt="{instruction}: {input}"), tokenizer, preferences=False, max_length=None)
    assert data.examples[0].written.messages == [user("Sum: 1 2"), assistant("3")]
    rows = [{"instruction": "Sum", "input": "", "response": "3"}, {"instruction": " ", "response": "3"}]
    asked = section(write_rows(tmp_path / "rows.jsonl", rows), prompt="{instruction}: {input}", on_bad_row="skip")
    data = training_data(asked, tokenizer, preferences=False, max_length=None)
    assert [row.reason for row in data.bad] == ["empty '{instruction}: {input}'"]  # of which the colon is no question


GOOD = {"prompt": "what", "response": "that", "rejected": "no"}
BAD = {  # a line of the file → what is wrong with it
    json.dumps({**GOOD, "prompt": ""}): "empty 'prompt'",
    json.dumps({**GOOD, "response": "  "}): "empty 'response'",
    json.dumps({"prompt": "what", "rejected": "no"}): "empty 'response'",
    json.dumps({**GOOD, "rejected": None}): "empty 'rejected'",
    json.dumps({**GOOD, "rejected": "that "}): "chosen equal to rejected",
    json.dumps({**GOOD, "prompt": "why " * 99}): "prompt longer than max_length (64 tokens)",
    json.dumps({**GOOD, "response": "caf\ufffd"}): "wrong encoding (the replacement character U+FFFD)",
    json.dumps({**GOOD, "response": "\ud83d"}): "half a character (a lone surrogate)",
    '{"prompt": "what", "respon': "no complete JSON",
    '{"prompt": "what", "response": "that", "prompt": "why"}': "two keys of an object are called 'prompt'",
    '["what", "that"]': "no JSON object",
}


def write_lines(path, *lines):
    path.write_bytes(b"".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def test_a_broken_file_says_where(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[\n" + ",\n".join(json.dumps(GOOD, indent=1) for _ in range(9)) + ",\n]\n")
    with pytest.raises(UserError, match=r"rows.json as json \(.*line 47 column 1"):
        read_documents([path], "data", keep_bad=True)
    path.write_bytes(json.dumps([GOOD]).encode("utf-16"))
    with pytest.raises(UserError, match=r"rows.json is in UTF-16; save it as UTF-8"):
        read_documents([path], "data", keep_bad=True)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("notes.txt", "notes\n\n" * 90, "as text (NUL"),
        ("notes.md", "notes\n\n" * 90, "as text (NUL"),
        ("rows.csv", "prompt,response\na,b\n", "as csv (NUL"),
        ("rows.jsonl", f"{json.dumps(GOOD)}\n" * 3, "as json (row 1: NUL"),
    ],
)
def test_texts_in_utf_16_without_its_mark_are_not_read_as_others(tmp_path, name, text, reason, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(UserError) as raised:
        read_documents([tmp_path / name], "data")
    told = f"data: cannot read {tmp_path / name} {reason} bytes, as of UTF-16; save it as UTF-8)"
    assert str(raised.value) == told


def test_one_nul_is_not_taken_for_utf_16(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"from a page\0of a document")
    with pytest.raises(UserError, match=r"as text \(a NUL byte, which belongs in no text; remove it\)"):
        read_documents([tmp_path / "a.txt"], "data")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.parquet"])
def test_what_a_file_is_that_is_named_as_another_kind(tmp_path, name):
    path, rows = tmp_path / name, json.dumps(GOOD).encode()
    for data, kind in (
        (gzip.compress(rows), "compressed by gzip; unpack it"),
        (b"PK\x03\x04" + rows, "a zip archive; unpack it"),
        (rows.decode().encode("utf-32"), "in UTF-32; save it as UTF-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(f"data: {path} is {kind}")):
            read_documents([path], "data")
    Dataset.from_list([GOOD]).to_parquet(path)
    if name == "rows.parquet":
        assert read_documents([path], "data").rows == [GOOD]
        return
    with pytest.raises(UserError, match=f"{path} is a parquet file; its name must end in .parquet"):
        read_documents([path], "data")


@pytest.mark.parametrize("line", BAD, ids=BAD.values())
def test_bad_rows_are_named(tmp_path, tokenizer, line):
    path = write_lines(tmp_path / "rows.jsonl", *[json.dumps(GOOD) + "\n"] * 6, line + "\n", json.dumps(GOOD) + "\n")
    options = {"preferences": True, "max_length": 64}
    with pytest.raises(UserError) as raised:
        training_data(section(path), tokenizer, **options)
    assert (
        str(raised.value)
        == f"data: 1 of 8 rows cannot be used: 1 {BAD[line]} (row 7); data.on_bad_row=skip leaves them out"
    )
    data = training_data(section(path, on_bad_row="skip"), tokenizer, **options)
    assert [row.row for row in data.bad] == [7] and len(data.rows) == 7 and data.examples[-1].row == 8


def test_latin_1_is_not_silently_read_as_something_else(tmp_path, tokenizer):
    path = write_lines(
        tmp_path / "rows.jsonl",
        '{"prompt": "a", "response": "b"}\n',
        '{"prompt": "é", "response": "b"}\n'.encode("latin-1"),
    )
    with pytest.raises(UserError, match=r"1 of 2 rows cannot be used: 1 not UTF-8 at byte 12 \(row 2\)"):
        training_data(section(path), tokenizer, preferences=False, max_length=None)


def test_up_to_one_percent_is_left_out_unasked_and_never_silently(tmp_path, capsys):
    recipe = make_world(tmp_path)
    rows = [{"question": f"what is {i}", "answer": "" if i == 50 else f"{i}"} for i in range(100)]
    write_rows(tmp_path / "numbers.jsonl", rows)
    words = [str(recipe), "--show-samples", "1"]
    assert main(words) == 0
    assert "left out 1 of 100 training rows: 1 empty 'answer' (row 51)" in capsys.readouterr().out
    assert main([*words, "data.on_bad_row=error"]) == 2
    assert "1 of 100 rows cannot be used" in capsys.readouterr().err
    assert main([*words, "data.limit=50", "data.on_bad_row=error"]) == 0
    write_rows(tmp_path / "numbers.jsonl", [{**row, "answer": ""} for row in rows])
    assert main([*words, "data.on_bad_row=skip"]) == 2


def test_the_rows_between_offset_and_limit_are_learned(tmp_path, tokenizer):
    rows = [{"prompt": f"q{i}", "response": "" if i in (1, 4) else f"a{i}"} for i in range(6)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"preferences": False, "max_length": None}
    data = training_data(section(path, offset=2, limit=2, on_bad_row="error"), tokenizer, **options)
    assert [example.row for example in data.examples] == [3, 4] and not data.bad
    data = training_data(section(path, offset=3, on_bad_row="skip"), tokenizer, **options)
    assert [example.row for example in data.examples] == [4, 6] and [row.row for row in data.bad] == [5]
    with pytest.raises(UserError, match=r"^data.offset: .*rows.jsonl has only 6 rows$"):
        training_data(section(path, offset=6), tokenizer, **options)


@pytest.mark.parametrize("said", [[], [("human", "a")], [("gpt", "a"), ("human", "b")], [("human", "a"), ("gpt", "")]])
def test_conversations_that_cannot_be_learned(tmp_path, tokenizer, said):
    rows = [{"conversations": [{"from": who, "value": text} for who, text in said]}, {"conversations": None}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="2 of 2 rows cannot be used"):
        training_data(section(path, messages="conversations"), tokenizer, preferences=False, max_length=None)


def test_chat_needs_a_chat_template(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(UserError, match="'chat' needs a model with a chat template"):
        training_data(section(path, template="chat"), tiny_tokenizer(), preferences=False, max_length=None)


def shown(recipe, **console):
    console = Console(soft_wrap=True, record=True, width=200, **console)
    show_samples(load_recipe(str(recipe)), 2, console)
    return console.export_text(styles=bool(console.is_terminal))


def test_the_preview_colors_what_is_learned(tmp_path, capsys):
    recipe = make_world(tmp_path)
    text = shown(recipe)
    assert "Question: what is 0+0\nAnswer⟦: it is 0</s>⟧" in text and text.count("⟦") == 3
    assert "\x1b[1;32m: it is 0</s>\x1b[0m" in shown(recipe, force_terminal=True, color_system="standard")
    assert main([str(recipe), "--show-samples", "0"]) == 2
    assert "--show-samples: a whole number of at least 1, not 0" in capsys.readouterr().err
    write_rows(tmp_path / "letters.jsonl", [{"question": "what is a", "answer": "a letter"}])
    tasks = "[{name: x}, {name: y, data: {path: letters.jsonl}}]"
    words = [str(recipe), f"sequence.tasks={tasks}", "--show-samples", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "numbers.jsonl, template qa" in out and "letters.jsonl, template qa" in out and out.count("⟦:") == 2
    words = ["grid.sweep={data.template: [qa, alpaca], training.learning_rate: [0.1, 0.2]}", "--seeds", "0,1"]
    assert main([str(recipe), *words, "--show-samples", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("row 1") == 2 and "template qa:\n" in out and "numbers.jsonl, template alpaca" in out


def test_the_preview_of_preferences_and_of_what_is_cut(tmp_path):
    pairs = [{"q": f"why {i}", "yes": "because it is so", "no": "no"} for i in range(3)]
    data = {
        "path": str(write_rows(tmp_path / "pairs.jsonl", pairs)),
        "prompt": "q",
        "response": "yes",
        "rejected": "no",
    }
    recipe = make_world(
        tmp_path, data={**data, "template": "qa"}, trainer="dpo", training={"max_length": 35, "bf16": False}
    )
    text = shown(recipe)
    assert "row 1 chosen" in text and "row 2 rejected" in text
    assert "⟦: because it is⟧ so</s>" in text and "⟦: no</s>⟧" in text
    end = make_world(
        tmp_path,
        data={**data, "template": "qa"},
        trainer="dpo",
        training={"max_length": 35, "truncation_mode": "keep_end", "bf16": False},
    )
    assert "⟦: because it is so</s>⟧" in shown(end)


def test_rows_that_are_cut_or_not_wanted_are_counted(tmp_path, tokenizer, capsys):
    rows = [{"prompt": "why", "completion": "so " * n, "label": n != 30} for n in (3, 20, 30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    said = "data: 2 of 3 training rows are longer than training.max_length (40 tokens); they are cut there and their ends are not"
    found = training_data(section(path, response="completion"), tokenizer, preferences=False, max_length=None)
    told = capsys.readouterr().out
    assert found.cut == 0 and said not in told
    assert "data: 1 of 3 rows have the label false, as answers that are not wanted have; all are learned" in told
    found = training_data(section(path, response="completion"), tokenizer, preferences=False, max_length=40)
    assert found.cut == 2 and said in capsys.readouterr().out
    taken = section(path, response="completion", offset=2)
    training_data(taken, tokenizer, preferences=False, max_length=None)
    assert "data: 1 of 1 rows have the label false" in capsys.readouterr().out


def test_pairs_that_differ_by_their_first_indentation_are_pairs(tmp_path, tokenizer):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "f", "response": "    return a", "rejected": "return a"}])
    (found,) = training_data(section(path, rejected="rejected"), tokenizer, preferences=True, max_length=None).examples
    assert found.written.text == found.rejected.text.replace(" return", "    return")


def test_pairs_that_are_equal_once_cut_are_left_out(tmp_path, tokenizer):
    pairs = [{"prompt": "why", "response": "so " * 40 + end, "rejected": "so " * 40 + "no"} for end in ("he", "she")]
    pairs[1]["rejected"] = "never"
    path = write_rows(tmp_path / "pairs.jsonl", pairs)
    options = {"preferences": True, "max_length": 64}
    found = training_data(section(path, rejected="rejected", on_bad_row="skip"), tokenizer, **options)
    assert [example.row for example in found.examples] == [2]
    assert [row.reason for row in found.bad] == ["chosen equal to rejected within max_length (64 tokens)"]
