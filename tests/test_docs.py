"""The documents: short, linked, in American spelling; their commands name what there is, and their examples run."""

import contextlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from datasets import Dataset
from peft import get_peft_model
from tiny import logits, random_batches, save_tiny, tiny_model, tiny_tokenizer
from trl import SFTConfig

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights
from lora_null.__main__ import main as lora_null_command
from lora_null.layer import adapted_layers
from lora_null.recipes.__main__ import main as recipes_command
from lora_null.recipes.config.load import find, presets
from lora_null.recipes.config.schema import Recipe
from lora_null.trainer import LoraNullSFTTrainer
from lora_null.trainer.methods import METHODS, make_method

ROOT = Path(__file__).parent.parent
FOLDERS = ("lora_null", "trainer", "eval_harness", "recipes", "tests")
READMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"{folder}/README.md" for folder in FOLDERS)]
READMES += ["tests/benchmarks/README.md"]
RUN = re.compile(r"(?:accelerate launch|torchrun|python) (?:.* )?-m lora_null\.recipes (?P<words>.*)")
ANY_RECIPE = ("RECIPE", "my-recipe.yaml", "RUN/recipe.yaml", "chat.yaml")  # stand for a file of the reader's
BRITISH = (
    "(?:behavio|colo|favo|hono|neighbo|labo)ur|licences?|maths|centre|catalogue|defence|artefact|programme|judgement"
    "|(?:analy|initiali|optimi|normali|quanti|tokeni|summari|seriali|regulari|generali|recogni|organi|customi|utili|visuali)s"
    "(?:e|ing|ation)|(?:label|cancel|model|travel)l(?:ed|ing)"
)


def tracked(*patterns):
    run = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in run.stdout.split("\n") if name]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_root_readme_is_short():
    assert len(text_of("README.md").split()) <= 1000


def anchors(path):
    """Return the anchors that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        path, _, anchor = target.partition("#")
        if not re.match(r"https?:", target):
            linked = (ROOT / name).parent / path if path else ROOT / name
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("name", READMES)
def test_python_files_that_are_named_exist(name):
    held = {path.name for path in tracked("*.py")} | {"mine.py"}  # which stands for a file of the reader's
    named = {Path(found).name for found in re.findall(r"[\w/-]+\.py\b", text_of(name))}
    if name != "CHANGELOG.md":  # which speaks of what was
        assert named <= held, named - held


def test_american_spelling():
    found = []
    for path in tracked("*.md", "*.py"):
        if path != Path(__file__) and path.is_file() and not path.is_symlink():
            words = re.findall(rf"\b(?:{BRITISH})s?\b", path.read_text(encoding="utf-8"), flags=re.IGNORECASE)
            found += [f"{path.relative_to(ROOT)}: {word}" for word in words]
    assert not found


def commands_of(text):
    """Yield the command lines of a document's indented blocks and inline code, without comments."""
    blocks = re.findall(r"(?:^    .*\n?)+", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).split("\n") + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        for command in re.split(r"\s&&\s|,? then ", line.strip()):
            command = re.sub(r"^\w+=\S+ ", "", re.sub(r"(^|\s+)# .*", "", command)).strip()
            if re.match(r"(?:accelerate launch|torchrun|python|pytest|lora-null|pip install)\s", command):
                yield command


def help_of(command, words, capsys):
    with contextlib.suppress(SystemExit, UserError):
        command([*words, "--help"])
    return capsys.readouterr().out


def check_options(words, known):
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in re.findall(r"--[\w-]+", known), option


def check_recipe_words(words):
    """Check a recipe's name, and the sections and keys of what is set."""
    if not words or words[0].startswith("-"):
        return
    if words[0] not in (*ANY_RECIPE, "report", "DIR"):
        find(words[0])
    for key in (word.partition("=")[0] for word in words[1:] if re.match(r"[a-z_.]+=", word)):
        section, _, inner = key.partition(".")
        assert section in Recipe.model_fields, key
        kind = Recipe.model_fields[section].annotation
        if inner and hasattr(kind, "model_fields"):
            assert inner.partition(".")[0] in kind.model_fields, key
    if "--model-preset" in words:
        assert words[words.index("--model-preset") + 1] in presets()


