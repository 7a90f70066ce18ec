"""A task of lm-evaluation-harness as a task of this package: checked before a model loads, run on the live model."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from lm_eval import evaluator
from lm_eval.api.metrics import mean
from lm_eval.models.utils import normalize_gen_kwargs
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness.code.jails import BWRAP, IMAGE, UNSAFE, find_jail
from lora_null.eval_harness.code.programs import use_jail
from lora_null.eval_harness.lm_eval.loading import explained, hash_of_rules, load, seed_fewshot
from lora_null.eval_harness.lm_eval.model import BlankLM, ShardedLM, lm_eval_silenced
from lora_null.eval_harness.lm_eval.private_names import bootstrap_in_this_process, needs_consent
from lora_null.eval_harness.results import Metric, Role, TaskResult
from lora_null.eval_harness.tasks import TASK_FILES, RunOptions, Task
from lora_null.utils.distributed import get_logger, is_first_process, num_processes, slowly_on_first_process
from lora_null.utils.errors import UserError, first_line, nearest
from lora_null.utils.limits import PositionLimit, position_limit
from lora_null.utils.model_state import replaced

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

logger = get_logger(__name__)

BOOTSTRAP_ITERATIONS = 1000  # for metrics without a formula for their standard error
CHAT_SUFFIX = "_chat"  # ends the name of a task that is asked without the frame of the training prompt
# Words in the names of metrics that are 0 to 1 for a document. The values found do not tell: a base may have 0 in all.
SHARES = {"acc", "accuracy", "contains", "correct", "em", "exact", "f1", "included", "match", "pass", "precision"}
SHARES |= {"rate", "recall", "rule", "verify"}
# This package's tasks that are asked in the training prompt, and have a twin for chat templates.
HAS_CHAT_TWIN = tuple(sorted(path.stem.removesuffix(CHAT_SUFFIX) for path in TASK_FILES.rglob(f"*{CHAT_SUFFIX}.yaml")))


class Trial(NamedTuple):
    """What building a task and trying it on its first document gives.

    Attributes:
        loaded: lm-eval's {"tasks", "groups", …}, ready to run.
        used_jail: whether a program ran in the jail.
        names: of its results, see `LmEvalTask.result_names`.
    """

    loaded: TaskDict
    used_jail: bool
    names: dict[str, tuple[str, str, str]]


@dataclass(frozen=True)
class LmEvalTask(Task):
    """A task, group or tag of lm-evaluation-harness. Its documents are read once, when they are first needed.

    Args:
        task: its name there, e.g. "nq_open".
        path: a local json, jsonl, parquet or csv file with the documents to evaluate, instead of the hub data set. A
            group whose members differ only in their subset (hendrycks_math) is then run as one task over the file.
        fields: the task's field names → the file's, where they differ, e.g. {"answers": "answer"}.
        num_fewshot: examples in the prompt; None keeps the task's own number (0 where it has none).
        limit: evaluate only the first `limit` documents (of each member of a group).
        metric: report only this one of several results: a metric, a filter, or "metric/filter".
        fewshot_path: a local file for the few-shot examples; `path` never serves for that, as it would leak answers.
        role: "retention" for what the model should keep knowing, "task" for what it is trained on.
        name: what to call the results, if not `task`; needed to run one task on two files.
        confirm_run_unsafe_code: consent to run the code that the model writes (code tasks).
        jail: what holds that code: "bwrap", "podman", "docker", or "unsafe", which is limits on time and memory alone.
        jail_image: the image for podman and docker.
        include_path: a folder of task files of one's own, looked into first.
        chat: put the prompts into the model's own chat template, as lm-eval's `--apply_chat_template` does.
    """

    hard_position_limit: ClassVar[bool] = True
    runs_on_engine: ClassVar[bool] = True
    noise_documents: ClassVar[int | None] = 64  # generating takes long

    task: str
    path: str | None = None
    fields: dict[str, str] | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    metric: str | None = None
    fewshot_path: str | None = None
    role: Role = "task"
    name: str | None = None
    confirm_run_unsafe_code: bool = False
    jail: str = BWRAP
    jail_image: str = IMAGE
    include_path: str | None = None
    chat: bool = False

    @property
    def label(self) -> str:
        return self.name or self.task

    @property
    def key(self) -> str:
        """The label, with the metric where there is one: a task may be listed once for each metric."""
        return self.label if self.metric is None else f"{self.label}/{self.metric}"

    @property
    def in_training_template(self) -> bool:
        return self.task in HAS_CHAT_TWIN or (self.chat and self.task.removesuffix(CHAT_SUFFIX) in HAS_CHAT_TWIN)

    @property
    def runs_code(self) -> bool:
        """Whether its rules run what the model writes."""
        return any(needs_consent(member) for member in self.loaded["tasks"].values())

    def report_notes(self) -> dict[str, str]:
        if not (self.confirm_run_unsafe_code and self.runs_code):
            return {}
        jailed = find_jail(self.jail, self.jail_image).description
        return {"generated_code": jailed if self._trial.used_jail else f"by the rules of {self.task}, without a jail"}

    def check(self) -> None:
        """Check the values, build the task, read its documents and try its rules on the first one.

        Raises:
            UserError: for an unknown task, a missing file or field, an unreachable hub data set, few-shot examples out of
                the evaluated file, an unknown metric, or no consent to run code.
        """
        super().check()
        for key, least in (("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UserError(f"{self}: {key} must be a whole number of at least {least}, not {value!r}")
        for key in ("fields", "fewshot_path"):
            if getattr(self, key) and self.path is None:
                raise UserError(f"{self}: {key} needs path, the local file with the documents")
        if self.path and self.fewshot_path and Path(self.path).resolve() == Path(self.fewshot_path).resolve():
            raise UserError(f"{self}: fewshot_path is the evaluated file itself; name another file")
        trial = self._trial  # builds the task, reads its documents and tries the first one
        if self.runs_code and (self.jail == UNSAFE or not trial.used_jail):
            logger.warning(f"{self}: what the model writes runs without a jail, and may do what this user may")

    def check_positions(self, tokenizer: PreTrainedTokenizerBase, limit: PositionLimit) -> None:
        members: list[Any] = list(self.loaded["tasks"].values())
        for member in (task for task in members if task.OUTPUT_TYPE == "generate_until"):
            generation = normalize_gen_kwargs(member.get_config("generation_kwargs") or {})
            if (most := generation.get("max_gen_toks", 0)) >= limit.tokens:
                raise UserError(f"{self}: answers of up to {most} tokens leave no room for a prompt, {limit}")

    @property
    def all_metric_names(self) -> list[str]:
        return list(self._trial.names)

    def is_of_group(self, name: str) -> bool:
        """Return whether a result is a group's own, which has no value for each question alone."""
        return self._trial.names[name][0] in (self.loaded.get("groups") or {})

    @property
    def loaded(self) -> TaskDict:
        """lm-eval's {"tasks", "groups", …}, ready to run; read and tried once, see `check`."""
        return self._trial.loaded

    @cached_property
    def _trial(self) -> Trial:
        """The task, built and tried on its first document with a stand-in model: that finds missing fields and unknown
        metrics."""
        with lm_eval_silenced(logging.ERROR):  # warnings here are about how a task's authors wrote it
            loaded = load(self)
            options = {"limit": 1, "bootstrap_iters": 0, "log_samples": False}
            options["confirm_run_unsafe_code"] = self.confirm_run_unsafe_code
            try:
                with use_jail(self.jail, self.jail_image) as context:
                    results: Any = evaluator.evaluate(lm=BlankLM(), task_dict=loaded, **options)
            except UserError:
                raise
            except Exception as error:
                if self.path is not None:
                    raise explained(self, error) from error
                if self.include_path is not None:
                    reason = f"{type(error).__name__}: {first_line(error)}"
                    raise UserError(f"{self} fails on its first document ({reason})") from error
                raise
        return Trial(loaded, context.used, self.result_names(loaded, results))

    @cached_property
    def _rules(self) -> str:
        """Read once, as the documents are: every evaluation describes its tasks, probes too."""
        return hash_of_rules(self, self.loaded)

    @cached_property
    def _documents(self) -> str:
        """A hash of the rows that its tasks read, before their own rules, which may draw at random; what JSON has no word
        for counts by its type."""
        digest = hashlib.sha256()
        for member in self.loaded["tasks"].values():
            split = member.get_config("test_split") or member.get_config("validation_split")
            for row in member.dataset[split] if split else member.eval_docs:
                digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        return digest.hexdigest()

    def describe(self, limit: int | None) -> dict[str, Any]:
        keys = ("task", "fields", "metric", "chat", "num_fewshot")
        settings = {key: getattr(self, key) for key in keys} | {"limit": limit}
        for key in ("path", "fewshot_path"):
            if (path := getattr(self, key)) is not None:
                settings[f"{key}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if self.path is None:
            settings["documents_sha256"] = self._documents
        if self.include_path is not None:
            settings["rules_sha256"] = self._rules
        return settings | self.report_notes()

    def run(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: RunOptions) -> TaskResult:
        """Run lm-eval; the settings are the versions and the few-shot numbers of its tasks.

        Programs that the model writes are run by the first process, whose results count: once all have the answers,
        since running them may take longer than a collective may wait.
        """
        first, limit = is_first_process(), position_limit(model.config)
        if limit is not None and options.engine is None:  # lm-eval fits prompt and answer into it
            self.check_positions(tokenizer, limit)
        lm = options.engine or ShardedLM(
            model, tokenizer, options.batch_size, options.autocast_dtype, options.progress
        )

        def evaluated(*, run_programs: bool) -> Any:
            seed_fewshot(self.loaded, options.seed)
            # A chat template writes the start token where there is to be one; the tokenizer adds none, as in training.
            start = replaced(lm, "add_bos_token", False) if self.chat else nullcontext()
            with start, bootstrap_in_this_process(), use_jail(self.jail, self.jail_image, run_programs=run_programs):
                return evaluator.evaluate(
                    lm=lm,
                    task_dict=self.loaded,
                    limit=options.limit,
                    bootstrap_iters=BOOTSTRAP_ITERATIONS if first else 0,
                    confirm_run_unsafe_code=self.confirm_run_unsafe_code,
                    apply_chat_template=self.chat,
                    fewshot_as_multiturn=self.chat,  # as lm-eval's command does
                )

        later = self._trial.used_jail and num_processes() > 1 and isinstance(lm, ShardedLM)
        results = evaluated(run_programs=first and not later)
        if later:
            lm.replay = True
            results = _kept_on_first_process(lambda: evaluated(run_programs=True)) or results
        settings = {"versions": results["versions"], "num_fewshot": results["n-shot"]}
        found = TaskResult(settings=json.loads(json.dumps(settings, default=str)))
        for name, source in self.result_names(self.loaded, results).items():
            self._add(found, name, results, *source)
        return found

    def _add(
        self, found: TaskResult, name: str, results: Mapping[str, Any], owner: str, metric: str, filter_: str
    ) -> None:
        """Take up a metric of lm-eval's results, with a sample for each document where these are numbers."""
        scores, group = results["results"][owner], (self.loaded.get("groups") or {}).get(owner)
        members = [owner] if group is None else [task.task_name for task in group.get_all_tasks()]
        members = [member for member in members if f"{metric},{filter_}" in results["results"][member]]
        stderr = scores.get(f"{metric}_stderr,{filter_}")
        samples = (doc for member in members for doc in results["samples"].get(member, []))
        documents = [document for document in samples if document["filter"] == filter_]
        values = [document.get(metric) for document in documents]
        known = bool(values) and all(isinstance(value, int | float | np.number | np.bool_) for value in values)
        directions = {results["higher_is_better"].get(member, {}).get(metric) for member in members}
        share = self.loaded["tasks"][members[0]].aggregation().get(metric) is mean and is_share(metric)
        found.metrics[name] = Metric(
            float(scores[f"{metric},{filter_}"]),
            float(stderr) if isinstance(stderr, float | int | np.number) else None,  # lm-eval says "N/A"
            sum(results["n-samples"][member]["effective"] for member in members),
            directions.pop() if len(directions) == 1 else None,
            self.role,
            "fraction" if share else metric,
        )
        if known:
            kept = found.samples if group is None else found.group_samples
            kept[name] = [float(value) for value in values]

    def result_names(self, loaded: TaskDict, results: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
        """Return {name of a result: (lm-eval's task, metric, filter)} for what this task asks for.

        The name is the label, of a tag with the member's (": arc_easy"); "/metric" is added where there are several
        metrics, and "/filter" where there are several filters: "nq_open", "arc_easy/acc_norm", "gsm8k/strict-match".

        Raises:
            UserError: `metric` names none of them, or several.
        """
        groups = [name for name in loaded.get("groups") or {} if name == self.task and _scores(results, name)]
        owners = groups or list(loaded["tasks"])
        names = {}
        for owner in owners:
            label = self.label if len(owners) == 1 else f"{self.name}: {owner}" if self.name else owner
            scores = _scores(results, owner)
            metrics, filters = ({score[i] for score in scores} for i in (0, 1))
            for metric, filter_ in scores:
                words = [label, *[metric] * (len(metrics) > 1), *[filter_] * (len(filters) > 1)]
                if self.metric in (None, metric, filter_, f"{metric}/{filter_}"):
                    names["/".join(words)] = (owner, metric, filter_)
        if not names or (self.metric is not None and len(names) > len(owners)):
            choices = {f"{metric}/{filter_}" for owner in owners for metric, filter_ in _scores(results, owner)}
            raise UserError(
                f"{self}: metric {self.metric!r} names {len(names)} of its results{nearest(self.metric, choices)}"
            )
        return names


def _kept_on_first_process(compute: Callable[[], Any]) -> Any:
    """Compute on the first process while the others wait; the result stays there, and is None elsewhere."""
    kept = []
    slowly_on_first_process(lambda: kept.append(compute()))
    return kept[0] if kept else None


def is_share(metric: str) -> bool:
    """Return whether a mean metric is a share of the answers by its name: "acc_norm", "exact_match", "pass@1"."""
    return not SHARES.isdisjoint(re.split(r"[\W_]+", metric.lower()))


def _scores(results: Mapping[str, Any], owner: str) -> Sequence[tuple[str, str]]:
    """Return the (metric, filter) pairs of lm-eval's results for one task or group."""
    keys = (key.split(",", 1) for key in results["results"].get(owner, {}) if "," in key)
    return [(metric, filter_) for metric, filter_ in keys if not metric.endswith("_stderr")]
