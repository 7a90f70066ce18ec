"""`lora-null new`: from a file of data to a recipe that passes --dry-run, shows its rows and trains."""

import json
import shlex
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from chats import THINKING, assistant, call, chat_tokenizer, system, tool, user
from tiny import save_tiny
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2MoeConfig, Qwen2MoeForCausalLM
from world import write_rows

from lora_null.recipes.commands import main, new
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.models import bases, smollm2
from lora_null.utils.errors import UserError


def sharegpt(i):
    return [{"from": "human", "value": f"what is {i}"}, {"from": "gpt", "value": f"it is {i}"}]


def chatgpt(i):
    said = [None, ("user", f"what is {i}"), ("assistant", f"it is {i}")]
    nodes = [
        each and {"author": {"role": each[0]}, "content": {"content_type": "text", "parts": [each[1]]}}
        for each in said
    ]
    tree = {str(n): {"message": message, "parent": str(n - 1) if n else None} for n, message in enumerate(nodes)}
    return {"title": "t", "mapping": tree, "current_node": "2"}


def claude(i):
    said = [("human", f"what is {i}"), ("assistant", f"it is {i}")]
    return {
        "uuid": i,
        "name": "",
        "chat_messages": [{"sender": who, "text": text, "content": []} for who, text in said],
    }


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
KINDS = {  # name → (row by number, format, keys of `data`, held-out rows asked for by)
    "messages": (lambda i: {"messages": [system("S"), user(f"q {i}"), assistant("a")]}, "messages", {"messages": "messages", "template": "chat"}, "messages"),
    "sharegpt": (lambda i: {"id": i, "conversations": sharegpt(i)}, "ShareGPT conversations", {"messages": "conversations"}, "messages"),
    "an export of ChatGPT": (chatgpt, "messages", {"messages": "messages", "template": "chat"}, "messages"),
    "an export of Claude": (claude, "messages", {"messages": "messages", "template": "chat"}, "messages"),
    "tools": (lambda i: {"messages": [user(f"{i}?"), call(), tool("2"), assistant("2")], "tools": [TOOL]}, "messages", {"messages": "messages"}, "messages"),
    "system": (lambda i: {"system": "Be kind." * (i % 2), "prompt": f"q {i}", "completion": "a"}, "prompt and completion, with system texts", {"prompt": "prompt", "response": "completion", "system": "system"}, "prompt"),
    "alpaca": (lambda i: {"instruction": f"do {i}", "input": "x" * (i % 2), "output": "done"}, "instruction, input and output", {"prompt": "{instruction}\n\n{input}", "response": "output"}, "prompt"),
    "context": (lambda i: {"instruction": f"do {i}", "context": "x" * (i % 2), "response": "done", "category": "a"}, "context, instruction and response", {"prompt": "{context}\n\n{instruction}", "response": "response"}, "prompt"),
    "passages": (lambda i: {"question": f"q {i}", "context": {"sentences": ["x"]}, "answer": "a"}, "question and answer", {"prompt": "question", "response": "answer"}, "prompt"),
    "pairs with an input": (lambda i: {"instruction": f"do {i}", "input": "x", "chosen": "good", "rejected": "bad"}, "preference pairs", {"prompt": "{instruction}\n\n{input}", "response": "chosen"}, "preferences"),
    "pairs of sharegpt": (lambda i: {"conversations": sharegpt(i)[:1], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}, "preference pairs", {"prompt": "conversations", "response": "chosen"}, "preferences"),
    "answers": (lambda i: {"id": i, "question": f"who {i}", "answer": [f"k{i}", "other"]}, "question and answer", {"prompt": "question", "response": "answer"}, "prompt"),
    "pairs": (lambda i: {"prompt": f"q {i}", "chosen": "good", "rejected": "bad"}, "preference pairs", {"prompt": "prompt", "response": "chosen", "rejected": "rejected"}, "preferences"),
    "pairs of messages": (lambda i: {"chosen": [user(f"q {i}"), assistant("good")], "rejected": [user(f"q {i}"), assistant("bad")]}, "preference pairs", {"prompt": None, "response": "chosen"}, "preferences"),
    "pairs of OpenAI": (lambda i: {"input": {"messages": [user(f"q {i}")], "tools": []}, "preferred_output": [assistant("good")], "non_preferred_output": [assistant("bad")]}, "preference pairs", {"prompt": "input", "response": "preferred_output", "rejected": "non_preferred_output"}, "preferences"),
    "worked solutions": (lambda i: {"problem": f"{i}+1", "solution": "count on", "answer": "2"}, "problem and solution", {"prompt": "problem", "response": "solution"}, "prompt"),
    "summaries": (lambda i: {"document": f"d {i}", "summary": "s", "id": i}, "document and summary", {"prompt": "document", "response": "summary"}, "prompt"),
    "text": (lambda i: {"text": f"the mill of town {i} was built long ago"}, "plain text", {"text": "text", "template": "plain"}, None),
}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_null.recipes.measure.base_to_run", lambda *_: pytest.fail("weights were loaded"))
    save_tiny(Path("model"))
    chat_tokenizer().save_pretrained("model")
    return tmp_path


