"""Answers to math problems: taken out of a solution, and compared with the right one.

extract_answer("So 3 + 4 = 7.\\nThe answer is: 7")   # "7"
same_number("$1,200.00", "1200")                      # GSM8K
metamath_number("The answer is: 7.6 apples")           # 8: GSM8K, the rule of the paper
equivalent(r"\\frac12", "0.5")                         # MATH, by math-verify
same_string(r"\\frac12", r"\\frac{1}{2}")               # MATH, the string rule of the paper
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from fractions import Fraction

from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

METAMATH = re.compile(r"the (?:final )?answer is(:?)", re.IGNORECASE)
GSM8K = re.compile(r"####")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})(?:[^\W\d_]|[\s.,;'’-])+")  # and nothing else: no number, no mathematics, no x
_SIGN = r"(?:-\s*[$€£]?|\+\s*|[$€£]\s*-?)?"
_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|\d+)"
_UNSIGNED = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?"
_QUANTITY = re.compile(rf"({_SIGN}\s*{_UNSIGNED})(?:\s*/\s*(-?{_UNSIGNED})|\s+(\d+)\s*/\s*(\d+))?")
_METAMATH_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{(-?[\d.,]+)\}|(\d))\s*(?:\{(-?[\d.,]+)\}|(\d))")
_TIMES_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[×·*x])\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))")
_MINUS = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d]")  # as hyphens, dashes and the sign of mathematics
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # ½ and its like
# The left side of "3 * 4 = 12" and of "3 * 4 km = 12 km".
_COMPUTED = re.compile(r".*[\d)}%](?:\s+[^\W\d_]+)?\s*=(?=.*\d)", re.DOTALL)
LONGEST = 1000  # characters of a number; what is longer is none, and Python refuses to read 4,301 digits
_DISPLAY = re.compile(r"\$\$.*?\$\$|(?<!\\)\\\[.*?\\\]|\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
_BOLD = re.compile(r"(?<![\w)])\*\*(.+?)\*\*(?![\w(])")  # of Markdown; a power, 2**3, has none of its two marks free
# One of the last letters that math-verify takes for a unit, directly behind a number or behind a sign.
_VARIABLE = re.compile(r"([\d}]|(?:[-+*=,]|\\cdot|\\times)\s*)([cdghlmost]|ab|bc)\s*$")
_NUMERAL = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")  # 4210_{5}
# Between the parts of an answer: both rules take the words, and all behind them, for a unit.
_AND = re.compile(r",?\s*(?:\\(?:text|textrm|textbf|mbox|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)")
_LIST_MARK = re.compile(r"(?<=\n)\s*[-–•]\s+(?=\**[$€£]?\d)")
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_NOISE = re.compile(
    r"(?<!\\)\\[!,;: ]|\{,\}|\\left|\\right|\\%|%|\\\$|\^\{?\\circ\}?|~|(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))"
)

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every answer that it cannot read


def extract_answer(text: str) -> str | None:
    """Return the final answer of a solution, None where it gives none.

    That is what follows the last "The answer is:" (MetaMath), else the last "####" (GSM8K), to the end of its
    sentence or line; else, or where a box follows that, the contents of the last \\boxed{…} (MATH). Of an answer that is
    boxed, the box's contents.
    A marker that nothing follows does not count, and "the answer is" with words alone behind it ("correct") only where
    there is no other answer.
    """
    _, *found = METAMATH.split(text)
    stated = [(colon, _first_statement(said)) for colon, said in zip(found[::2], found[1::2])][::-1]
    sure = [said for colon, said in stated if colon or not _WORDS.fullmatch(said)]
    marked = GSM8K.split(text)[1:]
    if marked and boxed_answer(marked[-1]) is None:  # else the marks are those of headings
        sure += [_first_statement(said) for said in reversed(marked)]
    answer = next(filter(None, sure), "")
    return boxed_answer(answer) or answer or boxed_answer(text) or next((said for _, said in stated if said), None)


def boxed_answer(text: str) -> str | None:
    """Return the contents of the last \\boxed{…}, the answer of MATH's own solutions; None where there is none."""
    box = last_boxed_only_string(text)
    try:
        return None if box is None else remove_boxed(box).strip() or None
    except AssertionError:  # \fbox, or a box that never ends
        return None


def metamath_answer(text: str) -> str | None:
    """Return the answer by the paper's own rule: what follows the last "The answer is: ", up to a full stop and a newline."""
    parts = text.split("The answer is: ")
    if len(parts) == 1:
        return None
    return parts[-1].split(".\n")[0].strip().removesuffix(".").strip()


