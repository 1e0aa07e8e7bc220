"""The retrieval test: its trials are what they say, and a model that looks things up wins them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

import palu
from palu.calibrate.text import DEMO_ASSETS
from palu.core.errors import PaluError
from palu.evaluate.retrieval import (
    DEEDS,
    DISTRACTORS,
    KINDS,
    NAMES,
    PLACES,
    PROBES,
    VALUES,
    TrialMaker,
    make_trials,
    measure_retrieval,
)
from tests.helpers import example, in_an_empty_folder, invoke  # noqa: F401

BASE = DEMO_ASSETS / "model"


@pytest.fixture
def script():
    return example("measure_retrieval")


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """As Llama 2's: a space in front of every text, and spaces as parts of words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    sentences = [deed.format(name, place) for deed in DEEDS for name in NAMES for place in PLACES]
    words = [
        f"The secret word of Anna is {value}. Anna, {kind} garden 12: {value}\n" for value in VALUES for kind in KINDS
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>"], initial_alphabet=list("0123456789\n")
    )
    tokenizer.train_from_iterator(sentences + words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(params=["byte level", "sentencepiece"])
def any_tokenizer(request, demo_tokenizer):
    return demo_tokenizer if request.param == "byte level" else request.getfixturevalue("sentencepiece_tokenizer")


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [200, 511])
@pytest.mark.parametrize("probe", PROBES)
def test_contexts_have_their_length_and_hold_the_answer_at_their_depth(any_tokenizer, probe, length, depth):
    demo_tokenizer = any_tokenizer
    maker = TrialMaker(demo_tokenizer, seed=0)
    for number in range(4):
        trial = maker.trial(probe, length, depth, number)
        assert len(trial.context) == length
        assert len(trial.answers) == DISTRACTORS + 1
        assert len({tuple(answer) for answer in trial.answers}) == DISTRACTORS + 1
        assert len({len(answer) for answer in trial.answers}) == 1
        # The answer's tokens are those that it has in the context.
        right_ids = trial.answers[0]
        assert any(trial.context[i : i + len(right_ids)] == right_ids for i in range(length))
        text = demo_tokenizer.decode(trial.context)
        right = demo_tokenizer.decode(trial.answers[0]).strip()
        question = text.rsplit("\n" if probe == "recall" else " The secret word", 1)[1]
        asked = f"{question} {right}"
        assert text.count(asked) == 1, (text, asked)
        place = text.index(asked) / len(text)
        assert abs(place - depth) < (0.5 if probe == "recall" else 0.25)
        wrong = [demo_tokenizer.decode(answer).strip() for answer in trial.answers[1:]]
        assert all((f": {word}" in text) == (probe == "recall") for word in wrong)


def test_depths_of_recall_go_from_the_first_pair_to_the_last(demo_tokenizer):
    maker = TrialMaker(demo_tokenizer, seed=0)
    places = []
    for depth in (0.0, 0.5, 1.0):
        text = demo_tokenizer.decode(maker.trial("recall", 400, depth, 0).context)
        head, question = text.rsplit("\n", 1)
        pairs = [line for line in head.split("\n")[1:] if ": " in line]
        places.append(next(index for index, pair in enumerate(pairs) if pair.startswith(question)) / (len(pairs) - 1))
    assert places == pytest.approx([0.0, 0.5, 1.0], abs=0.1)


def test_trials_come_from_the_seed_alone(demo_tokenizer):
    first, again, other = (TrialMaker(demo_tokenizer, seed).trial("needle", 300, 0.5, 3) for seed in (1, 1, 2))
    assert first == again
    assert first != other


class Reader(torch.nn.Module):
    """Looks up what followed the last tokens earlier in the context; sees only what its cache holds."""

    model_type = "reader"

    def __init__(self, vocabulary, remembers):
        super().__init__()
        self.vocabulary, self.remembers, self.device = vocabulary, remembers, torch.device("cpu")

    def forward(self, ids, past_key_values=None, logits_to_keep=0, **kwargs):
        rows = ids if past_key_values is None else torch.cat([past_key_values.ids, ids], dim=1)
        logits = torch.zeros(*ids.shape, self.vocabulary)
        for row in range(len(rows)):
            real = rows[row]
            for place in range(ids.shape[1]):
                end = rows.shape[1] - ids.shape[1] + place + 1
                seen = real[max(0, end - self.remembers) : end].tolist()
                for size in range(6, 0, -1):
                    tail = seen[-size:]
                    found = [i for i in range(len(seen) - size) if seen[i : i + size] == tail]
                    if found:
                        logits[row, place, seen[found[-1] + size]] = 9.0
                        break
        cache = SimpleNamespace(
            ids=rows, layers=[], batch_select_indices=lambda chosen: setattr(cache, "ids", cache.ids[chosen])
        )
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], past_key_values=cache)


