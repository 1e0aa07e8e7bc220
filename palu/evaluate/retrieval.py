"""Does a model still find a fact far back in its context: needle in a haystack, and recall of one of many pairs.

Texts are made from a seed, for any tokenizer, to the token. A trial is won if the right answer is likelier than every
distractor, so that small models that cannot follow instructions can be measured too.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.core.errors import PaluError
from palu.core.progress import Progress, silent
from palu.core.validate import require
from palu.evaluate.continuation import continuation_scores

Probe = Literal["needle", "recall"]
PROBES: tuple[Probe, ...] = ("needle", "recall")
# A probe, a length and a depth.
Place = tuple[Probe, int, float]
DISTRACTORS = 7


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Carl Dora Emil Frank Greta Hans Ida Jack Karen Leo Martha Ned Olga Paul Rosa Simon Tom Walter")
PLACES = _words("garden house river market church bridge forest tower harbour village castle school mill road field")
KINDS = _words("old new big small dark bright first second third last near far")
VALUES = _words(
    """
    gold silver iron copper stone wood glass paper leather wool silk cotton bread butter cheese apple orange lemon corn
    rice sugar salt pepper honey water wine milk coffee tea fire ice snow rain wind cloud star moon sun horse dog cat
    bird fish lion wolf bear mouse sheep goat red blue green yellow white black brown grey north south east west spring
    summer autumn winter king queen prince soldier doctor sailor farmer baker
    """
)
DEEDS = (
    "{0} walked slowly to the {1}.",
    "In the evening {0} looked at the {1} for a long time.",
    "Nobody saw {0} behind the {1} that day.",
    "The {1} was old, and {0} knew it well.",
    "{0} told us a long story about the {1}.",
    "When {0} came back, the {1} was empty.",
)


@dataclass(frozen=True)
class Trial:
    """One question: token ids of its context, and of the answers, the right one first."""

    context: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Cell:
    """What was found at one length and depth.

    accuracy: trials in which the right answer was the likeliest; margin: mean of its log likelihood less that of the
    best distractor, nats; kv_bytes_per_token: that the cache held of the contexts.
    """

    probe: Probe
    length: int
    depth: float
    trials: int
    accuracy: float
    margin: float
    kv_bytes_per_token: float


class TrialMaker:
    """Makes trials for one tokenizer; the same seed, probe, length, depth and number give the same trial.

    Raises:
        PaluError: if the tokenizer splits the words too differently to compare answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        self.prefix = whole[: whole.index(bare[0])]
        self.full_stop = tokenizer(".", add_special_tokens=False)["input_ids"]
        # Answers of as many tokens each, so that none is likelier for being shorter.
        sizes = {word: len(self._ids(f" {word}")) for word in VALUES}
        common = Counter(sizes.values()).most_common(1)[0][0]
        self.values = [word for word in VALUES if sizes[word] == common]
        require(len(self.values) > DISTRACTORS, "the tokenizer splits words too differently for a retrieval test")

    def trial(self, probe: Probe, length: int, depth: float, number: int) -> Trial:
        """A trial whose context has exactly `length` tokens, with what is asked for at `depth` (0 first, 1 last).

        Raises:
            PaluError: if so few tokens hold no question.
        """
        rng = random.Random(f"{self.seed}/{probe}/{length}/{depth}/{number}")
        make = self._needle if probe == "needle" else self._recall
        context, answers = make(rng, length - len(self.prefix), depth)
        return Trial(self.prefix + context, [self._ids(f" {answer}") for answer in answers])

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text behind a sentence: some tokenizers put a space in front of what begins a text."""
        whole = self.tokenizer(f".{text}", add_special_tokens=False, verbose=False)["input_ids"]
        start = len(self.full_stop)
        require(whole[:start] == self.full_stop, "the tokenizer joins sentences; it is not for a retrieval test")
        return whole[start:]

    def _filler(self, rng: random.Random, count: int) -> list[int]:
        """Sentences about nothing, cut to `count` tokens."""
        ids: list[int] = []
        while len(ids) < count:
            ids += self._ids(" " + rng.choice(DEEDS).format(rng.choice(NAMES), rng.choice(PLACES)))
        return ids[:count]

    def _needle(self, rng: random.Random, length: int, depth: float) -> tuple[list[int], list[str]]:
        """One sentence that matters among many that do not."""
        answers = rng.sample(self.values, DISTRACTORS + 1)
        subject = f" The secret word of {rng.choice(NAMES)} is"
        needle, question = self._ids(f"{subject} {answers[0]}."), self._ids(subject)
        filler = self._filler(rng, _room(length - len(needle) - len(question), length))
        at = round(depth * len(filler))
        return filler[:at] + needle + filler[at:] + question, answers

    def _recall(self, rng: random.Random, length: int, depth: float) -> tuple[list[int], list[str]]:
        """One of many pairs of a key and a value; distractors are other keys' values."""
        pairs: dict[str, str] = {}
        lines: list[list[int]] = []
        used = longest = 0
        while True:
            key = f"{rng.choice(NAMES)}, {rng.choice(KINDS)} {rng.choice(PLACES)} {rng.randrange(1, 1000)}"
            value = rng.choice(self.values)
            if key in pairs:
                continue
            line = self._ids(f"\n{key}: {value}")
            longest = max(longest, len(line))
            # The question is a line without its value.
            if used + len(line) + longest > length:
                break
            pairs[key] = value
            lines.append(line)
            used += len(line)
        asked, right = list(pairs.items())[round(depth * (len(pairs) - 1))] if pairs else ("", "")
        others = sorted(set(pairs.values()) - {right})
        require(len(others) >= DISTRACTORS, f"{length} tokens hold too few pairs for a recall test")
        question = self._ids(f"\n{asked}:")
        filler = self._filler(rng, _room(length - used - len(question), length))
        context = filler + [token for line in lines for token in line] + question
        return context, [right, *rng.sample(others, DISTRACTORS)]


