"""Show training examples as the model sees them, the trained tokens colored: `--show-samples N`."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.data.examples import Tokenized, tokenize
from lora_null.recipes.models.bases import Base, load_tokenizer
from lora_null.recipes.training import read_training_data, trained_part
from lora_null.utils.distributed import is_first_process
from lora_null.utils.errors import UserError


def show_samples(recipe: Recipe, count: int, console: Console | None = None, most: int | None = None) -> None:
    """Print the first training examples, token for token, or their first `most` characters; loads no model.

    Raises:
        UserError: as `training_data`, or a count below 1.
    """
    if count < 1:
        raise UserError(f"--show-samples: a whole number of at least 1, not {count}")
    tokenizer = load_tokenizer(Base(recipe.model))
    examples = read_training_data(recipe, tokenizer).examples[:count]
    if not is_first_process():
        return
    console = console or Console(soft_wrap=True)
    marks = "" if console.is_terminal else " (between ⟦ and ⟧ where there is no color)"
    console.print(Text(f"{recipe.data.path}, template {recipe.data.template}; trained tokens are green{marks}"))
    sides = {"chosen": False, "rejected": True} if recipe.trainer == "dpo" else {"": False}
    for side, rejected in sides.items():
        for example, tokens in zip(examples, tokenize(examples, recipe.data.template, tokenizer, rejected=rejected)):
            console.rule(f"row {example.row} {side}".strip())
            kept = range(len(tokens.ids))[trained_part(recipe)]
            text = colored(tokens, tokenizer, kept, marked=not console.is_terminal)
            console.print(text if most is None or len(text) <= most else text[:most].append(" …"))


def colored(tokens: Tokenized, tokenizer: PreTrainedTokenizerBase, kept: range, *, marked: bool) -> Text:
    """Return the decoded tokens, those with a label green, and those that are cut off struck through.

    Args:
        tokens: ids and labels.
        tokenizer: to decode them.
        kept: the tokens that are not cut off.
        marked: put brackets around the trained tokens as well.
    """
    text = Text()
    kinds = [(label != -100, i not in kept) for i, label in enumerate(tokens.labels)]
    for (trained, cut), group in groupby(range(len(kinds)), key=kinds.__getitem__):
        words = tokenizer.decode([tokens.ids[i] for i in group], clean_up_tokenization_spaces=False)
        style = "strike dim" if cut else "bold green" if trained else ""
        text.append(f"⟦{words}⟧" if marked and trained and not cut else words, style)
    return text