def make(*words, data="rows.jsonl", code=0):
    assert main(["new", "--model", "model", "--data", data, *words]) == code
    return load_recipe("rows.yaml") if not code else None


def test_a_recipe_elsewhere_names_the_file_that_was_looked_at(world, monkeypatch):
    for folder in ("here", "."):
        Path(folder, "data").mkdir(parents=True, exist_ok=True)
        write_rows(
            Path(folder, "data", "rows.jsonl"), [{"prompt": f"{folder} {i}", "response": "x"} for i in range(50)]
        )
    monkeypatch.chdir("here")
    assert main(["new", "--model", "../model", "--data", "data/rows.jsonl", "--out", "recipes/r.yaml"]) == 0
    recipe = load_recipe("recipes/r.yaml")
    assert {recipe.data.path, recipe.eval.task[0].path} == {str(world / "here" / "data" / "rows.jsonl")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(world, capsys, kind):
    row, name, keys, asked = KINDS[kind]
    write_rows(Path("rows.jsonl"), map(row, range(80)))
    recipe = make()
    said = capsys.readouterr().out
    unused = {"sharegpt": "id", "context": "category", "passages": "context", "answers": "id", "worked solutions": "answer", "summaries": "id"}  # fmt: skip
    assert (f"not used    the fields {unused.get(kind)}\n" in said) == (kind in unused) == ("not used" in said)
    assert "also learned" not in said
    assert (
        f"rows.jsonl: 80 rows, {name}\n" in said
        and "row 2" in said
        and "⟦" in said
        and "lora-null train rows.yaml" in said
    )
    assert {key: getattr(recipe.data, key) for key in keys} == keys
    assert recipe.data.limit == (72 if asked else None) and recipe.training["logging_steps"] == 0.01
    assert recipe.trainer == ("dpo" if "pairs" in kind else "sft")
    assert recipe.calibration.source == "general" and len(recipe.eval.retention) == 4
    if asked is None:
        assert recipe.eval.task == []
    else:
        (entry,) = recipe.eval.task
        assert getattr(entry, asked) and entry.offset == 72
    assert main(["train", "rows.yaml", "--dry-run"]) == 0


CUT = {"comma": ("rows.csv", ","), "semicolon": ("rows.csv", ";"), "bar": ("rows.csv", "|"), "tab": ("rows.tsv", "\t")}
COMMAS = ('"Frage, ganz"', "Frage (kurz, klar)")  # which a header may hold


@pytest.mark.parametrize(("kind", "header"), [*((kind, "Frage") for kind in CUT), *(("semicolon", h) for h in COMMAS)])
def test_delimiters(world, kind, header):
    name, mark = CUT[kind]
    Path(name).write_text(f"{header}{mark}Antwort\n" + "".join(f'"was ist {i}?"{mark}{i}x\n' for i in range(50)))
    recipe = make(data=name)
    assert (recipe.data.prompt, recipe.data.response, recipe.data.limit) == (header.strip('"'), "Antwort", 45)


def test_parquet_arrays_texts_and_folders(world):
    rows = [KINDS["messages"][0](i) for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    assert make(data="rows.parquet").data.messages == "messages"
    Path("rows.yaml").unlink()
    Path("rows.json").write_text(json.dumps(rows))
    recipe = make(data="rows.json")
    assert recipe.data.messages == "messages" and recipe.data.limit is None and recipe.eval.task == []
    Path("rows.yaml").unlink()
    Path("rows").mkdir()
    for i in range(45):
        Path(f"rows/{i}.md").write_text(f"# Town {i}\n\n" + "The mill was built in 1832. " * 5)
    Path("rows/test.csv").write_text("task;done\n1;2\n")
    make(data="rows", code=2)  # what is to be learned?
    Path("rows/test.csv").rename("rows/Tasks.csv")
    recipe = make(data="rows")
    assert (recipe.data.text, recipe.data.limit, recipe.eval.task[0].split) == ("text", 41, "train")
    assert (recipe.eval.task[0].prompt, recipe.eval.task[0].response) == ("beginning", "ending")


def test_what_to_keep(world, capsys):
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(20)))
    write_rows(Path("facts.jsonl"), map(KINDS["answers"][0], range(100)))
    recipe = make("--keep", "facts.jsonl")
    assert "not used    the fields id of facts.jsonl\n" in capsys.readouterr().out
    own, general = recipe.calibration.sources
    assert (own.path, own.weight, own.limit, general.source) == ("facts.jsonl", 3, 84, "general")
    kept = recipe.eval.retention[0]
    assert recipe.eval.retention[1].answers == "shipped facts"  # which gives way to the user's
    name = "facts"
    assert (kept.answers, kept.path, kept.offset, kept.limit, kept.template) == (name, "facts.jsonl", 84, 16, "chat")
    assert (
        main(["train", "rows.yaml", "--max-forgetting", "0.01", "--dry-run"]) == 0
    )  # 16 rows are enough for a budget