def _room(tokens: int, length: int) -> int:
    if tokens < 0:
        raise PaluError(f"{length} tokens hold no question of the retrieval test")
    return tokens


def make_trials(
    maker: TrialMaker,
    probes: Sequence[Probe],
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    progress: Progress = silent,
) -> dict[Place, list[Trial]]:
    """So many trials for every probe, length and depth.

    Raises:
        PaluError: if a length is too short.
    """
    places = [(probe, length, depth) for probe in probes for length in lengths for depth in depths]
    return {
        place: [maker.trial(*place, number) for number in range(count)]
        for place in progress(places, "making texts", len(places))
    }


def measure_retrieval(
    model: PreTrainedModel,
    trials: Mapping[Place, Sequence[Trial]],
    batch_size: int = 1,
    progress: Progress = silent,
    name: str = "retrieval",
) -> list[Cell]:
    """One cell for every probe, length and depth; contexts go through the model's own cache before the answers."""
    return [_cell(model, made, place, batch_size) for place, made in progress(trials.items(), name, len(trials))]


def _cell(model: PreTrainedModel, trials: Sequence[Trial], place: Place, batch_size: int) -> Cell:
    margins: list[float] = []
    held = tokens = 0
    for start in range(0, len(trials), batch_size):
        batch = trials[start : start + batch_size]
        asked = [(row, answer) for row, trial in enumerate(batch) for answer in trial.answers]
        scores = continuation_scores(model, [trial.context for trial in batch], asked)
        held, tokens = held + scores.cache_bytes, tokens + scores.cache_tokens
        found = iter(scores.continuations)
        for trial in batch:
            right, *wrong = (next(found).log_likelihood for _ in trial.answers)
            margins.append(right - max(wrong))
    wins = sum(margin > 0 for margin in margins)
    return Cell(*place, len(trials), wins / len(trials), sum(margins) / len(margins), held / tokens)
