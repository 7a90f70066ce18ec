"""What one can calibrate on: files of every kind and folders of them, several sources, the general mix, the model itself."""

import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from chats import assistant, call, chat_tokenizer, system, tool, user
from tiny import tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from world import make_world, write_rows

from lora_null.eval_harness.documents import CHUNK_CHARACTERS, chunks
from lora_null.recipes import caches
from lora_null.recipes.__main__ import main
from lora_null.recipes.commands import main as command
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.run_folder import MARK
from lora_null.recipes.config.schema import CalibrationSection, ModelSection
from lora_null.recipes.data.calibration import (
    GENERAL_MIX,
    PROMPTS,
    calibration_sources,
    cut_windows,
    shares,
)
from lora_null.recipes.job import inspect_recipe
from lora_null.recipes.models.bases import Base
from lora_null.trainer import CalibrationArgs, own_texts, written_texts
from lora_null.utils.errors import UserError

TALK = [user("1+1?"), assistant("2")]
WRITTEN = "<user>1+1?\n<assistant>2</s>\n"
PLAIN = "Question: 1+1?\nAnswer: 2</s>"  # where the model has no chat template


def texts(path, tokenizer=None, **keys):
    return calibration_sources(CalibrationSection(path=str(path), **keys), tokenizer or chat_tokenizer())[0].texts


FOUND = {  # rows → whether they are talk that a chat template writes
    "messages": ({"messages": TALK}, True),
    "sharegpt": ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}, True),
    "prompt and completion of messages": ({"prompt": TALK[:1], "completion": TALK[1:]}, True),
    "prompt and response": ({"prompt": "1+1?", "response": "2"}, True),
    "question and answers": ({"question": "1+1?", "answer": ["2", "two"]}, True),
    "instruction, input, output": ({"instruction": "1+1?", "input": "", "output": "2"}, True),
    "other names": ({"Frage": "1+1?", "Antwort": "2"}, True),
    "roles": ({"user": "1+1?", "bot": "2"}, True),
    "capitals": ({"Question": "1+1?", "Answer": 2}, True),
    "messages and a text": ({"prompt": TALK[:1], "response": "2"}, True),
    "a text and messages": ({"question": "1+1?", "response": TALK[1:]}, True),
    "a conversation beside": ({"history": [user("0?"), assistant("0")], "question": "1+1?", "answer": "2"}, True),
    "messages as JSON": ({"messages": json.dumps(TALK)}, True),
    "pairs with their prompt twice": (
        {"prompt": "1+1?\n", "chosen": TALK, "rejected": [TALK[0], assistant("3")]},
        True,
    ),
    "pairs": ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, True),
    "pairs that hold their prompt": ({"chosen": TALK, "rejected": [TALK[0], assistant("3")]}, True),
    "pairs of OpenAI": (
        {"input": {"messages": TALK[:1]}, "preferred_output": TALK[1:], "non_preferred_output": [assistant("3")]},
        True,
    ),
    "a solution and its answer": ({"problem": "1+1?", "answer": "3", "solution": "2"}, True),
    "other spellings of roles": (
        {"messages": [{"role": "User", "content": "1+1?"}, {"role": "ChatGPT", "content": "2"}]},
        True,
    ),
    "an article and its summary": ({"article": "1+1?", "highlights": "2", "id": "x"}, True),
    "a text and its summary": ({"text": "1+1?", "summary": "2", "title": "t"}, True),
    "a body and its answer": ({"title": "t", "body": "1+1?", "answer": "2"}, True),
    "text": ({"text": "one and one"}, False),
    "a single field": ({"sentence": "one and one"}, False),
    "a field that says who": ({"name": "one and one"}, False),
    "who said it": ({"Author": "Ann", "Message": "one and one"}, False),
    "who and when": ({"date": "1832-05-01", "time": "12:00", "sender": "Ann", "message": "one and one"}, False),
    "a mail": ({"from": "ann@mill", "to": "bob@mill", "value": "one and one"}, False),
    "a file": ({"path": "notes/a.md", "markdown": "one and one"}, False),
    "an address": ({"url": "https://mill", "story": "one and one"}, False),
}