def test_several_things_to_keep(world, capsys):
    """Each is measured, and one budget bounds all that hold out rows enough for it."""
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(60)))
    for name, rows in (("a (new).jsonl", 100), ("b.jsonl", 64), ("few.jsonl", 50)):
        write_rows(Path(name), map(KINDS["answers"][0], range(rows)))
    words = [word for name in ("a (new).jsonl", "few.jsonl", "b.jsonl") for word in ("--keep", name)]
    recipe = make(*words)
    said, text = capsys.readouterr().out, Path("rows.yaml").read_text()
    assert [source.weight for source in recipe.calibration.sources] == [3, 3, 3, 3]
    names = [entry.answers for entry in recipe.eval.retention]
    assert names == ["a new", "b", "facts", "prose", "code", "instructions", "few"]
    assert [entry.answers for entry in recipe.eval.task] == ["rows"]
    told = "--max-forgetting bounds a new, b alone: few.jsonl holds out 5 usable rows, and a budget needs 16\n"
    budget = '--max-forgetting 0.01 budget.then=repair "budget.measure=[a new kl, b kl]"'
    assert told in said and f"lora-null train rows.yaml {budget}\n" in said and budget in text
    capsys.readouterr()
    assert main(["train", "rows.yaml", "--dry-run", *shlex.split(budget)]) == 0
    said = capsys.readouterr().out
    assert "budget      a new kl at most 0.01 on 8 rows" in said and "budget      b kl at most 0.01 on 8 rows" in said
    write_rows(Path("b.jsonl"), [*map(KINDS["messages"][0], range(3)), {"messages": [{"role": "user"}]}])
    make(*words, "--out", "other.yaml", code=2)
    assert "error: --keep b.jsonl: 1 of 4 rows cannot be used" in capsys.readouterr().err
    for keep in (["--keep", ""], ["--keep", "few.jsonl", "--keep", ""]):
        make(*keep, code=2)
        assert "--keep: is empty" in capsys.readouterr().err
    Path("rows.yaml").unlink()
    Path("few.jsonl").rename("+++.jsonl")
    assert make("--keep", "+++.jsonl").eval.retention[-1].answers == "kept"


