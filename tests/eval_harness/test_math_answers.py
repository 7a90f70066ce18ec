"""Extraction and equivalence against hand-checked answers."""

from fractions import Fraction

import pytest

from lora_null.eval_harness.math_answers import (
    equivalent,
    extract_answer,
    metamath_answer,
    metamath_number,
    same_number,
    same_string,
    to_number,
)

EXTRACTED = [  # (solution, its final answer)
    ("3 + 4 = 7\nThe answer is: 7", "7"),
    ("The answer is: 12.", "12"),
    ("The answer is:\n- 18 dollars", "18 dollars"),
    ("The answer is:\n- **18**\n- nothing else", "18"),
    ("The answer is: - 5", "- 5"),
    ("The answer is:\n\\[\nx^2\n- 5x + 6\n\\]", "x^2 - 5x + 6"),
    ("The answer is:\n-5", "-5"),
    ("#### Step 1: Cost\n9\n#### Step 2: Total\n9+9=18, so $\\boxed{18}$.", "18"),
    ("It is $\\boxed{5}$, twice that:\n#### 10", "10"),
    ("The answer is: 12.5.", "12.5"),
    ("The answer is 9", "9"),
    ("The final answer is: 18. I hope it is correct.", "18"),
    ("the answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"),
    ("The answer is: \\boxed{72}", "72"),
    ("The answer is: $\\boxed{\\frac{3}{4}}$. I hope it is right.", "\\frac{3}{4}"),
    ("First the answer is: 3. No, the answer is: 4", "4"),
    ("The answer is: 5 apples.\n\n### Instruction:\nWhat is 6?", "5 apples"),
    ("The answer is:\n18", "18"),
    ("the answer is:\n\\[\n\\boxed{42}\n\\]", "42"),
    ("the answer is:\n\\[\n42.\n\\]", "42"),
    ("the answer is:\n\n$$\n\\boxed{42}\n$$", "42"),
    ("the answer is $$42$$.", "42"),
    ("the answer is as follows:\n\n$$\\boxed{42}$$", "42"),
    ("the answer is:\n```\n42\n```", "42"),
    (
        "the answer is $\\boxed{\\begin{pmatrix}\n1 \\\\ 2\n\\end{pmatrix}}$.",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    ),
    ("$\\boxed{42}$. So that is what the answer is.", "42"),
    ("**The answer is:** 42", "42"),
    ("The answer is: **42**.", "42"),
    ("The answer is: **42.** I hope it is right.", "42"),
    ("The answer is: **42** apples.", "42 apples"),
    ("The answer is: 2**3**2", "2**3**2"),
    ("4 * 2 = <<4*2=8>>8\n#### 8", "8"),
    ("#### 1,200", "1,200"),
    ("#### 8\nThe answer is: 8", "8"),
    ("So we get $\\boxed{x^2+1}$.", "x^2+1"),
    ("$\\boxed{3}$ and then $\\boxed{\\sqrt{2}}$", "\\sqrt{2}"),
    ("The answer is: \\(\\pi\\)", "\\pi"),
    ("$\\boxed{72}$. So the answer is correct.", "72"),
    ("#### 72\nSo the answer is right.", "72"),
    ("The answer is: 72. And the answer is not unique.", "72"),
    ("The answer is: 72\nSo that is what the answer is.", "72"),
    ("The answer is Evelyn.", "Evelyn"),
    ("The answer is B.", "B"),
    ("I do not know.", None),
    ("", None),
    ("The answer is:", None),
    ("The answer is: \\boxed{}", "\\boxed{}"),
    ("It never ends: \\boxed{1", None),
]


@pytest.mark.parametrize("solution, answer", EXTRACTED)
def test_extraction(solution, answer):
    assert extract_answer(solution) == answer


