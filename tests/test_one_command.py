"""The one command: what it does not wait for, a typo's one line, the same command by every name, completion."""

import dataclasses
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
import yaml
from key_reference import README, describe_keys
from world import make_world

import lora_null
from lora_null.recipes import __main__ as recipes_main
from lora_null.recipes.commands import main
from lora_null.recipes.commands.arguments import build_parser
from lora_null.recipes.config.parsed_sources import CONFIGS, method_options, training_types
from lora_null.recipes.config.schema import JudgeSection
from lora_null.trainer.methods import METHODS
from lora_null.utils.errors import UserError

SLOW = ("torch", "transformers", "trl", "peft", "datasets", "lm_eval", "matplotlib", "scipy", "pandas", "accelerate")
WATCH = """
import sys
from {module} import main
for words in {lines}:
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    print("STATUS", status, [name for name in {slow} if name in sys.modules], words)
"""


def watched(lines, module="lora_null.recipes.commands"):
    """Run command lines in a fresh process; return (status, slow modules that are imported) of each, and stderr."""
    code = WATCH.format(module=module, lines=lines, slow=SLOW)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^STATUS (\d+) \[(.*?)\]", done.stdout, flags=re.MULTILINE)
    assert len(found) == len(lines)
    return [(int(status), modules) for status, modules in found], done.stderr.splitlines()


def test_help_list_and_version_import_nothing_slow():
    lines = [["--help"], ["--version"], ["--list"], ["train", "--list"], ["--print-completion", "bash"]]
    lines += [[command, "--help"] for command in build_parser()[1]]
    assert set(watched(lines)[0]) == {(0, "")}
    assert set(watched([["--help"], ["--list"]], "lora_null.recipes.__main__")[0]) == {(0, "")}


TYPOS = [
    (["trian", "quickstart"], "no command 'trian' (did you mean 'train'?)"),
    ([], "give a command: new, train, report, init, export, check, judge"),
    (["train"], "give a recipe, or --list to see them"),
    (["new", "--model", "m", "--data", ""], "--data: is empty"),
    (["train", "quikstart"], "none is called 'quikstart' (did you mean 'quickstart'?)"),
    (["train", "nowhere.yaml"], "no file nowhere.yaml"),
    (["train", "quickstart", "--sedes", "1"], "no option '--sedes' (did you mean '--seeds'?)"),
    (["train", "quickstart", "--sedes=1"], "no option '--sedes' (did you mean '--seeds'?)"),
    (["train", "quickstart", "--show-samples", "x"], "--show-samples: invalid int value: 'x'"),
    (["train", "quickstart", "-q"], "cannot use '-q'"),
    (["train", "quickstart", "training.learning_rat=1"], "no key 'learning_rat' (did you mean 'learning_rate'?)"),
    (["train", "ultrafeedback", "training.bata=1"], "no key 'bata' (did you mean 'beta'?)"),
    (["train", "quickstart", "method.nme=x"], "no key 'method.nme' (did you mean 'name'?)"),
    (["train", "quickstart", "methd.name=x"], "no key 'methd' (did you mean 'method'?)"),
    (["train", "quickstart", "eval.jugde=3"], "no key 'eval.jugde' (did you mean 'judge'?)"),
    (["train", "quickstart", "--method", "lora-nul-v2"], "no method 'lora-nul-v2' (did you mean 'lora-null-v2'?)"),
    (["train", "quickstart", "method.options={roselora: {clmp: 1}}"], "no option 'clmp' (did you mean 'clamp'?)"),
    (["train", "quickstart", "method.options={rosalora: {clamp: 1}}"], "no method 'rosalora'"),
    (["train", "math", "--model-preset", "llama-4"], "--model-preset: no preset 'llama-4'"),
    (["train", "quickstart", "data.template=alpacca"], "no template 'alpacca' (did you mean 'alpaca'?)"),
    (["train", "quickstart", "--sweep", "training.learning_rat=1,2"], "training has no key 'learning_rat'"),
    (["train", "quickstart", "--sweep", "calibration.sample=8,9"], "(did you mean 'samples'?)"),
    (["train", "quickstart", "--sweep", "model.dtype=a,b"], "'model.dtype' cannot be swept"),
    (["report"], "the following arguments are required: DIR"),
    (["init", "--varant", "v1"], "no option '--varant' (did you mean '--variant'?)"),
    (["init", "--model", "x"], "the following arguments are required: --out"),
    (["export", "a", "--out", "b", "--form", "mergd"], "--form: 'mergd' is not one (did you mean 'merged'?)"),
    (["export", "a", "--out", "b", "--rnak", "3"], "no option '--rnak' (did you mean '--rank'?)"),
    (["check", "a", "b"], "cannot use 'b'"),
    (["judge", "a", "--question", "b", "--modl", "c"], "no option '--modl' (did you mean '--model'?)"),
]