def metamath_number(text: str) -> int | None:
    """Return GSM8K's answer by the paper's own rule, to the letter: the first number after the last "The answer is: ".

    It takes one comma, point or slash at most (1,234,567 is read as 1234), rounds to a whole number, halves to even, and
    knows no words in between.
    """
    parts = text.split("The answer is: ")
    found = _METAMATH_NUMBER.search(parts[-1]) if len(parts) > 1 else None
    if found is None:
        return None
    top, slash, bottom = found[0].replace(",", "").partition("/")
    if len(found[0]) > LONGEST:
        return None
    if slash and (top.strip("+-") == "" or (bottom != "0" and int(bottom) == 0)):
        return None
    value = float(top) / (int(bottom) if slash and bottom != "0" else 1)
    return round(value) if math.isfinite(value) else None


def to_number(answer: str | None) -> Fraction | None:
    """Return the first number in an answer: signs, currency, thousands separators, decimals, fractions, mixed numbers, powers
    of ten.

    Units and percent signs are left aside, and of "3 * 4 = 12" the left side. None where there is no number.
    """
    if answer is None:
        return None
    plain = _VULGAR.sub(lambda m: f" {unicodedata.normalize('NFKC', m[0]).replace('⁄', '/')}", _MINUS.sub("-", answer))
    plain = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", plain)
    plain = _COMPUTED.sub("", _TIMES_TEN.sub(r"e\1\2", _NOISE.sub("", plain)))
    found = _QUANTITY.search(plain)
    if found is None or len(found[0]) > LONGEST or re.search(r"[eE]\D?\d{4}", found[0]):
        return None
    whole, over, top, bottom = found.groups()
    if any(part and not _fraction(part) for part in (over, bottom)):
        return None
    if over:
        return _fraction(whole) / _fraction(over)
    sign = -1 if "-" in whole else 1
    return _fraction(whole) + (sign * _fraction(top) / _fraction(bottom) if top else 0)


def _fraction(number: str) -> Fraction:
    return Fraction(re.sub(r"[\s$€£,+]", "", number))


def same_number(answer: str | None, right: str) -> bool:
    """Return whether two answers are the same number; False where either is none."""
    number, wanted = to_number(answer), to_number(right)
    return number is not None and number == wanted


def same_string(answer: str | None, right: str | None) -> bool:
    """Return whether two answers are the same text after the MATH benchmark's own normalization, the paper's rule."""
    return answer is not None and right is not None and is_equiv(answer, right)


def equivalent(answer: str | None, right: str | None) -> bool:
    """Return whether two answers mean the same: as text by `same_string`, or as mathematics by math-verify.

    Units, percent signs, degrees and thousands separators are left aside, "x = 5" is 5, and "1 and 2" is "1, 2". The base of
    a numeral counts where both name one. A letter that follows a number without a space, or a sign, is a variable: "4t" and
    "4 + t" are not 4, "4 m" is.
    """
    if answer is None or right is None:
        return False
    answer, right = _AND.sub(", ", answer), _AND.sub(", ", right)
    if same_string(answer, right):
        return True
    numerals = [_NUMERAL.fullmatch(_plain(text)) for text in (answer, right)]
    if all(numerals):
        return len({numeral.groups() for numeral in numerals}) == 1
    readers = [LatexExtractionConfig(), ExprExtractionConfig()]
    wanted, given = (parse(f"${_plain(text)}$", extraction_config=readers) for text in (right, answer))
    return bool(wanted) and bool(given) and verify(wanted, given)


def _first_statement(text: str) -> str:
    """Return the first line that says something, to the end of its sentence, without bold marks or dollar signs around it.

    Displayed mathematics counts as one line; lines of marks alone ("```") and introductions ("as follows:") say nothing. A
    dash before a number on a later line is the mark of a list, not a sign.
    """
    text = _DISPLAY.sub(lambda display: " ".join(display[0].split()), text)
    text = _BOLD.sub(r"\1", _LIST_MARK.sub("", text))
    line = next((line for line in map(str.strip, text.splitlines()) if _says_something(line)), "")
    line = re.split(r"\.\s(?!\\\]|\$\$)", line, maxsplit=1)[0].strip().removesuffix(".").strip(" :*")
    inside = re.fullmatch(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", line)
    found = next((part for part in inside.groups() if part is not None), line) if inside else line
    return found.strip().removesuffix(".")


def _says_something(line: str) -> bool:
    introduces = line.endswith(":") and not re.search(r"\d", line)
    return not introduces and re.search(r"\w", line) is not None


def _plain(answer: str) -> str:
    """Return an answer without what has no mathematical meaning: spacing, separators of thousands, percent, degrees; and
    with braces around a variable at its end, which would be taken for a unit.

    "100,200" is one number, as it is written; the pair is "100, 200" or "(100,200)".
    """
    plain = _VARIABLE.sub(r"\1{\2}", _NOISE.sub("", answer.strip().strip("$").removesuffix(".")))
    if re.search(r"[(\[{].*,", plain):
        return plain
    return _THOUSANDS.sub(lambda number: number[0].replace(",", ""), plain)
