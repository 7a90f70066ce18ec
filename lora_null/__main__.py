"""`python -m lora_null` is the command `lora-null`; its commands are in `recipes/commands`."""

import sys

from lora_null.recipes.commands import main

if __name__ == "__main__":
    sys.exit(main())
