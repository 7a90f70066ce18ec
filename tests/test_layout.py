"""The tree itself: who may import whom, and that every way of installing finds every folder."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("recipes", "trainer", "eval_harness")
MAY_IMPORT = {"lora_null": set(), "trainer": set(), "eval_harness": set(), "recipes": {"trainer", "eval_harness"}}
FIND = "import importlib.util as i, sys; print(*[i.find_spec(f'lora_null.{n}').origin for n in sys.argv[1:]])"
NO_CHECKOUT = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "build", "dist", "runs", "venv", ".venv")


def imported_folders(source, package):
    """Yield the folders that a file imports from, at the top or inside functions, absolutely, relatively or by name."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
        for name in names:
            yield from (folder for folder in LINKED if f"{name}.".startswith(f"lora_null.{folder}."))


@pytest.mark.parametrize(
    "source",
    [
        "from lora_null.recipes import run",
        "def f():\n    from lora_null.recipes.run import run",
        "class A:\n    def f(self):\n        from lora_null import recipes",
        "def f():\n    import lora_null.recipes.run as r",
        "from ..recipes import run",
        "if True:\n    from .. import recipes",
        "importlib.import_module('lora_null.recipes.run')",
    ],
)
def test_an_import_is_found_wherever_it_stands(source):
    assert "recipes" in set(imported_folders(source, "lora_null.utils"))
    assert not set(imported_folders(source.replace("recipes", "recipes_of_another"), "lora_null.utils"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_data_flows_one_way(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file == ROOT / "lora_null" / "__main__.py":  # the command stands above all folders
            continue
        package = ".".join(
            ["lora_null", *file.relative_to(ROOT / "lora_null" if folder == "lora_null" else ROOT).parts[:-1]]
        )
        found = set(imported_folders(file.read_text(encoding="utf-8"), package))
        assert found - {folder} <= MAY_IMPORT[folder], file


def test_no_command_imports_another():
    for file in (ROOT / "recipes" / "commands").glob("[a-z]*.py"):
        found = re.findall(r"lora_null\.recipes\.commands(?:\.| import )(\w+)", file.read_text(encoding="utf-8"))
        assert set(found) <= {"arguments"}, file


def test_links_lead_to_the_folders_of_the_root():
    for folder in LINKED:
        assert (ROOT / "lora_null" / folder).is_symlink()
        assert (ROOT / "lora_null" / folder).resolve() == ROOT / folder


def copied(target):
    """Copy the checkout, links as links: builds leave files, and take in what earlier ones left."""
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=NO_CHECKOUT))


def run_python(*words, cwd, path=None):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    run = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def found_from(cwd, path):
    """Return the folders from which a process in `cwd`, with `path` on PYTHONPATH, would import."""
    return [Path(origin).parent for origin in run_python("-c", FIND, *LINKED, cwd=cwd, path=path).split()]


def built(checkout, kind, target):
    """Build a wheel, an editable wheel or an sdist with setuptools, as pip does, and return its path."""
    target.mkdir(exist_ok=True)
    run_python("-c", f"from setuptools.build_meta import build_{kind} as b; b({str(target)!r})", cwd=checkout)
    (path,) = target.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return path


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copied(tmp_path_factory.mktemp("built") / "checkout")


@pytest.fixture(scope="module")
def wheel(checkout):
    return built(checkout, "wheel", checkout.parent / "wheel")


def test_the_wheel_holds_every_file(wheel):
    expected = set()
    for folder in MAY_IMPORT:
        inside = Path("lora_null") if folder == "lora_null" else Path("lora_null", folder)
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add((inside / path.relative_to(ROOT / folder)).as_posix())
    assert names_in(wheel) == expected
    assert {
        "lora_null/py.typed",
        "lora_null/recipes/README.md",
        "lora_null/recipes/quickstart.yaml",
        "lora_null/trainer/methods/roselora.py",
    } <= expected


def test_the_wheel_works_in_and_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for folder, home in ((tmp_path, tmp_path / "site"), (ROOT, ROOT)):
        assert found_from(folder, tmp_path / "site") == [home / "lora_null" / name for name in LINKED]
    code = "import lora_null.recipes.grid, lora_null.recipes.report, lora_null.trainer, lora_null.eval_harness"
    run_python("-c", code, cwd=tmp_path, path=tmp_path / "site")


def test_the_source_archive_makes_the_same_wheel(checkout, wheel, tmp_path):
    with tarfile.open(built(checkout, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("lora_null-*")
    assert names_in(built(unpacked, "wheel", tmp_path / "wheel")) == names_in(wheel)


def test_an_editable_install_is_a_path_that_type_checkers_read(checkout, tmp_path):
    """A `.pth` file with the checkout's path, and no import hook, which pyright, mypy and editors cannot follow."""
    (name,) = names_in(editable := built(checkout, "editable", tmp_path / "editable"))
    assert name.endswith(".pth")
    assert zipfile.ZipFile(editable).read(name).decode().strip() == str(checkout)


def test_a_checkout_without_links_runs(tmp_path):
    """What git writes where it may not make links: text files that hold the path."""
    checkout = copied(tmp_path / "checkout")
    for folder in LINKED:
        link = checkout / "lora_null" / folder
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    assert "quickstart" in run_python("-m", "lora_null.recipes", "--list", cwd=checkout)
    assert found_from(tmp_path, checkout) == [checkout / name for name in LINKED]