NUMBERS = [
    ("42", 42),
    ("-3", -3),
    ("−3", -3),
    ("+7", 7),
    ("1,234,567", 1234567),
    ("$1,200.00", 1200),
    ("-$5", -5),
    ("$-5", -5),
    ("\\$18", 18),
    (".5", Fraction(1, 2)),
    ("3.50", Fraction(7, 2)),
    ("3/4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("\\frac{3}{4}", Fraction(3, 4)),
    ("\\frac34", Fraction(3, 4)),
    ("\\dfrac{1}{3} of the cake", Fraction(1, 3)),
    ("1 1/2 hours", Fraction(3, 2)),
    ("-1 1/2", Fraction(-3, 2)),
    ("25%", 25),
    ("25\\%", 25),
    ("12 apples", 12),
    ("x = 5", 5),
    ("10{,}000", 10000),
    ("10\\,000", 10000),
    ("90^\\circ", 90),
    ("7.", 7),
    ("3,4", 3),
    ("0,100", 0),
    ("1,2000", 1),
    ("1234,567", 1234),
    ("1,200,5", 1),
    ("1,200, 5", 1200),
    ("1\u202f200", 1200),
    ("-€5", -5),
    ("\u20115", -5),
    ("1½ hours", Fraction(3, 2)),
    ("\\frac{3}{-4}", Fraction(-3, 4)),
    ("\\frac{1.5}{2.5}", Fraction(3, 5)),
    ("3/4.5", Fraction(2, 3)),
    ("1.5e3", 1500),
    ("3.5 \\times 10^{-2}", Fraction(7, 200)),
    ("2×10^4", 20000),
    ("1e999999999", None),
    ("3 * 4 = 12 apples", 12),
    ("3 * 4 apples = 12 apples", 12),
    ("2 dozen = 24 eggs", 24),
    ("5, since x = 3", 5),
    ("5 because 2x = 10", 5),
    ("5 = x", 5),
    ("none", None),
    ("5/0", None),
    (None, None),
]


@pytest.mark.parametrize("answer, number", NUMBERS)
def test_numbers(answer, number):
    assert to_number(answer) == number


def test_a_number_without_end_is_none():
    """Python refuses to read more than 4,300 digits, which models that go on and on do write."""
    for digits in ("1" * 5000, "0" * 5000, "1/" + "7" * 5000):
        assert to_number(digits) is None and metamath_number(f"The answer is: {digits}") is None


SAME_NUMBER = [
    ("18.00", "18", True),
    ("1200", "1,200", True),
    ("0.5", "1/2", True),
    ("5", "-5", False),
    ("18 dollars", "18", True),
    (None, "18", False),
    ("many", "18", False),
]


@pytest.mark.parametrize("answer, right, same", SAME_NUMBER)
def test_gsm8k(answer, right, same):
    assert same_number(answer, right) is same


MATH = [  # (answer, right answer, the same by mathematics, the same by the string rule)
    ("\\frac{1}{2}", "\\frac{1}{2}", True, True),
    ("a + d", "a + c", False, False),
    ("2 + t", "2 + s", False, False),
    ("2", "2 + t", False, False),
    ("x = t", "x = s", False, False),
    ("2 + m", "m+2", True, False),
    ("\\frac12", "\\frac{1}{2}", True, True),
    ("\\dfrac{1}{2}", "\\frac{1}{2}", True, True),
    ("1/2", "\\frac{1}{2}", True, True),
    ("0.5", "\\frac{1}{2}", True, True),
    ("0.25", "\\frac{1}{4}", True, False),
    ("\\frac{2}{4}", "\\frac{1}{2}", True, False),
    ("-\\frac{3}{4}", "\\frac{-3}{4}", True, False),
    ("\\frac{3}{4}", "-\\frac{3}{4}", False, False),
    ("-5", "5", False, False),
    ("1,000", "1000", True, False),
    ("1,000,000", "1000000", True, False),
    ("1,000, 2,000", "1000, 2000", True, False),
    ("0,100", "100", False, False),
    ("100, 200", "100200", False, False),
    ("1234,567", "1234567", False, False),
    ("1,2,300", "1,2300", False, False),
    ("0.5,100", "0.51", False, False),
    ("10{,}000", "10000", True, False),
    ("10,\\!000", "10000", True, False),
    ("5\\%", "5", True, True),
    ("50\\%", "50", True, True),
    ("12 \\text{ cm}", "12", True, True),
    ("12\\mbox{ inches}", "12", True, False),
    ("90^\\circ", "90", True, True),
    ("\\$18", "18", True, True),
    ("x = 5", "5", True, True),
    ("x=5", "x = 5", True, True),
    ("\\{1, 2, 3\\}", "\\{3, 2, 1\\}", True, False),
    ("\\{1, 2\\}", "\\{1, 2, 3\\}", False, False),
    ("(3, 4)", "(3,4)", True, True),
    ("(4, 3)", "(3, 4)", False, False),
    ("[0, 1)", "[0,1)", True, True),
    ("(0, 1)", "[0, 1)", False, False),
    ("(-\\infty, 2)", "(-\\infty,2)", True, True),
    ("2\\sqrt{3}", "\\sqrt{12}", True, False),
    ("\\sqrt2", "\\sqrt{2}", True, True),
    ("x^2 + 2x + 1", "(x+1)^2", True, False),
    ("x^2 + 1", "(x+1)^2", False, False),
    ("\\pi/2", "\\frac{\\pi}{2}", True, False),
    ("2^{10}", "1024", True, False),
    ("\\text{Evelyn}", "\\text{Evelyn}", True, True),
    ("\\text{even}", "\\text{odd}", False, False),
    ("\\left(\\frac{1}{2}, 3\\right)", "(\\frac12,3)", True, True),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", True, True),
    ("\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", False, False),
    ("3 - 4i", "-4i + 3", True, False),
    ("4t", "4", False, False),
    ("4", "4t", False, False),
    ("4t", "t \\cdot 4", True, False),
    ("3 + 4t", "4t + 3", True, False),
    ("\\frac{1}{2}h", "\\frac{h}{2}", True, False),
    ("3ab", "3", False, False),
    ("4 m", "4", True, False),
    ("4\\text{ m}", "4", True, True),
    ("5cm", "5", True, False),
    ("19", "19 \\text{ and }43", False, True),
    ("12", "12\\text{ and }13", False, True),
    ("19 \\text{ and } 43", "19 \\text{ and }43", True, True),
    ("19, 43", "19 \\text{ and }43", True, False),
    ("1", "1 \\text{ or } 2", False, True),
    ("x=1 or x=2", "1, 2", True, False),
    ("7, -2, -5", "7, -2, \\text{ and } -5", True, False),
    ("4210_7", "4210_{5}", False, False),
    ("4210_5", "4210_{5}", True, False),
    ("4210", "4210_{5}", True, False),
    ("\\frac{7}{5} + \\frac{1}{5} i", "\\frac{7}{5} + \\frac{1}{5} i.", True, False),
    ("7", "", False, False),
    ("", "7", False, False),
    (None, "7", False, False),
    ("7", None, False, False),
]


@pytest.mark.parametrize("answer, right, same, same_text", MATH)
def test_math(answer, right, same, same_text):
    assert equivalent(answer, right) is same
    assert same_string(answer, right) is same_text


def test_the_papers_extraction_is_strict():
    assert metamath_answer("So it is.\nThe answer is: \\frac{1}{2}.\nBye") == "\\frac{1}{2}"
    assert metamath_answer("The answer is 7") is None


def test_there_are_enough_cases():
    assert len(EXTRACTED) + len(NUMBERS) + len(SAME_NUMBER) + len(MATH) >= 60


METAMATH_NUMBERS = [  # (solution, what MetaMath's script for GSM8K reads)
    ("3 + 4 = 7\nThe answer is: 7", 7),
    ("The answer is: 5. No. The answer is: -6", -6),
    ("The answer is: $1,200", 1200),
    ("The answer is: 1,234,567", 1234),
    ("The answer is: about 18 dollars", 18),
    ("The answer is: 7.6", 8),
    ("The answer is: 2.5", 2),
    ("The answer is: 3.5", 4),
    ("The answer is: .5", 0),
    ("The answer is: 7/2", 4),
    ("The answer is: 7/0", 7),
    ("The answer is: /2", None),
    ("The answer is: 7/00", None),
    ("The answer is: +7", 7),
    ("The answer is: " + 400 * "9", None),
    ("The answer is:7", None),
    ("the answer is: 7", None),
    ("#### 7", None),
    ("The answer is: none", None),
]


@pytest.mark.parametrize("solution, number", METAMATH_NUMBERS)
def test_metamaths_own_rule_for_gsm8k(solution, number):
    assert metamath_number(solution) == number
