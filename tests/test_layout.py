"""The tree itself: who may import whom, and that both kinds of install find every folder."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"lora_null": "lora_null", "trainer": "lora_null.trainer", "eval_harness": "lora_null.eval_harness"}
PARTS |= {"recipes": "lora_null.recipes"}
MAY_IMPORT = {"lora_null": set(), "trainer": set(), "eval_harness": set(), "recipes": {"trainer", "eval_harness"}}
WITHOUT_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
IMPORT_ALL = "import lora_null.recipes.grid, lora_null.recipes.report, lora_null.trainer, lora_null.eval_harness; "


def imported_parts(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            yield from (part for part, package in PARTS.items() if part != "lora_null" and name.startswith(package))


@pytest.mark.parametrize("part", PARTS)
def test_data_flows_one_way(part):
    for file in sorted((ROOT / part).rglob("*.py")):
        if file.is_relative_to(ROOT / "lora_null" / "commands"):  # they stand above all parts
            continue
        assert set(imported_parts(file)) - {part} <= MAY_IMPORT[part], file


def test_every_package_folder_is_installed():
    import tomllib

    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for part in PARTS for path in (ROOT / part).rglob("__init__.py")}
    names = {PARTS[folder.relative_to(ROOT).parts[0]] for folder in folders}
    nested = {".".join([PARTS[f.relative_to(ROOT).parts[0]], *f.relative_to(ROOT).parts[1:]]) for f in folders}
    assert declared == names | nested


def test_editable_install_works_from_anywhere(tmp_path):
    code = IMPORT_ALL + "print(lora_null.recipes.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_wheel_holds_everything_and_works_in_and_outside_the_checkout(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for name in (
        "recipes/quickstart.yaml",
        "recipes/shapes.json",
        "recipes/samples/README.md",
        "recipes/samples/wikitext_test.jsonl",
        "recipes/study.yaml",
        "recipes/report/paper_tables.csv",
        "trainer/methods/roselora.py",
        "recipes/report/page.html.j2",
        "recipes/report/table.md.j2",
        "commands/model_card.md.j2",
        "recipes/presets/default.yaml",
        "eval_harness/sandbox_child.py",
        "eval_harness/judge_prompts.json",
        "eval_harness/task_files/math/metamath_gsm8k.yaml",
        "eval_harness/task_files/code/utils.py",
    ):
        assert f"lora_null/{name}" in held
    assert not any(name.startswith(("tests/", "recipes/")) for name in held)
    where = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = WITHOUT_EDITABLE + IMPORT_ALL + "print(lora_null.recipes.__file__)"
    for folder, home in ((tmp_path, tmp_path / "site" / "lora_null" / "recipes"), (ROOT, ROOT / "recipes")):
        run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=where, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert Path(run.stdout.strip()).parent == home