@pytest.mark.parametrize(
    ("rows", "held_out"), [(50, "5 usable rows"), (39, "no usable row"), (64, None), (None, None)]
)
def test_what_a_budget_would_bound(world, capsys, rows, held_out):
    """Too few rows of one's own are held out: what is said is what a dry run measures the budget by."""
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(20)))
    write_rows(Path("facts.jsonl"), map(KINDS["answers"][0], range(rows or 0)))
    make(*(("--keep", "facts.jsonl") if rows else ()))
    said = capsys.readouterr().out
    told = f"budget      --max-forgetting would bound the shipped facts: facts.jsonl holds out {held_out}, and a budget needs 16\n"
    assert (told in said) == (held_out is not None) == ("max-forgetting" in said)
    assert main(["train", "rows.yaml", "--max-forgetting", "0.01", "--dry-run"]) == 0
    measure = "shipped facts kl" if rows == 50 else "facts kl"
    assert f"budget      {measure} at most 0.01 on" in capsys.readouterr().out
    text = Path("rows.yaml").read_text()
    assert ('# weight: share of the windows; the rows after limit are measured as "facts"\n' in text) == (
        rows in (50, 64)
    )
    assert ("# weight: share of the windows\n" in text) == (rows == 39)


def test_what_is_kept_is_not_cut_to_the_length_of_what_is_learned(world, capsys):
    write_rows(Path("rows.jsonl"), [{"prompt": "q", "response": "a"}] * 20)
    Path("notes").mkdir()
    Path("notes/town.md").write_text("\n\n".join("The mill was built in 1832. " * 50 for _ in range(4)))
    recipe = make("--keep", "notes")
    assert recipe.training["max_length"] < 64 and recipe.calibration.max_length == 512  # all that the model takes
    windows = "max_length 512 cuts"
    assert windows in capsys.readouterr().out and windows in Path("rows.yaml").read_text()


def test_a_row_to_keep_without_a_text_is_told_by_its_option(world, capsys):
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(20)))
    write_rows(Path("facts.jsonl"), [*map(KINDS["messages"][0], range(3)), {"messages": [{"role": "user"}]}])
    make("--keep", "facts.jsonl", code=2)
    assert (
        "--keep facts.jsonl: 1 of 4 rows cannot be used: 1 an empty turn of the user (row 4)"
        in capsys.readouterr().err
    )
    Path("facts.jsonl").write_text('{"question": "q", "answer": "a"}\n{broken\n')
    make("--keep", "facts.jsonl", code=2)
    assert "--keep facts.jsonl: 1 of 2 rows cannot be used: 1 no complete JSON (row 2)" in capsys.readouterr().err


ODD = {  # rows of which some cannot be used, or named so that they are mistaken for something else
    "a prompt too long for the model": [{"prompt": "x" * (600 if i == 3 else 9), "response": "a"} for i in range(60)],
    "a text with an ending": [{"text": f"the mill of town {i}", "ending": "burned"} for i in range(60)],
    "held-out rows without an answer": [{"prompt": f"q {i}", "response": "a" * (i < 57)} for i in range(60)],
    "only such rows held out": [{"prompt": f"q {i}", "response": "a" * (i < 50)} for i in range(60)],
    "texts that are not measured": [{"text": "x" * 1400, "beginning": "", "ending": "", "file": "", "last": True}]
    * 60,
    "a conversation and an answer": [
        {"prompt": [user("a"), assistant("b"), user(f"{i}")], "response": "d"} for i in range(60)
    ],
    "a field of two lines": [{"Frage\n(kurz)": f"was ist {i}", "Antwort": "x"} for i in range(60)],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_what_it_writes_passes(world, rows):
    write_rows(Path("rows.jsonl"), rows)
    make()
    assert main(["train", "rows.yaml", "--dry-run"]) == 0


@pytest.mark.parametrize("asked", [1, 0])
def test_rows_to_keep_that_cannot_be_asked(world, capsys, asked):
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(60)))
    bare = [{"messages": [user(f"q {i}")]} for i in range(16)]
    write_rows(
        Path("facts.jsonl"),
        [*map(KINDS["messages"][0], range(84)), *bare[asked:], {"messages": [user("q"), assistant("a")]}][:100],
    )
    recipe = make("--keep", "facts.jsonl")
    said = capsys.readouterr().out
    names = [entry.answers for entry in recipe.eval.retention]
    assert ("shipped facts" in names) == bool(asked) != ("no row of it is held out" in said)
    assert names[0] == ("shipped facts" if asked else "facts")  # by one row no budget is kept
    usable = "1 usable row" if asked else "no usable row"
    assert f"bound the shipped facts: facts.jsonl holds out {usable}, and a budget needs 16\n" in said
    assert recipe.data.on_bad_row == ("skip" if asked else None)
    assert ("of those to keep 15 a conversation without a turn of the assistant" in said) == bool(asked)
    assert recipe.calibration.sources[0].limit == (84 if asked else None)
    assert main(["train", "rows.yaml", "--dry-run"]) == 0


