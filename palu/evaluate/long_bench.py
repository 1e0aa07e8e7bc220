"""LongBench (arXiv 2308.14508): lm-eval's prompts and metrics, its rows from the hub or from files.

Prompts are cut in the middle, as the benchmark does, since both ends hold the instructions.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from palu.core.errors import PaluError
from palu.core.hub import hub_reachable
from palu.nn.latent_cache import cache_bytes_per_token

PREFIX = "longbench_"
# Of Palu's reference code.
DEFAULT_TASKS = ("triviaqa", "qasper", "trec", "samsum", "lcc", "repobench-p", "qmsum", "multi_news")
# Tags of the tasks that the benchmark gives no chat template to.
PLAIN_TAGS = ("longbench_fewshot_tasks", "longbench_code_tasks")
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
        return list(load_dataset(config["dataset_path"], config["dataset_name"], split=config["test_split"]))
    except Exception as error:  # the loader raises a dozen unrelated types
        reason = str(error).strip().partition("\n")[0]
        raise PaluError(f"{name}: {config['dataset_path']} cannot be loaded: {reason}") from error


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
        row = {"question": row.get("input"), "all_classes": None, "length": 0} | row
        missing = [field for field in ("context", "question", "answers") if row.get(field) is None]
        if missing:
            raise PaluError(f"{path}, line {number}: no {missing[0]!r}")
        fields = ("context", "question", "answers", "all_classes", "length", "_id")
        rows.append({field: row.get(field) for field in fields})
    if not rows:
        raise PaluError(f"{path} has no rows")
    return rows


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
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        stopping_criteria=stopping,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        return_dict_in_generate=True,
    )
    text = tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)
    held = cache_bytes_per_token(output.past_key_values)
    return postprocess_generated_text(text, task.stops, None), held


def mean_scores(task: LongBenchTask, predictions: dict[int, str]) -> dict[str, float]:
    """Means from 0 to 100: of all rows (`all`) and, of LongBench-E, of those of every range of lengths."""
    scores = {row: 100 * task.score(task.rows[row], prediction) for row, prediction in predictions.items()}
    means = {"all": sum(scores.values()) / len(scores)}
    if task.name.endswith("_e"):
        for label, (least, most) in LENGTHS.items():
            inside = [
                score
                for row, score in scores.items()
                if least <= task.rows[row]["length"] and (most is None or task.rows[row]["length"] < most)
            ]
            if inside:
                means[label] = sum(inside) / len(inside)
    return means