class TestWhatRowsAreIsFoundOut:
    @pytest.mark.parametrize("kind", FOUND)
    def test_with_and_without_a_chat_template(self, tmp_path, kind):
        row, talk = FOUND[kind]
        path = write_rows(tmp_path / "rows.jsonl", [row, row])
        assert texts(path) == [WRITTEN if talk else "one and one"] * 2
        assert texts(path, tiny_tokenizer()) == [PLAIN if talk else "one and one"] * 2

    @pytest.mark.parametrize("kind", [kind for kind, (_, talk) in FOUND.items() if talk])
    def test_without_answers(self, tmp_path, kind):
        path = write_rows(tmp_path / "rows.jsonl", [FOUND[kind][0]])
        assert texts(path, answers=False) == ["<user>1+1?\n<assistant>"]
        assert texts(path, tiny_tokenizer(), answers=False) == ["Question: 1+1?\nAnswer:"]

    def test_rows_without_answers(self, tmp_path, capsys):
        rows = [
            {"question": "1+1?", "answer": "2"},
            {"question": "1+1?", "answer": ""},
            {"question": "1+1?", "answer": None},
        ]
        path = write_rows(tmp_path / "rows.jsonl", rows)
        assert texts(path, answers=False) == ["<user>1+1?\n<assistant>"] * 3
        assert "hold no text" not in capsys.readouterr().out
        assert texts(path) == [WRITTEN]
        assert "2 of 3 rows of calibration hold no text" in capsys.readouterr().out

    def test_system_texts_tools_and_several_turns(self, tmp_path):
        talk, tools = [user("1+1?"), call(), tool("2"), assistant("It is 2.")], [{"name": "add"}]
        named = [{"tools": tools}, {"functions": tools}, {"functions": json.dumps(tools), "tools": []}]
        named += [{"tools": [{"type": "function", "function": tools[0]}], "functions": ["f"]}]
        rows = [{"messages": talk, **each} for each in named] + [{"messages": {"messages": talk, "tools": tools}}]
        assert texts(write_rows(tmp_path / "calls.jsonl", rows)) == [
            '<tools>[{"type": "function", "function": {"name": "add"}}]\n'
            '<user>1+1?\n<assistant>[add {"a": 1}]</s>\n<tool>2\n<assistant>It is 2.</s>\n'
        ] * len(rows)
        others = [{"messages": talk, "functions": other} for other in ("f, g", ["f"], [{"code": "x"}])]
        assert "tools" not in "".join(texts(write_rows(tmp_path / "others.jsonl", others)))
        row = {"system": "Be brief.", "prompt": "1+1?", "response": "2"}
        assert texts(write_rows(tmp_path / "system.jsonl", [row])) == [f"<system>Be brief.\n{WRITTEN}"]
        several = {"messages": [system("S"), *TALK, user("and 1?"), assistant("3")]}
        path = write_rows(tmp_path / "several.jsonl", [several])
        assert texts(path, answers=False)[0].endswith("<user>and 1?\n<assistant>")
        assert texts(path, field="messages", answers=False) == texts(path, answers=False)

    @pytest.mark.parametrize("mark", ",;\t|")
    def test_delimiters(self, tmp_path, mark):
        path = tmp_path / f"rows.{'tsv' if mark == chr(9) else 'csv'}"
        path.write_text(f'question{mark}answer\n"1+1?"{mark}2\n')
        assert texts(path) == [WRITTEN]

    def test_parquet_and_an_array(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": TALK}]), tmp_path / "rows.parquet")
        (tmp_path / "rows.json").write_text(json.dumps([{"messages": TALK}]))
        assert texts(tmp_path / "rows.parquet") == texts(tmp_path / "rows.json") == [WRITTEN]

    @pytest.mark.parametrize("names", ["c d e", "system chat", "system_prompt response", "id story", "post_id story", "role text", "role content", "id role text lang", "from to", "author id story"])  # fmt: skip
    def test_unknown_fields(self, tmp_path, names):
        path = write_rows(tmp_path / "rows.jsonl", [dict.fromkeys(names.split(), "x")])
        listed = ", ".join(names.split())
        with pytest.raises(UserError, match=rf"calibration\.path: the fields {listed} are no conversation"):
            texts(path)

    @pytest.mark.parametrize(
        "names", [("from", "value"), ("Role", "content"), ("sender", "text"), ("from", "content")]
    )
    def test_rows_of_single_turns(self, tmp_path, names):
        (tmp_path / "talk.json").write_text(
            json.dumps([dict(zip(names, said)) for said in (("human", "1+1?"), ("gpt", "2"))])
        )
        with pytest.raises(
            UserError, match=r'no conversation; if each row is a turn of one, .*: \{"messages": \[...\]\}'
        ):
            texts(tmp_path / "talk.json")

    def test_a_system_text_stands_once(self, tmp_path):
        talk = [system("S"), *TALK]
        row = {"prompt": "1+1?", "chosen": talk, "rejected": [*talk[:2], assistant("3")]}
        assert texts(write_rows(tmp_path / "rows.jsonl", [row])) == [f"<system>S\n{WRITTEN}"]
        path = write_rows(tmp_path / "same.jsonl", [{"system": "S\n", "messages": talk}])
        assert texts(path) == [f"<system>S\n{WRITTEN}"]
        row = {"system": "Be brief.", "messages": talk}
        with pytest.raises(UserError, match="1 'system' beside a conversation that has a system text of its own"):
            texts(write_rows(tmp_path / "two.jsonl", [row]))

    def test_bad_rows_by_number(self, tmp_path, capsys):
        rows = [{"messages": TALK}, {"messages": [user("a"), 5]}, {"messages": []}]
        with pytest.raises(UserError, match=r"calibration: 1 of 2 rows .*: 1 a conversation with a int .* \(row 2\)"):
            texts(write_rows(tmp_path / "rows.jsonl", rows))
        assert texts(write_rows(tmp_path / "rows.jsonl", [*rows, *[rows[0]] * 98])) == [WRITTEN] * 99
        assert "left out 1 of 100 rows of calibration: 1 a conversation with a int" in capsys.readouterr().out
        path = write_rows(tmp_path / "rows.jsonl", [rows[0]] * 99)
        path.write_text(path.read_text() + '{"messages": [')  # broken off
        assert texts(path) == [WRITTEN] * 99
        assert "left out 1 of 100 rows of calibration: 1 no complete JSON (row 100)" in capsys.readouterr().out
        path.write_text('{"messages": [')
        with pytest.raises(UserError, match=r"calibration: no row can be used: 1 no complete JSON \(row 1\)"):
            texts(path)

    @pytest.mark.parametrize("keys", [{}, {"field": "text"}])
    def test_texts_have_no_answers_to_leave_out(self, tmp_path, keys):
        path = write_rows(tmp_path / "rows.jsonl", [{"text": "one and one"}])
        with pytest.raises(UserError, match=r"calibration\.answers: false goes with conversations and questions"):
            texts(path, answers=False, **keys)

    def test_first_rows_only(self, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl", [{"text": f"t{i}"} for i in range(5)])
        assert texts(path, limit=2) == ["t0", "t1"]


class TestTextFiles:
    def test_chunks(self):
        text = "\n\n".join(f"{i} " + "word " * (i * 37 % 200) for i in range(60))
        text += "\n\n" + "x" * (3 * CHUNK_CHARACTERS)
        found = chunks(text)
        assert all(len(chunk) <= CHUNK_CHARACTERS for chunk in found) and len(found) < 40
        assert "".join("".join(found).split()) == "".join(text.split())

    @pytest.mark.parametrize("line, end", [("12:00 Ann: the mill, e.g. its wheel. It", "It"), ("Bread at six. ", "."), ("The mill burned「早い。」", "」"), ("おはようです。", "。"), ("mill ", "mill"), ("x" * 700 + " " + "x" * 900, "x")])  # fmt: skip
    def test_a_long_paragraph_is_cut_at_a_line_a_sentence_or_a_word(self, line, end):
        text = "\n".join([line] * 200) if end == "It" else line * 1100
        found = chunks(text)
        assert len(found) > 2 and all(chunk.endswith(end) and len(chunk) <= CHUNK_CHARACTERS for chunk in found)
        assert all(len(chunk) >= CHUNK_CHARACTERS // 2 for chunk in found[:-1]) or line[0] == "x"
        assert "".join("".join(found).split()) == "".join(text.split())

    def test_a_folder_of_notes(self, tmp_path):
        notes = tmp_path / "notes"
        (notes / "deep").mkdir(parents=True)
        (notes / ".git").mkdir()
        (notes / "a.txt").write_text("The mill was built in 1832.\r\n\r\nIt burned down.")
        (notes / "b.md").write_text("# Bakery\n\nBread at six.")
        (notes / "deep" / "c.md").write_bytes("\ufeffÉtang".encode())
        (notes / "empty.txt").write_text("")
        (notes / ".git" / "d.txt").write_text("not a note")
        (notes / "run").mkdir()  # such as `lora-null train` leaves where its user keeps notes
        (notes / "run" / "recipe.yaml").write_text(MARK)
        (notes / "run" / "report.md").write_text("not a note either")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "e.md").write_text("Linked.")
        for link, to in {notes / "x": elsewhere, notes / "y": elsewhere, notes / "up": tmp_path, elsewhere / "self": elsewhere, notes / "z": notes / "deep"}.items():  # fmt: skip
            link.symlink_to(to)
        (notes / "gone.md").symlink_to(tmp_path / "nowhere.md")
        found = texts(notes)
        assert found[3:] == ["Linked."]
        assert found[:3] == ["The mill was built in 1832.\n\nIt burned down.", "# Bakery\n\nBread at six.", "Étang"]
        assert texts(notes / "a.txt") == found[:1]

    def test_the_end_of_a_chunk_can_be_asked_for(self, tmp_path):
        (tmp_path / "a.txt").write_text("one two three four five six seven eight nine")
        path = tmp_path / "a.txt"
        assert texts(path, template="{beginning}|{ending}") == ["one two three four five six|seven eight nine"]
        path.write_text("今日は六時半に起きた", encoding="utf-8")  # no space parts its words
        assert texts(path, template="{beginning}|{ending}") == ["今日は六時半|に起きた"]

    def test_wrong_encoding(self, tmp_path):
        (tmp_path / "a.txt").write_text("fine")
        (tmp_path / "b.txt").write_bytes(b"caf\xe9")
        with pytest.raises(UserError, match=r"cannot read .*b\.txt as text .*utf-8"):
            texts(tmp_path)


WRONG = {
    "takes one of path, source and sources, not path and source": {"path": "a", "source": "general"},
    "'self' goes with source: self": {"source": "general", "self": "bos"},
    "calibration.source: input should be 'general' or 'self'": {"source": "model"},
    "'field' goes with a path": {"source": "self", "field": "text"},
    "no key 'calibration.sources.0.wieght' (did you mean 'weight'?)": {"sources": [{"path": "a", "wieght": 2}]},
    "calibration.sources.0.weight: input should be greater than 0": {"sources": [{"path": "a", "weight": 0}]},
    "'answers: false' goes with rows": {"self": "data", "answers": False},
    "'split' goes with a path": {"source": "general", "split": "test"},
    "'answers' goes with a path, inside of sources": {"sources": ["a", "general"], "answers": False},
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes(tmp_path, message):
    with pytest.raises(UserError) as raised:
        load_recipe(str(make_world(tmp_path, calibration=WRONG[message])))
    assert message in str(raised.value) and str(raised.value).startswith("tiny: ")


SHORT = {
    "self": {"source": "self", "self": "prompts"},
    "general": {"source": "general"},
    "notes": {"path": "notes"},
    None: {"source": "general"},
}


class TestInARecipe:
    @pytest.mark.parametrize("short", SHORT)
    def test_one_word(self, tmp_path, short):
        section = load_recipe(str(make_world(tmp_path, calibration=short))).calibration
        assert {key: getattr(section, key) for key in SHORT[short]} == SHORT[short]

    @pytest.mark.parametrize(
        "words, titles, field",
        [
            (["calibration=self"], ["what the model writes after the shipped prompts"], None),
            (["calibration.self=bos"], ["what the model writes from nothing"], None),
            (["calibration.self=bos", "calibration.source=self"], ["what the model writes from nothing"], None),
            (["calibration.source=general"], ["the general mix"], None),
            (["calibration.path=b.jsonl"], ["b.jsonl"], "question"),
            (["calibration=[b.jsonl, {self: data, weight: 3}]"], ["b.jsonl", "what the model writes after the prompts of the data"], None),
            (["calibration=self", "calibration.path=c.jsonl"], ["c.jsonl"], None),
        ],
    )  # fmt: skip
    def test_what_is_laid_over_takes_the_place_of_what_was_there(self, tmp_path, words, titles, field):
        own = {"path": "a.jsonl", "field": "question", "samples": 7}
        section = load_recipe(str(make_world(tmp_path, calibration=own)), words).calibration
        assert [source.title for source in section.each] == titles
        assert (section.samples, section.field) == (7, field)

    def test_weights_are_shares_of_the_windows(self, tmp_path):
        assert shares([1, 1, 1], 256) == [86, 85, 85] and shares([3, 1], 6) == [5, 1] and sum(shares([0.2, 7], 9)) == 9
        for name in "ab":
            write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i} is some town"} for i in range(40)])
        given = [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, str(tmp_path / "b.jsonl")]
        section = CalibrationSection(sources=given, mode="separate", samples=16)
        found = cut_windows(
            calibration_sources(section, tiny_tokenizer()), tiny_tokenizer(), CalibrationArgs(16, 8, "separate")
        )
        starts = [tiny_tokenizer().decode(window)[0] for window in found.ids]
        assert starts == ["a"] * 12 + ["b"] * 4
        ends = (
            "12 windows, 96 tokens, 12 of them up to max_length",
            "4 windows, 32 tokens, 4 of them up to max_length",
        )
        assert found.covered == [f"{given[0]['path']}: {ends[0]}", f"{given[1]}: {ends[1]}"]

    def test_a_source_with_too_few_texts_is_told(self, tmp_path):
        write_rows(tmp_path / "a.jsonl", [{"text": "a town"}] * 3)
        section = CalibrationSection(sources=[{"path": str(tmp_path / "a.jsonl")}], mode="separate")
        found = cut_windows(
            calibration_sources(section, tiny_tokenizer()), tiny_tokenizer(), CalibrationArgs(8, 8, "separate")
        )
        assert found.covered[0].endswith("a.jsonl: 3 of 8 windows, 18 tokens")


def test_the_general_mix_is_small_attributed_and_read_by_every_model():
    assert GENERAL_MIX.stat().st_size < 200_000
    rows = [json.loads(line) for line in GENERAL_MIX.read_text().splitlines()]
    attributed = (GENERAL_MIX.parent / "README.md").read_text()
    assert all(f"| {kind} " in attributed for kind in {row["kind"] for row in rows})
    for tokenizer in (tiny_tokenizer(), chat_tokenizer()):
        assert len(calibration_sources(CalibrationSection(), tokenizer)[0].texts) == len(rows)
    held_out = [json.loads(line) for file in GENERAL_MIX.parent.glob("*_test.jsonl") for line in file.open()]
    mix = GENERAL_MIX.read_text().lower()
    asked = [str(row.get("question") or row["prompt"]).lower() for row in held_out]
    assert not [text for text in asked if len(text) > 30 and json.dumps(text)[1:-1] in mix]


class TestWhatTheModelWrites:
    def test_seeded_and_tokenized_again_to_the_same(self):
        model, tokenizer = tiny_model(), chat_tokenizer()
        write = lambda **more: own_texts(model, tokenizer, **{"count": 20, "max_tokens": 24, "seed": 1, **more})  # noqa: E731
        found = write()
        assert found == write() and found != write(seed=2) and len(set(found)) == 20
        assert write(count=16) == found[:16]
        lengths = [len(tokenizer(text)["input_ids"]) for text in found]
        assert max(lengths) <= 24 and all(text.startswith("<s>") for text in found)

    def test_the_distribution_is_the_models(self):
        """The first tokens written come as often as the softmax says: within 5 standard errors of 4,000 draws."""
        model, tokenizer = tiny_model(), tiny_tokenizer()
        with torch.no_grad():
            expected = model(torch.tensor([[1]])).logits[0, -1].double().softmax(-1)
        found = own_texts(model, tokenizer, count=4000, max_tokens=2)
        second = torch.tensor([tokenizer(text)["input_ids"][1] for text in found])
        observed = torch.bincount(second, minlength=len(expected)).double() / 4000
        assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()

    def test_the_same_for_any_number_of_processes(self, monkeypatch):
        model, tokenizer = tiny_model(), tiny_tokenizer()
        expected, found = own_texts(model, tokenizer, count=70, max_tokens=12), {}
        for index in range(3):
            monkeypatch.setattr(
                written_texts, "my_share", lambda keys, _, index=index: [key for key in keys if key % 3 == index]
            )
            monkeypatch.setattr(written_texts, "merge_shares", lambda compute: found.update(compute()) or {**found, **dict.fromkeys(set(range(70)) - set(found), "")})  # fmt: skip
            own_texts(model, tokenizer, count=70, max_tokens=12)
        assert [found[i] for i in range(70)] == expected

    def test_after_prompts(self):
        found = own_texts(tiny_model(), chat_tokenizer(), count=5, max_tokens=30, prompts=["who", "what is"])
        assert [text.startswith(("who", "what is")[i % 2]) for i, text in enumerate(found)] == [True] * 5
        (one,) = own_texts(tiny_model(), chat_tokenizer(), count=1, max_tokens=30, prompts="what is")
        assert one.startswith("what is")

    def test_prompts_that_leave_no_room(self):
        with pytest.raises(UserError, match="every prompt is longer than half of max_length"):
            own_texts(tiny_model(), tiny_tokenizer(), count=1, max_tokens=4, prompts=["a long prompt"])

    def test_prompts_that_are_left_out_are_counted(self, caplog):
        asked = {"count": 4, "max_tokens": 20}
        for prompts, told in ((["ab", "long " * 10, "other " * 10], 1), (["ab"], 0)):
            caplog.clear()
            found = own_texts(tiny_model(), tiny_tokenizer(), prompts=prompts, **asked)
            assert all(text.startswith("ab") for text in found)
            assert caplog.text.count("2 of 3 prompts are longer than 10 tokens, half of max_length") == told
            assert len(caplog.records) == told

    def test_prompts_longer_than_a_position_table(self):
        torch.manual_seed(0)
        sizes = dict(vocab_size=101, n_positions=32, n_embd=32, n_layer=1, n_head=2)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
        with pytest.raises(UserError, match=r"every prompt is longer than half of max_length \(32 tokens\)"):
            own_texts(model, tiny_tokenizer(), count=1, max_tokens=256, prompts=["x" * 100])
        (text,) = own_texts(model, tiny_tokenizer(), count=1, max_tokens=256, prompts=["x" * 100, "who"])
        assert text.startswith("who")

    def test_the_shipped_prompts_reach_the_model_as_questions(self):
        count = sum(1 for line in PROMPTS.read_text().splitlines() if line and line[0] != "#")
        for tokenizer, start in ((chat_tokenizer(), "<user>"), (tiny_tokenizer(), "Question: ")):
            (source,) = calibration_sources(CalibrationSection(source="self"), tokenizer)
            assert len(source.prompts) == count > 100 and all(text.startswith(start) for text in source.prompts)

    def test_in_a_run(self, tmp_path):
        recipe = str(make_world(tmp_path, calibration={"self": "data", "samples": 24, "max_length": 64}))
        words = ["training.max_steps=1", "training.save_strategy=no", "eval.task=[]", "eval.retention=[]"]
        assert main([recipe, "--method", "lora-null-v2", *words]) == 0
        settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
        assert settings["calibration_windows"] == 24
        told = "what the model writes after the prompts of the data: 24 windows"
        assert settings["calibration_data"].startswith(told) and told in (tmp_path / "out" / "report.md").read_text()

    def test_once_on_a_machine(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "cache"))
        base = Base(load_recipe(str(make_world(tmp_path))).model)
        (source,) = calibration_sources(CalibrationSection(self="bos"), tiny_tokenizer())

        def written(**changes):
            cache = changes.pop("cache", True)
            cut = CalibrationArgs(**{"samples": 8, "max_length": 24, "seed": 0} | changes)
            return caches.written_windows(base, tiny_tokenizer(), [source], cut, cache)

        first = written()
        monkeypatch.setattr(caches, "base_to_run", lambda *_: pytest.fail("the model was to write again"))
        assert written() == first and "8 texts that the model wrote before" in capsys.readouterr().out
        for other in ({"seed": 1}, {"max_length": 25}, {"cache": False}):
            with pytest.raises(pytest.fail.Exception):
                written(**other)

    def test_rows_without_prompts(self):
        with pytest.raises(UserError, match=r"calibration\.self: there are no prompts in data to write after"):
            calibration_sources(CalibrationSection(self="data"), tiny_tokenizer())

    def test_init_calibrates_on_the_mix_and_on_the_model(self, tmp_path, capsys):
        make_world(tmp_path)
        base = [
            "init",
            "--model",
            str(tmp_path / "model"),
            *["--dtype", "float32", "--rank", "4", "--samples", "8"],
            "--out",
        ]
        assert command([*base, str(tmp_path / "a"), "--max-length", "64"]) == 0
        assert command([*base, str(tmp_path / "b"), "--calibration", "self", "--max-length", "200"]) == 0
        said = capsys.readouterr().out
        assert "calibration: the general mix: 8 windows" in said and "after the shipped prompts: 8 windows" in said
        assert command([*base, str(tmp_path / "c"), "--calibration", "self", "--low-memory"]) == 2


def test_pairs_of_texts_are_no_question_and_answer(tmp_path):
    """The second of them is what is not to be learned."""
    for names in (("chosen", "rejected"), ("Chosen", "Rejected")):
        path = write_rows(
            tmp_path / "pairs.jsonl", [dict(zip(names, ("Human: a? Assistant: b", "Human: a? Assistant: c")))] * 4
        )
        with pytest.raises(UserError, match="chosen and rejected are texts without a prompt; what both begin with"):
            texts(path)


def test_a_downloaded_data_set_is_not_its_card(tmp_path):
    (tmp_path / "README.md").write_text("# A data set\n\nWith rows.\n")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train-00000-of-00001.jsonl", [{"text": f"row {i}"} for i in range(3)])
    assert texts(tmp_path) == ["row 0", "row 1", "row 2"]
    with pytest.raises(UserError, match=rf"holds data in {tmp_path / 'data'}; name that folder, or the split"):
        texts(tmp_path, split="test")
    (tmp_path / "notes.md").write_text("The mill was built in 1832.\n")  # a folder of notes with some data below
    assert any("mill" in text for text in texts(tmp_path, split="test"))


UNREAD = ["train.jsonl.gz", "data/data-00000-of-00001.arrow", "a.docx", "data/a.org", "a.markdown", "a.py"]


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("card", ["README.md", "index.md"])
def test_data_that_is_not_read_is_not_its_card(tmp_path, name, card):
    (tmp_path / "data").mkdir()
    for written in (card, "dataset_infos.json", "data/state.json", name):
        (tmp_path / written).write_text('{"about": "the data"}')
    with pytest.raises(
        UserError, match=rf"calibration\.path: {tmp_path / name} is of no kind that is read \(\.json, "
    ):
        texts(tmp_path)
    (tmp_path / "notes.md").write_text("The mill was built in 1832.\n")  # a folder of notes with something else in it
    assert any("mill" in text for text in texts(tmp_path))


def test_what_is_not_read_in_a_folder_is_told_once(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    names = ["a.md", "mill.png", "LICENSE", ".hidden.docx", "b.docx", "deep/c.DOCX", "deep/d.jsonl", "e"]
    for name in (*names, *(f"deep/more.{i}" for i in range(6))):
        (tmp_path / name).write_text("{}")
    texts(tmp_path), texts(tmp_path)
    told = f"not read in {tmp_path}: 2 .docx, 1 .0, 1 .1, 1 .2, 1 .3, 1 .4, 3 others\n"
    assert capsys.readouterr().out == told
    for name in ("Tasks.csv", "Books.csv"):  # as Notion exports databases beside its pages
        (tmp_path / name).write_text("task,done\n1,2\n")
    assert texts(tmp_path) == ["{}"]
    assert f"not read in {tmp_path}: 2 .docx, 2 .csv, " in capsys.readouterr().out
    (tmp_path / "Tasks.csv").unlink(), (tmp_path / "Books.csv").unlink()
    for name in ("test.csv", "Tasks.jsonl"):  # which are data sets
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=f"no 'train' in .*{name.partition('.')[0]}"):
            texts(tmp_path)
        (tmp_path / name).unlink()
    write_rows(tmp_path / "train-0.jsonl", [{"text": "row"}])
    write_rows(tmp_path / "train-1.jsonl.gz", [{"text": "row"}])
    assert texts(tmp_path) == ["row"]
    assert capsys.readouterr().out == f"not read in {tmp_path}: 1 .docx, 1 without a suffix, 1 .gz, 1 .md\n"


def test_a_split_is_its_own_file_or_its_shards_and_what_else_is_called_so_is_told(tmp_path, capsys):
    for name in ("train.jsonl", "train.old.jsonl", "train-v1.jsonl"):
        write_rows(tmp_path / name, [{"text": name}])
    assert texts(tmp_path) == ["train.jsonl"]
    assert capsys.readouterr().out == f"not read in {tmp_path}, beside train.jsonl: train-v1.jsonl, train.old.jsonl\n"
    (tmp_path / "train.jsonl").unlink()
    assert texts(tmp_path) == ["train-v1.jsonl", "train.old.jsonl"]
    assert capsys.readouterr().out == f"read in {tmp_path}: train-v1.jsonl, train.old.jsonl\n"
    for shard in ("train-00000-of-00002", "train-00001-of-00002"):
        write_rows(tmp_path / f"{shard}.jsonl", [{"text": shard}])
    assert texts(tmp_path) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert "beside train-00000-of-00002.jsonl: train-v1.jsonl, train.old.jsonl\n" in capsys.readouterr().out


def test_texts_in_a_wrong_encoding_are_bad_rows(tmp_path):
    write_rows(tmp_path / "notes.jsonl", [{"text": "caf\ufffd"}, {"text": "tea"}])
    with pytest.raises(UserError, match=r"1 of 2 rows cannot be used: 1 wrong encoding"):
        texts(tmp_path / "notes.jsonl")


def test_what_describes_a_data_set_is_not_its_data(tmp_path):
    for name in ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"):
        (tmp_path / name).write_text('{"text": "about"}')
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.ndjson", [{"text": "row"}])
    assert texts(tmp_path) == ["row"]


def test_a_limit_counts_rows_as_training_does(tmp_path):
    """By their number in the file: what lies behind it is held out."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"text": "row {i}"}}\n\n' for i in range(1, 11))
    )  # numbers 1, 3, 5, …
    assert texts(tmp_path / "rows.jsonl", limit=5) == ["row 1", "row 2", "row 3"]


def test_pairs_of_some_rows_without_an_input(tmp_path):
    rows = [{"instruction": "1+1?", "input": "now", "output": "2"}, {"instruction": "1+1?", "output": "2"}]
    assert len(texts(write_rows(tmp_path / "rows.jsonl", rows))) == 2


def test_a_template_of_empty_fields_is_no_text(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": "who", "a": None}, {"q": "", "a": None}, {"other": 1}])
    assert texts(rows, template="Q: {q}? A: {a}") == ["Q: who? A: "]


def test_windows_may_have_a_seed_of_their_own(tmp_path):
    path = str(make_world(tmp_path))
    found = [
        inspect_recipe(load_recipe(path, words)).calibration_args.seed
        for words in (["seed=3"], ["seed=3", "calibration.seed=7"])
    ]
    assert found == [3, 7]


def test_own_texts_are_known_by_the_end_they_were_written_to():
    source, cut = SimpleNamespace(prompts=["a"]), CalibrationArgs()
    bases = [Base(ModelSection(name_or_path="m", eos_token=end)) for end in (None, "<e>")]
    keys = [caches._texts_key(base, source, 4, cut) for base in bases]
    assert keys[0] != keys[1]
