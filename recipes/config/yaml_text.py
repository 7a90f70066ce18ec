"""YAML as a recipe means it: numbers as they are written, no key twice, nothing dropped from a value."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from lora_null.utils.errors import first_line

NUMBER = re.compile(r"([-+]?((0|[1-9][\d_]*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
INT64_END = 2.0**63  # beyond which PyTorch takes no whole number


class Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last, and one that is no text, as `on` and `no` are.

    Numbers are read as they are meant: 1e-4 is one, and 010, 12:30 and 2024-01-01, to YAML 1.1 eight, 750 and a date, are
    texts.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            where = f"line {key.start_mark.line + 1}: the key {key.value!r}"
            if (key.tag, str(key.value)) in seen:
                raise yaml.YAMLError(f"{where} is given twice")
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith((":str", ":merge")):
                raise yaml.YAMLError(f"{where} is no text to YAML; put it in quotes")
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node).lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan")
        number = float(text)
        small = abs(number) < INT64_END
        if text.lstrip("+-").isdecimal():
            if not small:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {text[:20]} is beyond 2^63")
            return int(text)
        return int(number) if "e" in text and small and number.is_integer() else number  # 1e3


class Dumper(yaml.SafeDumper):
    """Puts in quotes also those texts that only a recipe's loader would read as numbers."""


for kind in (Loader, Dumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_number)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds; raise a YAMLError for one that is none, or has a key twice or one that is no text."""
    return yaml.load(text, Loader)  # which is a safe one


def parse_value(text: str) -> Any:
    """Return what a value on the command line means. It is read as YAML, except where YAML would drop part of it.

    "|", "####" and "a #b" are themselves, not an empty block or a comment, and a space or a line break is kept.
    """
    if text and (text.isspace() or (len(text) == 1 and text != "~" and not text.isalnum())):
        return text
    value, bare = parse_yaml(text), text.strip()
    if value is not None and not isinstance(value, str):
        return value
    says_nothing = bare.lower() in ("", "null", "~", "''", '""')
    return value if says_nothing or (value and bare[0] in "'\"!&|>") else bare


def yaml_reason(error: Exception) -> str:
    """Return what is wrong with a text that is no YAML, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark and error.problem:
        return f"line {error.problem_mark.line + 1}: {first_line(Exception(error.problem))}"
    return first_line(error)
