"""LongBench (arXiv 2308.14508): lm-eval's prompts and metrics, its rows from the hub or from files.

Prompts are cut in the middle, as the benchmark does, since both ends hold the instructions. Answers end where lm-eval's
tasks say: of few-shot data sets at the first line break, also where the benchmark's own script would skip those that an
answer begins with.
"""

import json
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from palu.core.errors import PaluError
from palu.core.hub import hub_reachable
from palu.core.validate import require
from palu.nn.latent_cache import cache_bytes_per_token

PREFIX = "longbench_"
# Of Palu's reference code.
DEFAULT_TASKS = ("triviaqa", "qasper", "trec", "samsum", "lcc", "repobench-p", "qmsum", "multi_news")
# Tags of the tasks that the benchmark gives no chat template to.
PLAIN_TAGS = ("longbench_fewshot_tasks", "longbench_code_tasks")
# Data sets whose answers are one of several classes.
CLASSIFIED = ("trec", "lsht")
# Data sets whose metric reads a number behind a word in every answer.
NUMBERED = {"passage_retrieval_en": "Paragraph ", "passage_retrieval_zh": "段落"}
# LongBench-E reports means of rows of so many words.
LENGTHS = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, None)}
Row = dict[str, Any]


@dataclass(frozen=True)
class LongBenchTask:
    """One data set of LongBench.

    rows: with `context`, `question`, `answers`, `all_classes`, `length`; plain: whether prompts are no chat.
    """

    name: str
    rows: Sequence[Row]
    plain: bool
    harness_task: Any

    @property
    def max_new_tokens(self) -> int:
        """Length of an answer."""
        return self.harness_task.config.generation_kwargs["max_gen_toks"]

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return self.harness_task.config.generation_kwargs["until"]

    @property
    def metric(self) -> str:
        """Name of the benchmark's metric."""
        return next(name for name in self.harness_task.aggregation() if name != "score")

    def prompt(self, row: Row) -> str:
        """The whole prompt."""
        return self.harness_task.doc_to_text(row)

    def score(self, row: Row, prediction: str) -> float:
        """From 0 to 1."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(self.harness_task.process_results(row, [prediction])["score"])


def task_names(manager: Any) -> list[str]:
    """All data sets that lm-eval has, those of LongBench-E with `_e`."""
    return sorted(name.removeprefix(PREFIX) for name in manager.all_subtasks if name.startswith(PREFIX))


def load_task(manager: Any, name: str, data_dir: Path | None) -> LongBenchTask:
    """A data set's task, with rows from the hub, or from `NAME.jsonl` in a directory.

    Raises:
        PaluError: if the rows cannot be had, or packages that the metrics need are not installed.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[PREFIX + name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = load_yaml(entry.yaml_path)
    except ImportError as error:
        raise PaluError("LongBench's metrics need more packages: pip install 'lm_eval[longbench]'") from error
    rows = _hub_rows(name, config) if data_dir is None else read_rows(data_dir / f"{name}.jsonl")
    plain = any(tag.removesuffix("_e") in PLAIN_TAGS for tag in config.pop("tag", []))
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}})
    finally:
        logger.setLevel(level)
    return LongBenchTask(name, rows, plain, task)


def _hub_rows(name: str, config: dict[str, Any]) -> list[Row]:
    from datasets import load_dataset

    if not hub_reachable():
        raise PaluError(f"{name}: the hub cannot be reached; give --data_dir with {name}.jsonl in it")
    try:
        rows = load_dataset(config["dataset_path"], config["dataset_name"], split=config["test_split"])
    except Exception as error:  # the loader raises a dozen unrelated types
        reason = str(error).strip().partition("\n")[0]
        raise PaluError(f"{name}: {config['dataset_path']} cannot be loaded: {reason}") from error
    return [checked_row(row, name, f"{config['dataset_path']}, row {number}") for number, row in enumerate(rows)]


def read_rows(path: Path) -> list[Row]:
    """LongBench's rows from a .jsonl file, as it was published (`input` for the question) or as on the hub.

    Raises:
        PaluError: naming the file, line and field.
    """
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.jsonl"))) or "none"
        raise PaluError(f"{path} does not exist; data sets in that directory: {there}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PaluError(f"{path}, line {number}: no JSON ({error})") from error
        rows.append(checked_row(row, path.stem, f"{path}, line {number}"))
    if not rows:
        raise PaluError(f"{path} has no rows")
    return rows


def checked_row(row: Any, name: str, where: str) -> Row:
    """A row with the fields that prompts and metrics read, of the types that they read.

    Raises:
        PaluError: naming the place and the field.
    """
    require(isinstance(row, Mapping), f"{where}: no object with fields")
    answers, classes = row.get("answers"), row.get("all_classes")
    answers = [answers] if isinstance(answers, str) else answers
    found = {
        "context": row.get("context"),
        "question": row.get("question", row.get("input")),
        "answers": answers,
        "all_classes": classes,
        "length": row.get("length"),
    }
    for field in ("context", "question"):
        require(isinstance(found[field], str), f"{where}: no {field!r} that is a text")
    texts = isinstance(answers, list) and answers and all(isinstance(each, str) for each in answers)
    require(bool(texts), f"{where}: no 'answers' that are a list of texts")
    word = NUMBERED.get(name.removesuffix("_e"))
    named = word is None or all(re.search(word + r"\d", answer) for answer in answers)
    require(named, f"{where}: an answer without a number behind {word!r}")
    classified = name.removesuffix("_e") in CLASSIFIED
    require(not classified or bool(isinstance(classes, list) and classes), f"{where}: no 'all_classes' to choose from")
    require(not name.endswith("_e") or isinstance(found["length"], int), f"{where}: no 'length' that is a number")
    return found | {"all_classes": classes if classified else None, "length": found["length"] or 0}


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, as_chat: bool, limit: int) -> tuple[list[int], int]:
    """Token ids of a prompt, at most `limit` of them: more are cut out in the middle. And how many there were."""
    if as_chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not as_chat, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return ids, len(ids)
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :], len(ids)


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], task: LongBenchTask
) -> tuple[str, float]:
    """The greedy answer, cut where the task says, and the bytes that the cache held per token at its end."""
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria

    inputs = torch.tensor([ids], device=model.device)
    stopping = stop_sequences_criteria(tokenizer, task.stops, len(ids), 1) if task.stops else StoppingCriteriaList()
    ends = model.generation_config.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A config of its own: those that come with models may sample, or punish repetitions.
    greedy = GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=padding,
        use_cache=True,
        return_dict_in_generate=True,
    )
    mask = torch.ones_like(inputs)
    output = model.generate(inputs, attention_mask=mask, generation_config=greedy, stopping_criteria=stopping)
    text = tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)
    held = cache_bytes_per_token(output.past_key_values)
    return postprocess_generated_text(text, task.stops, None), held


class Mean(NamedTuple):
    """A mean score from 0 to 100, and the rows that it is of."""

    score: float
    rows: list[int]


def mean_scores(task: LongBenchTask, predictions: dict[int, str]) -> dict[str, Mean]:
    """Of all rows (`all`) and, of LongBench-E, of those of every range of lengths."""
    scores = {row: 100 * task.score(task.rows[row], prediction) for row, prediction in predictions.items()}
    ranges = {"all": (0, None)} | (LENGTHS if task.name.endswith("_e") else {})
    means = {}
    for label, (least, most) in ranges.items():
        inside = [row for row in scores if least <= task.rows[row]["length"] < (most or math.inf)]
        if inside:
            means[label] = Mean(sum(scores[row] for row in inside) / len(inside), inside)
    return means
