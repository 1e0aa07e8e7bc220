"""examples/measure_generation.py: memory and time of generating on a GPU."""

import json

import pytest
import torch

from tests.helpers import example, invoke

TINY = ("--model_shape", "tiny", "--context", 96, "--batch_size", 2, "--new_tokens", 3, "--prefill_chunk", 96)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--context", 0), "--context 0 must be at least 1"),
        (("--context", 4), "--context 4 must be above --new_tokens 3 + 1"),
        (("--bits", "5"), "5 must be one of 2, 3, 4, 8, 16"),
        (("--value_share", 1.5), "keeps -50% of the keys; it must be more than nothing and at most all"),
        (("--kept_ratio", 0.8), "keeps 120% of the values"),
        (("--group_size", 3), "--group_size"),
        (("--policies", "snap", "--prompt_capacity", 40), "token_sparse_method 'snap' is unknown"),
        (("--policies", "snapkv"), "--policies and --prompt_capacity need each other"),
        (("--prompt_capacity", 40), "--policies and --prompt_capacity need each other"),
        (("--policies", "snapkv", "--prompt_capacity", 96), "--prompt_capacity 96 must be below --context 96"),
        (
            ("--policies", "snapkv", "--prompt_capacity", 40, "--cache_implementation", "static"),
            "--policies are for a cache that grows",
        ),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, message, capsys):
    assert invoke(example("measure_generation"), *TINY, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_what_warms_up_meets_no_length_that_is_measured_unless_the_cache_has_one_length(cache):
    module = example("measure_generation")
    args = module.parse([str(each) for each in (*TINY, "--cache_implementation", cache)])
    ids = torch.zeros(2, args.context, dtype=torch.long)
    length = module.warm_up_prompt(ids, args).shape[1]
    if cache == "static":
        assert length == args.context
    else:
        assert 0 < length + args.new_tokens < args.context


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert invoke(example("measure_generation"), *TINY) == 2
    assert "error: peak memory is measured on a CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_caches_are_as_large_as_their_settings_say(tmp_path, capsys):
    flags = ("--bits", "16,4", "--policies", "streaming", "--prompt_capacity", 48, "--results", tmp_path / "r.json")
    assert invoke(example("measure_generation"), *TINY, *flags) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        "stock",
        "latents, 16 bits",
        "+ streaming",
        "latents, 4 bits",
        "+ streaming",
    ]
    stock, latents, fewer, codes, fewer_codes = (row["cache_bytes"] for row in rows)
    # Two layers, keys and values of 4 heads of 32, two rows; the last token is generated and not cached.
    assert stock == 2 * 2 * 4 * 32 * 2 * 2 * (96 + 3)
    assert latents == pytest.approx(stock / 2, rel=0.1)
    assert codes < 0.4 * latents
    assert fewer < 0.6 * latents
    assert fewer_codes < 0.7 * codes
    assert all(row["step_milliseconds"] > 0 and row["prompt_milliseconds"] > 0 for row in rows)
    assert all(row["new_length_step_milliseconds"] > 0 for row in rows)
    assert "tiny, 2 rows of 96 tokens" in capsys.readouterr().out
