"""Make the code and the instruction rows of `recipes/sequence.yaml`, once: recipes/samples/python_*.jsonl, words_*.jsonl.

    python tests/benchmarks/sequence_rows.py

Code: short functions of Python's standard library, to be written from their signature and docstring (PSF license).
Instructions: what to do with the words of an NQ-open question, made by rule, so that every answer is right.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from pathlib import Path

SAMPLES = Path(__file__).parents[2] / "recipes" / "samples"
TRAIN, TEST = 160, 64


def functions() -> list[dict[str, str]]:
    """Return (docstring and signature → body) of the short documented functions of the standard library."""
    rows = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)) or len(node.body) < 2:
                continue
            code = ast.unparse(ast.FunctionDef(**{**vars(node), "body": node.body[1:], "decorator_list": []}))
            head, _, body = code.partition("\n")
            about = " ".join(doc.split("\n\n")[0].split())
            if 30 <= len(about) <= 120 and 40 <= len(body) <= 240 and head.endswith(":"):
                rows[node.name] = {"question": f"Write this Python function.\n{head}\n# {about}", "answer": body}
    return list(rows.values())


def instructions() -> list[dict[str, str]]:
    """Return (instruction → answer) about the words of questions."""
    kinds = [
        ("Write these words in capital letters: {}", lambda words: " ".join(words).upper()),
        ("Write these words in reverse order: {}", lambda words: " ".join(reversed(words))),
        (
            "List these words, one a line, with a dash before each: {}",
            lambda words: "\n".join(f"- {w}" for w in words),
        ),
        ("Write the first letter of each of these words: {}", lambda words: " ".join(w[0] for w in words)),
        ("Give these words as a JSON list: {}", lambda words: json.dumps(words)),
        ("Write only the longest of these words: {}", lambda words: max(words, key=len)),
    ]
    rows = []
    for number, line in enumerate((SAMPLES / "nq_open_calibration.jsonl").read_text(encoding="utf-8").splitlines()):
        words = json.loads(line)["question"].split()[:7]
        ask, answer = kinds[number % len(kinds)]
        rows.append({"question": ask.format(" ".join(words)), "answer": answer(words)})
    return rows


def main() -> None:
    """Write four files."""
    for name, rows in (("python", functions()), ("words", instructions())):
        random.Random(0).shuffle(rows)
        for split, some in (("train", rows[:TRAIN]), ("test", rows[TRAIN : TRAIN + TEST])):
            path = SAMPLES / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
            print(f"{path.name}: {len(some)} rows")


if __name__ == "__main__":
    main()