def test_lengths_and_batch(world, capsys):
    write_rows(Path("rows.jsonl"), [{"prompt": "q", "response": "a" * (300 if i == 7 else 40)} for i in range(200)])
    recipe = make()
    assert recipe.training["max_length"] == 64 and "cuts 1 of 200" in capsys.readouterr().out
    assert recipe.training["total_batch_size"] % recipe.training["per_device_train_batch_size"] == 0
    steps = 180 * recipe.training["num_train_epochs"] / recipe.training["total_batch_size"]
    assert steps >= 60 and recipe.method.rank == 4


def test_memory_decides_batch_and_checkpointing(world, monkeypatch, capsys):
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(600)))
    assert make().training["gradient_checkpointing"] is False
    Path("rows.yaml").unlink()
    monkeypatch.setattr(new, "_machine", lambda: new.Machine("a small one", 2**17, False))
    training = make().training
    assert (
        training["per_device_train_batch_size"] == 1
        and training["gradient_checkpointing"]
        and training["bf16"] == "auto"
    )
    assert "that is too little" in capsys.readouterr().out


def test_a_narrow_gate_does_not_hold_the_rank_down(world):
    config = Qwen2MoeConfig(
        vocab_size=101, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=4, max_position_embeddings=256,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained("model")
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(50)))
    recipe = make()
    assert recipe.method.rank == 16
    assert set(recipe.method.target_modules) >= {"q_proj", "gate_proj", "down_proj"}
    assert "shared_expert_gate" not in recipe.method.target_modules


def test_weights_that_are_stored_as_d_in_by_d_out_have_a_width(world):
    config = GPT2Config(
        vocab_size=101, n_embd=64, n_layer=1, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained("model")
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(50)))
    assert make().method.rank == 16


def test_a_model_without_chat_template(world):
    save_tiny(Path("model"))
    Path("model/chat_template.jinja").unlink()
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(50)))
    assert make().data.template == "alpaca" and main(["train", "rows.yaml", "--dry-run"]) == 0


def test_bad_rows_and_thoughts(world, capsys):
    chat_tokenizer(THINKING).save_pretrained("model")
    thought = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>so</think>d")]
    write_rows(Path("rows.jsonl"), [{"messages": thought}] * 49 + [{"messages": [user("a")]}])
    recipe = make()
    assert recipe.data.thinking == "drop" and recipe.data.on_bad_row == "skip"
    said = capsys.readouterr().out
    told = "thoughts of all turns, the last too; the template leaves out those of earlier ones"
    assert "1 a conversation without a turn of the assistant to learn (row 50)" in said
    assert f"thinking    drop: {told}" in said and f"thinking: drop   # {told}" in Path("rows.yaml").read_text()


def test_thoughts_of_most_rows_are_not_dropped_for_a_few(world, capsys):
    """Rows of several turns, whose earlier thoughts the template leaves out, are left out instead."""
    chat_tokenizer(THINKING.replace("<think></think>", "")).save_pretrained("model")
    row = {"messages": [user("a"), assistant("b")]}
    several = {"messages": [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("d")]}
    write_rows(Path("rows.jsonl"), [row] * 198 + [several] * 2)
    recipe = make()
    assert recipe.data.thinking is None and recipe.data.on_bad_row == "skip"
    assert "thinking" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "row", [lambda q: {"query": q, "response": q}, lambda q: {"messages": [user(q), assistant("a")]}]
)
def test_held_out_prompts_that_are_also_learned(world, capsys, row):
    write_rows(Path("rows.jsonl"), [row(f"q {max(i, 3) if i < 45 else i % 7}") for i in range(50)])
    make()
    assert "measured    4 of the 5 held-out prompts are also learned\n" in capsys.readouterr().out


