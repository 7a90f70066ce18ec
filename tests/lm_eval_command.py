"""`python tests/lm_eval_command.py …` is `lm_eval …` that knows the tasks of its --include_path alone.

lm-eval's own 14,000 task files take it 12 s of processor time to read before it begins.
"""

import functools

import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    cli_evaluate()