def check_command(command, capsys):
    words = shlex.split(command)
    if match := RUN.match(command):
        words = shlex.split(match["words"])
        check_recipe_words(words)
        check_options(words, help_of(recipes_command, words[:1] if words[:1] == ["report"] else [], capsys))
    elif words[0] == "lora-null" and re.match(r"[a-z]", words[1]):
        known = help_of(lora_null_command, words[1:2], capsys)
        assert f"lora-null {words[1]}" in known
        check_options(words, known)
        if words[1] == "train":
            check_recipe_words(words[2:])
    elif words[0] == "python" and words[1].endswith(".py"):
        script = ROOT / words[1]
        shared = (script.parent / "common.py").read_text(encoding="utf-8") if "benchmarks" in words[1] else ""
        check_options(words, script.read_text(encoding="utf-8") + shared)
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
        assert all(extra in extras for extra in re.findall(r"\.\[(\w+)\]", command))


@pytest.mark.parametrize("name", [name for name in READMES if name != "CHANGELOG.md"])
def test_commands_name_what_there_is(name, capsys):
    for command in commands_of(text_of(name)):
        try:
            check_command(command, capsys)
        except (AssertionError, UserError, OSError) as error:
            pytest.fail(f"{name}: {command}\n{error}")


def test_wrong_commands_are_noticed(capsys):
    for command in (
        "python -m lora_null.recipes quikstart",
        "torchrun --nproc_per_node 2 -m lora_null.recipes math --no-such-option",
        "accelerate launch -m lora_null.recipes math method.rnak=3",
        "accelerate launch --cpu -m lora_null.recipes math --model-preset llama-9",
        "lora-null exprot DIR",
        "lora-null export DIR --from gguf",
        "python tests/benchmarks/init.py --kases smollm2",
        "pytest tests/test_no_such.py",
        'pip install -e ".[nothing]"',
    ):
        with pytest.raises((AssertionError, UserError, OSError)):
            check_command(command, capsys)


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", text_of(name), flags=re.DOTALL)


def small(block):
    return re.sub(r"\br=\d+", "r=4", block)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """What the examples take as given: a model, data, arguments."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {i}", "completion": f" it is {i}"} for i in range(4)]
    options = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2, learning_rate=1e-2)
    return {
        "dataset": Dataset.from_list(rows),
        "texts": [f"who was king {i}? King {i} of the old land" for i in range(64)],
        "args": SFTConfig(output_dir="out", **options),
        "batches": random_batches(),
        "folder": "adapter",
    }


def test_the_first_example(world):
    (block,) = [block for block in python_blocks("README.md") if "LoraNullSFTTrainer" in block]
    save_tiny(Path("model"))
    here = small(block).replace("Qwen/Qwen3-0.6B-Base", "model")
    here = here.replace('SFTConfig(output_dir="out", learning_rate=3e-4)', "args")
    exec(here, world)
    assert Path("out/adapter_model.safetensors").is_file()


def test_the_core_s_example(world):
    (block,) = python_blocks("lora_null/README.md")
    exec(small(block), world | {"model": tiny_model(), "tokenizer": tiny_tokenizer()})
    assert Path("adapter/adapter_model.safetensors").is_file()


def test_the_trainer_s_examples(world):
    """A mixin before another trainer, a saved v2 adapter that goes on, and methods of one's own."""
    mixed, continued, defined, used, computed = python_blocks("trainer/README.md")
    exec(mixed, world)
    started = get_peft_model(tiny_model(), LoraNullConfig(r=4))
    initialize_lora_null_weights(started, random_batches())
    started.save_pretrained("adapter")
    world["base"] = tiny_model()
    exec(continued, world)
    names = [name for name, parameter in world["model"].named_parameters() if parameter.requires_grad]
    assert names and all("lora_B" in name for name in names)
    before = dict(METHODS)
    try:
        world["model"] = "model"
        save_tiny(Path("model"))
        exec(defined, world)
        exec(used, world)
        exec(computed, world)
        for name, rank in (("least-read", 4), ("first-columns", 8)):
            chosen = make_method(name)
            given = {key: getattr(world["trainer"], key) for key in ("args", "train_dataset", "processing_class")}
            texts = {
                "calibration_dataset": random_batches(),
                "peft_config": chosen.config(r=4, target_modules="all-linear"),
            }
            trainer = LoraNullSFTTrainer(model=tiny_model(), method=chosen, **texts, **given)
            trainer._prepare(resuming=False)
            assert trainer.layer_report.layers and chosen.saved_rank(4) == rank
            assert (logits(trainer.model) - logits(tiny_model())).abs().max() < 1e-4
    finally:
        METHODS.clear()
        METHODS.update(before)
    for layer in adapted_layers(world["trainer"].model).values():
        A, B = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        assert not A.requires_grad and B.any()
        assert (A @ A.T - 0.25 * A.new_ones(4).diag()).abs().max() < 1e-5
