"""`accelerate launch -m lora_null.recipes RECIPE …` is `lora-null train RECIPE …`; `report DIR …` is `lora-null report DIR …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_null.recipes import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lora-null train`, or `lora-null report` where that is the first word; return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return commands.main(argv if argv[:1] == ["report"] else ["train", *argv])


if __name__ == "__main__":
    sys.exit(main())