@pytest.mark.parametrize("call", [main, recipes_main.main])
def test_an_output_that_cannot_encode_a_sign_has_another_one_there(call, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        call([*(["train"] if call is main else []), "--help"])
    sys.stdout.seek(0)
    assert ended.value.code == 0 and "llama-3.1-8b, ?" in sys.stdout.read()


def test_a_typo_is_one_line_and_imports_nothing_slow():
    found, lines = watched([words for words, _ in TYPOS])
    assert set(found) == {(2, "")}
    assert len(lines) == len(TYPOS)
    for said, (_, line) in zip(lines, TYPOS):
        assert said.startswith("error: ") and line in said


def test_names_read_from_sources_are_those_of_the_imported_classes():
    for trainer, name in CONFIGS.items():
        imported = {field.name for field in dataclasses.fields(getattr(trl, name)) if field.init}
        assert training_types(trainer).keys() == imported, name
    for name, kind in METHODS.items():
        if kind.__module__.startswith("lora_null.trainer.methods."):  # not a test's own
            assert method_options()[name] == {field.name for field in dataclasses.fields(kind)}, name
    assert set(method_options()) <= set(METHODS)


def test_an_option_of_the_wrong_type_is_found_where_all_else_is_right(capsys):
    assert main(["train", "quickstart", "method.options={eva: {rho: 2}}", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"]["options"] == {"eva": {"rho": 2}}


def test_options_and_words_stand_in_any_order(capsys, tmp_path):
    recipe, shown = str(make_world(tmp_path)), []
    orders = [
        [recipe, "seed=3", "--method", "lora", "method.rank=2", "--print-config"],
        ["--method", "lora", recipe, "--print-config", "seed=3", "method.rank=2"],
        ["--print-config", "--method=lora", recipe, "seed=3", "method.rank=2"],
    ]
    for words in orders:
        assert main(["train", *words]) == 0
        shown.append(capsys.readouterr().out)
    assert recipes_main.main(orders[0]) == 0  # python -m lora_null.recipes
    shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    found = yaml.safe_load(shown[0])
    assert (found["seed"], found["method"]["name"], found["method"]["rank"]) == (3, ["lora"], 2)


def test_report_by_both_names(capsys, tmp_path):
    row = {"method": "base", "metrics": {}}
    (tmp_path / "results.json").write_text(json.dumps({"schema": 1, "recipe": "a", "model": "b", "rows": [row]}))
    pages = []
    for run in (main, recipes_main.main):
        assert run(["report", str(tmp_path)]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_version_and_every_way_to_call():
    for module in ("lora_null", "lora_null.recipes.commands"):
        code = f"from {module}{'.__main__' if module == 'lora_null' else ''} import main; main(['--version'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == f"lora-null {lora_null.__version__}\n"


def test_the_completion_script_knows_commands_options_and_recipes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lora_null", "--print-completion", "bash"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    script = tmp_path / "completion.sh"
    script.write_text(done.stdout)
    asked = 'COMP_WORDS=({words}); COMP_CWORD={at}; {function} lora-null "{last}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
    function = re.search(r"complete .*-F (\w+) lora-null", done.stdout)[1]

    def complete(*words):
        line = asked.format(words=" ".join(words), at=len(words) - 1, function=function, last=words[-1])
        shell = subprocess.run(
            ["bash", "-c", f"source {script}; {line}"], capture_output=True, text=True, cwd=tmp_path
        )
        return shell.stdout.split()

    assert complete("lora-null", "tr") == ["train"]
    assert "quickstart" in complete("lora-null", "train", "quick")
    assert complete("lora-null", "train", "--over") == ["--overwrite"]


def test_accelerate_alone_on_a_cpu_is_told_of_torchrun(tmp_path):
    """Asked for several processes on a CPU, accelerate starts one and leaves it this environment."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "lora_null.recipes", str(make_world(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert len(done.stderr.splitlines()) == 1 and "torchrun --nproc_per_node N -m lora_null.recipes" in done.stderr
    assert "ACCELERATE_USE_CPU and MASTER_PORT are set" in done.stderr  # maybe left by another command


def test_the_judge_has_the_defaults_of_a_recipe():
    ours = {action.dest: action.default for action in build_parser()[1]["judge"]._actions}
    assert {
        name: JudgeSection.model_fields[name].default for name in ("base_url", "parallel", "attempts")
    }.items() <= ours.items()


def test_the_readme_holds_every_key_of_the_schema():
    """`python tests/key_reference.py` writes it anew."""
    assert describe_keys() in README.read_text(encoding="utf-8")
    rows = [line for line in describe_keys().splitlines() if line.startswith("| `")]
    assert len(rows) > 80 and not [row for row in rows if row.endswith("|  |")]  # each says what it is


def test_no_other_private_name_of_another_package():
    """Recipes reach into no other package but through private_names.py."""
    pattern = re.compile(r"\b(?!self\b|cls\b)\w+\._[a-z]\w+|import _[a-z]")
    for file in Path(README).parent.rglob("*.py"):
        if file.name != "private_names.py":
            for line in file.read_text(encoding="utf-8").splitlines():
                assert not pattern.search(line), f"{file}: {line.strip()}"


def test_words_may_stand_before_the_recipe(capsys):
    assert main(["train", "seed=3", "quickstart", "data.limit=7", "--print-config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["name"], found["seed"], found["data"]["limit"]) == ("quickstart", 3, 7)


def test_a_backend_of_the_users_own_figures_is_not_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "TkAgg2")  # at which importing matplotlib ends in a ValueError
    assert main(["--list"]) == 0 and os.environ["MPLBACKEND"] == "agg"


def test_a_matplotlibrc_that_cannot_be_read_is_one_line(monkeypatch):
    def find_spec(name, *_):
        if name == "matplotlib":
            b"\xff".decode()

    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    with pytest.raises(UserError, match=r"matplotlib: 'utf-8' codec can't decode byte 0xff .*mend or remove its"):
        runpy.run_path(str(Path(recipes_main.__file__).with_name("report") / "drawing.py"))


def test_no_folder_for_temporary_files_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    assert main(["check", "adapter"]) == 2
    line = (
        "error: No usable temporary directory found in ['/nowhere']; free some space, or set TMPDIR to a folder that "
    )
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_reader_that_leaves_changes_nothing(options, tmp_path):
    """As in `lora-null train … | head -1`: the command goes on, and its status is its own; any other pipe's end is told."""
    code = r"""
import os, sys
from lora_null.utils.startup import exit_status
def command():
    sys.stdin.readline()  # until the readers have left
    print("more\n" * 9999, flush=True)
    print("more", file=sys.stderr)
    open("done", "w").close()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.write(writer, b"x")
    except BrokenPipeError:
        return 3
sys.exit(exit_status(command))
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, *options, "-c", code], cwd=tmp_path, env=environment, **pipes) as process:
        process.stdout.close()
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
    assert process.returncode == 3 and (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_log_on_a_full_disk_ends_no_command(options, tmp_path):
    """What is lost is told once on the other stream; where both are on that disk there is none."""
    code = r"""
import sys
from lora_null.utils.startup import exit_status
def command():
    print("more\n" * 9999, flush=True)
    print("more", flush=True)
    print("here", file=sys.stderr)
    return 3
sys.exit(exit_status(command))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *options, "-c", code]
    with open("/dev/full", "wb") as full:
        found = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
        assert found.returncode == 3
        assert found.stderr == "stdout: no space left on its disk; what follows is not written there\nhere\n"
        assert subprocess.run(command, env=environment, stdout=full, stderr=full).returncode == 3
        printed = [sys.executable, *options, "-m", "lora_null.recipes", "quickstart", "--print-config"]
        assert subprocess.run(printed, env=environment, stdout=full, stderr=subprocess.PIPE).returncode == 1


def test_an_interpreter_without_docstrings_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    assert main(["check", "adapter"]) == 2
    assert "python -OO (PYTHONOPTIMIZE=2) removes docstrings, which transformers reads" in capsys.readouterr().err