def test_it_trains(world, monkeypatch, capsys):
    monkeypatch.setattr("lora_null.recipes.measure.base_to_run", bases.base_to_run)
    monkeypatch.chdir(world)
    Path("notes").mkdir()
    for i in range(40):
        Path(f"notes/{i}.txt").write_text(f"Mill {i}. " + "The mill was built in 1832 and it burned. " * 3)
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(60)))
    assert main(["new", "--model", "model", "--data", "rows.jsonl", "--keep", "notes", "--out", "deep/mine.yaml"]) == 0
    words = ["training.max_steps=2", "eval.limit=2", "calibration.samples=32", "eval.cache=false"]
    assert main(["train", "deep/mine.yaml", *words]) == 0
    results = json.loads(Path("runs/mine/results.json").read_text())
    assert {"notes kl", "facts kl", "code kl", "rows nll"} <= set(results["rows"][-1]["metrics"])
    assert next(iter(results["rows"][-1]["metrics"])) != "notes nll"  # of 4 chunks, too few for a budget
    assert "notes: 24 windows" in results["settings"]["calibration_data"].replace("deep/../", "").replace("../", "")


MISTAKES = {
    "no file": (["--data", "nowhere.jsonl"], "--data: no file or folder nowhere.jsonl"),
    "no split to keep": (
        ["--data", "rows.jsonl", "--keep", "sets"],
        "--keep: name one of its files; no 'train' in sets (choose from: dev, test)",
    ),
    "no keep": (["--data", "rows.jsonl", "--keep", "./nowhere"], "--keep: no file or folder ./nowhere"),
    "no model": (["--data", "rows.jsonl", "--model", "./nowhere"], "--model: no folder ./nowhere"),
    "no format": (["--data", "odd.jsonl"], "--data: the fields a, b, c are no conversation"),
    "no rows": (["--data", "bad.jsonl"], "2 no complete JSON (rows 1, 2)"),
    "no good row": (["--data", "empty.jsonl"], "1 an empty turn of the user (row 1)"),
    "there already": (["--data", "rows.jsonl", "--out", "there.yaml"], "--out: there.yaml exists already"),
    "a link to nothing": (["--data", "rows.jsonl", "--out", "link.yaml"], "--out: link.yaml exists already"),
    "no YAML": (["--data", "rows.jsonl", "--out", "there.json"], "--out: there.json is no YAML file"),
    "no folder": (["--data", "rows.jsonl", "--out", "there.yaml/mine.yaml"], "--out: cannot write to there.yaml"),
    "no option": (["--dta", "rows.jsonl"], "no option '--dta' (did you mean '--data'?)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_one_line(world, capsys, mistake):
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(5)))
    write_rows(Path("odd.jsonl"), [{"a": 1, "b": 2, "c": 3}])
    Path("sets").mkdir()
    for name in ("dev", "test"):
        write_rows(Path("sets", f"{name}.jsonl"), map(KINDS["answers"][0], range(5)))
    Path("bad.jsonl").write_text("{broken\n{too\n")
    write_rows(Path("empty.jsonl"), [{"messages": [user(""), assistant("b")]}])
    Path("there.yaml").write_text("")
    Path("link.yaml").symlink_to("nowhere")
    words, message = MISTAKES[mistake]
    before = set(Path().iterdir())
    assert main(["new", "--model", "model", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("error: ") and set(Path().iterdir()) == before


def test_a_home_folder_may_be_written_as_in_a_recipe(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world))
    write_rows(Path("rows.jsonl"), map(KINDS["messages"][0], range(5)))
    assert main(["new", "--model", "~/model/", "--data", "~/rows.jsonl"]) == 0
    recipe = load_recipe("rows.yaml")
    assert Path(recipe.model.name_or_path).samefile("model") and Path(recipe.data.path).samefile("rows.jsonl")


def test_what_the_shipped_model_needs_is_said_before_its_download(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(smollm2, "_download", lambda folder: pytest.fail("downloaded"))
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *_: False)
    with pytest.raises(UserError, match=r"gguf and sentencepiece not installed; pip install gguf sentencepiece"):
        smollm2.smollm2()
