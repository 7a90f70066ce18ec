"""What a recipe may name, read from source files: importing TRL, Transformers and PEFT to answer a typo takes seconds.

The sources are parsed, nothing of them runs. A test compares both tables with the imported classes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

METHODS_FOLDER = Path(__file__).parents[2] / "trainer" / "methods"
CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}


@cache
def training_types(trainer: str) -> dict[str, str]:
    """Return the arguments of TRL's configuration class for a trainer, "sft" or "dpo", each with its type.

    Types are as they are written there, such as "int | None".
    """
    try:
        trl, transformers = (Path(importlib.util.find_spec(name).origin).parent for name in ("trl", "transformers"))
        files = (
            trl / f"trainer/{trainer}_config.py",
            trl / "trainer/base_config.py",
            transformers / "training_args.py",
        )
        return dict(_fields(CONFIGS[trainer], dict(_classes(files))))
    except (OSError, KeyError, AttributeError, SyntaxError):  # a TRL that has these classes elsewhere: import it
        import trl

        fields = dataclasses.fields(getattr(trl, CONFIGS[trainer]))
        return {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields if field.init}


@cache
def method_options() -> dict[str, frozenset[str]]:
    """Return the options of each method of `trainer/methods` by the method's name; `add_methods` adds a user's own."""
    classes = dict(_classes(sorted(METHODS_FOLDER.glob("*.py"))))
    marked = [
        kind for kind in classes.values() if any(getattr(d, "id", None) == "method" for d in kind.decorator_list)
    ]
    return {_assigned(kind, "name"): frozenset(dict(_fields(kind.name, classes))) for kind in marked}


def add_methods(path: str) -> list[str]:
    """Import a user's own file of methods, which imports PyTorch, and return the names of the methods in it."""
    from lora_null.trainer.methods import METHODS, load_method_file

    names = load_method_file(path)
    method_options().update({name: frozenset(f.name for f in dataclasses.fields(METHODS[name])) for name in names})
    return names


def _classes(files: Iterable[Path]) -> Iterator[tuple[str, ast.ClassDef]]:
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        yield from ((node.name, node) for node in tree.body if isinstance(node, ast.ClassDef))


def _fields(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    """Yield the arguments of a dataclass and of its bases, each with its type: no ClassVar nor field(init=False)."""
    for base in classes[name].bases:
        yield from _fields(base.id, classes)
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
            hidden = any(k.arg == "init" and getattr(k.value, "value", True) is False for k in keywords)
            if not hidden and "ClassVar" not in ast.unparse(node.annotation):
                yield node.target.id, ast.unparse(node.annotation)


def _assigned(kind: ast.ClassDef, name: str) -> str:
    return next(
        node.value.value
        for node in kind.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets)
    )