@pytest.mark.parametrize("probe", PROBES)
def test_a_model_that_looks_up_what_it_remembers_wins_there_and_nowhere_else(demo_tokenizer, probe):
    maker = TrialMaker(demo_tokenizer, seed=5)
    trials = make_trials(maker, [probe], [200], [0.0, 1.0], 6)
    whole = measure_retrieval(Reader(len(demo_tokenizer), 1000), trials)
    assert [cell.accuracy for cell in whole] == [1.0, 1.0]
    assert all(cell.margin > 0 for cell in whole)
    recent = measure_retrieval(Reader(len(demo_tokenizer), 60), trials)
    assert recent[0].accuracy < 0.6
    assert recent[1].accuracy == 1.0


def test_lengths_that_hold_no_question_are_refused(demo_tokenizer):
    maker = TrialMaker(demo_tokenizer, seed=0)
    with pytest.raises(PaluError, match="10 tokens hold no question"):
        maker.trial("needle", 10, 0.5, 0)
    with pytest.raises(PaluError, match="30 tokens hold too few pairs"):
        maker.trial("recall", 30, 0.5, 0)


def test_one_command_measures_every_way_of_caching(script, demo_checkpoint, tmp_path, capsys):
    flags = ("--lengths", "200,260", "--depths", 2, "--trials", 2, "--device", "cpu", "--results", tmp_path / "r.json")
    policy = ("--lt_bits", 4, "--token_sparse_method", "snapkv", "--prompt_capacity_rate", 0.25)
    assert invoke(script, "--model_name_or_path", demo_checkpoint, "--baseline", BASE, *flags, *policy) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) == 4 * 2 * 2 * 2
    held = {row["variant"]: row["kv_bytes_per_token"] for row in rows if row["length"] == 260}
    ways = {row["variant"]: (row["model"], row["bits"], row.get("token_sparse_method")) for row in rows}
    assert ways == {
        0: ("model", 16, None),
        1: ("checkpoint", 16, None),
        2: ("checkpoint", 4, None),
        3: ("checkpoint", 4, "snapkv"),
    }
    assert held[0] == 5120
    assert held[1] == 2564
    assert held[2] < 0.3 * held[1]
    assert held[3] == pytest.approx(held[2] / 4, rel=0.1)
    assert (tmp_path / "r.png").is_file()
    assert "by chance: 0.125" in capsys.readouterr().out


def test_a_checkpoint_saved_with_codes_and_a_policy_is_measured_as_it_is_asked_for(script, demo_checkpoint, tmp_path):
    from palu.checkpoint import load_model

    model = load_model(demo_checkpoint)
    palu.set_quantization(model, palu.QuantizationConfig(4, 4))
    palu.set_token_sparsity(model, palu.TokenSparsity("streaming", capacity=64))
    saved = shutil.copytree(demo_checkpoint, tmp_path / "saved")
    model.save_pretrained(saved)
    flags = ("--lengths", "200", "--depths", 1, "--trials", 3, "--device", "cpu", "--results", tmp_path / "r.json")

    def ways(*more):
        assert invoke(script, "--model_name_or_path", saved, *flags, *more) == 0
        rows = json.loads((tmp_path / "r.json").read_text())["rows"]
        return [(row["bits"], row.get("prompt_capacity")) for row in rows if row["probe"] == "needle"]

    assert ways() == [(16, None), (4, None), (4, 64)]
    assert ways("--token_sparse_method", "none", "--batch_size", 2) == [(16, None), (4, None)]
    assert ways("--prompt_capacity", 32, "--lt_bits", 16) == [(16, None), (16, 32)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--probes", "haystack"), "--probes: 'haystack' is unknown; use needle, recall"),
        (("--lengths", "long"), "--lengths 'long' must be numbers of tokens"),
        (("--lengths", "²"), "--lengths '²' must be numbers of tokens"),
        (("--lengths", "2048"), "--lengths 2048 and an answer exceed its 2048 positions"),
        (("--lengths", "20"), "20 tokens hold"),
        (("--trials", "0"), "--trials 0 must be at least 1"),
        (
            ("--token_sparse_method", "pool", "--prompt_capacity", "64", "--skip_prefill_compression"),
            "skip_prefill_compression drops nothing before decoding",
        ),
    ],
)
def test_bad_flags_are_refused_in_one_line(script, demo_checkpoint, flags, message, capsys):
    assert invoke(script, "--model_name_or_path", demo_checkpoint, *flags) == 2
    assert message in capsys.readouterr().err
