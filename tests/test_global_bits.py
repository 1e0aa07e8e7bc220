"""The search `global_bits`: ranks and bits of every projection together, under one budget of bytes."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
import palu
import run_ppl_eval
from palu.calibrate.windows import CalibrationWindows
from palu.core.budget import RankBudget
from palu.core.hadamard import hadamard_transform
from palu.core.linalg import energy_factors
from palu.core.types import SIDES, Evidence, by_projection
from palu.kernels.quantize import quantize
from palu.nn.latent_cache import LatentCache
from palu.quantization import QuantizationConfig
from palu.search import get_search
from palu.search.global_bits import FULL_BYTES, choices
from tests.helpers import in_an_empty_folder, invoke, random_windows, tiny_model  # noqa: F401
from tests.test_search import damage_of, evidence_for, sites
from utils.results import read_results


def spent(plan, codes):
    """Bytes per token of a plan."""
    return sum(codes.nbytes(plan.group_ranks(*key), bits) for key, bits in plan.bits.items())


def lost(evidence, site, rank, bits, codes):
    """Energy that a group loses to what is dropped and to its codes."""
    energy = evidence.energy[site]
    noise = codes.noise(rank, bits) * energy[:rank].sqrt().sum().item() ** 2 / rank
    return energy[rank:].sum().item() + noise


@pytest.mark.parametrize("case", range(20))
def test_the_budget_of_bytes_is_never_exceeded_and_hardly_wasted(case):
    generator = random.Random(int(torch.randint(1 << 30, ())) + case)
    shapes = sites(generator.randint(1, 8), generator.choice([1, 2]), generator.choice([1, 4]), 128, 128)
    codes = QuantizationConfig(symmetric=generator.random() < 0.5, group_size=generator.choice([None, 32]))
    evidence, ratio = evidence_for(shapes, generator), generator.uniform(0.15, 0.9)
    plan = get_search("global_bits")(shapes, evidence, RankBudget(ratio, 32, hadamard=True, codes=codes))
    full = FULL_BYTES * sum(shape.group_dim for shape in shapes)
    assert set(plan.bits) == {shape.site.projection for shape in shapes}
    assert spent(plan, codes) <= ratio * full
    dims = {shape.site: shape.group_dim for shape in shapes}
    budget = RankBudget(ratio, 32, hadamard=True, codes=codes)
    ways = [[way.nbytes for way in choices(sites, dims, evidence, budget)] for sites in by_projection(dims).values()]
    if spent(plan, codes) < sum(max(way) for way in ways):
        steps = [after - before for way in ways for before, after in itertools.pairwise(way)]
        assert spent(plan, codes) > ratio * full - max(steps)


def largest_step(points):
    """Between neighbours on the lower hull of (bytes, damage), as far as damage falls."""
    hull = [
        (x, y)
        for x, y in points
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        and not any(
            a < x < c and b + (d - b) * (x - a) / (c - a) < y for (a, b), (c, d) in itertools.permutations(points, 2)
        )
    ]
    return max((after[0] - before[0] for before, after in itertools.pairwise(sorted(hull))), default=0)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35, 0.6])
def test_no_other_ranks_and_bits_do_less_damage_with_one_step_less_to_spend(ratio):
    shapes = sites(1, 1, 1, 64, 64)
    evidence, codes = evidence_for(shapes, random.Random()), QuantizationConfig()
    ways = list(itertools.product((16, 32, 48, 64), QuantizationConfig().choices))

    def damage(site, way):
        return damage_of(evidence.damage[site.projection], lost(evidence, site, *way, codes))

    plan = get_search("global_bits")(shapes, evidence, RankBudget(ratio, 16, codes=codes))
    key, value = (shape.site for shape in shapes)
    found = sum(damage(site, (plan.ranks[site], plan.bits[site.projection])) for site in (key, value))
    points = {site: [(codes.nbytes(way[:1], way[1]), damage(site, way)) for way in ways] for site in (key, value)}
    budget = ratio * FULL_BYTES * 128 - max(largest_step(points[site]) for site in (key, value))
    pairs = itertools.product(points[key], points[value])
    assert all(found <= one[1] + other[1] + 1e-9 for one, other in pairs if one[0] + other[0] <= budget)


@pytest.mark.parametrize("cap", [None, 48])
@pytest.mark.parametrize("case", range(6))
def test_what_a_group_loses_with_its_share_is_hardly_more_than_the_least_of_all_ranks_and_bits(case, cap):
    generator = random.Random(int(torch.randint(1 << 30, ())) + case)
    codes = QuantizationConfig(symmetric=generator.random() < 0.5, group_size=generator.choice([None, 32]))
    (shape,) = (each for each in sites(1, 1, 1, 96, 96) if each.site.side == "key")
    evidence, ratio = evidence_for([shape], generator), generator.uniform(0.05, 0.9)
    budget = RankBudget(ratio, 32, codes=codes, max_key_rank=cap)
    ways = [
        lost(evidence, shape.site, rank, bits, codes)
        for rank, bits in itertools.product(range(1, (cap or 96) + 1), codes.choices)
        if codes.nbytes([rank], bits) <= ratio * FULL_BYTES * 96
    ]
    energy = evidence.energy[shape.site]
    least = min(ways, default=energy.sum().item())
    # The most ranks that fit are taken, which a last quantisation group of few numbers can make a little worse.
    assert 1 - 1e-9 < get_search("global_bits").energy_lost(energy, shape, budget) / least < 1.01


def test_where_bytes_are_plenty_nothing_is_lost():
    shapes = sites(2, 2, 1, 64, 128)
    plan = get_search("global_bits")(
        shapes, evidence_for(shapes, random.Random()), RankBudget(1.0, 32, codes=QuantizationConfig())
    )
    assert all(plan.ranks[shape.site] == shape.group_dim for shape in shapes)
    assert set(plan.bits.values()) == {8}


def test_bytes_are_spent_where_no_damage_was_measured_too():
    shapes = sites(1, 1, 1, 64, 64)
    energy = evidence_for(shapes, random.Random()).energy
    evidence = Evidence(energy=energy, damage={(0, side): [(1.0, 0.0), (20.0, 0.0)] for side in SIDES})
    plan = get_search("global_bits")(shapes, evidence, RankBudget(0.3, 16, codes=QuantizationConfig()))
    assert spent(plan, QuantizationConfig()) > 0.9 * 0.3 * FULL_BYTES * 128


def test_a_budget_too_small_for_two_bits_says_what_is_possible():
    shapes = sites(2, 2, 1, 64, 128)
    budget = RankBudget(0.03, 32, codes=QuantizationConfig())
    with pytest.raises(palu.PaluError, match=r"leaves 31 bytes per token for 6 groups; use a ratio of at least 0\.071"):
        get_search("global_bits").check(shapes, budget)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"group_size": 16}, {"clip_ratio": 0.85}], ids=str)
def test_codes_add_the_energy_that_the_plan_reckons_with(bits, settings):
    """Inputs of normal numbers: latents are normal, and alike once they are turned."""
    rank, width = 64, 96
    root = torch.randn(width, width).double() / width**0.5
    weight, metric = torch.randn(128, width).double(), torch.randn(128, 128).double()
    gram, metric = root @ root.T, metric @ metric.T
    factors = energy_factors(weight, weight @ gram @ weight.T, metric).truncate(rank)
    codes = QuantizationConfig(bits, bits, **settings)
    latents = hadamard_transform(factors.down @ root @ torch.randn(width, 4096).double()).T.float()
    restored = quantize(latents[None], codes.of([rank], "key", 0)).dequantized(torch.float32)[0]
    errors = (restored - latents).double() @ hadamard_transform(factors.up.T)
    found = (errors @ metric * errors).sum(1).mean().item()
    expected = codes.noise(rank, bits) * factors.energy.sqrt().sum().item() ** 2 / rank
    assert found == pytest.approx(expected, rel=0.1)


def planned(model, ratio, **settings):
    methods = {"search_method": "global_bits", "decompose_method": "fisher", "lt_hadamard": True, "rank_multiple": 8}
    config = palu.CompressionConfig(ratio, 2, n_probe_calib_samples=2, **(methods | settings))
    windows = random_windows(model, 4, 32)
    return palu.compress(model, config=config, windows=CalibrationWindows(windows, windows))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_planned_model_caches_what_its_plan_says_and_survives_saving(family, tmp_path):
    model = tiny_model(family)
    compression = planned(model, 0.3)
    latent, plan = compression.model.config.latent, compression.plan
    assert latent.quantization.layer_bits == {side: [plan.bits[layer, side] for layer in range(3)] for side in SIDES}
    assert len(set(plan.bits.values())) > 1
    windows = random_windows(model, 2, 20, seed=1)
    cache = LatentCache(compression.model.config)
    with torch.no_grad():
        expected = compression.model(windows, past_key_values=cache).logits
    full = FULL_BYTES * sum(shape.group_dim for shape in compression.shapes)
    assert cache.bytes_per_token() <= 0.3 * full + 4 * 3
    assert latent.bytes_per_token(4) == spent(plan, latent.quantization)
    compression.model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, expected)
    # Other bits asked for are those of all layers.
    plain = loaded.config.latent.quantization.changed(key_bits=16, value_bits=16)
    assert plain.is_full
    assert loaded.config.latent.quantization.changed(sinks=2).layer_bits is not None


def test_clip_ratios_are_searched_for_the_bits_that_were_chosen():
    ratios = planned(tiny_model("llama"), 0.25, quantization=QuantizationConfig(clip_ratio="auto"))
    latent = ratios.model.config.latent
    for side in SIDES:
        for bits, found in zip(
            latent.quantization.layer_bits[side], latent.quantization.clip_ratios[side], strict=True
        ):
            assert bits in (2, 3, 4, 8)
            assert len(found) == 2


def test_the_scripts_plan_bits_and_show_them(capsys):
    few = ["--n_whiten_calib_samples", "2", "--calib_seqlen", "64", "--n_fisher_calib_samples", "1"]
    ask = ["--search_method", "global_bits", "--param_ratio_target", "0.2", "--lt_hadamard", "--lt_sym", *few]
    assert invoke(compress, *ask, "--output_dir", "one", "--results", "one.json") == 0
    shown = capsys.readouterr().out
    rows = read_results(Path("one.json"))["rows"]
    summary = next(row for row in rows if row["kind"] == "summary")
    assert "bits" in shown
    assert f"{summary['latent_bytes_per_token']:,} of 5,120 bytes per token, target 1,024" in shown
    assert summary["latent_bytes_per_token"] <= 0.2 * 5120
    ask = ["--model_name_or_path", "one", "--max_windows", "1", "--seqlen", "128", "--datasets", "demo"]
    assert invoke(run_ppl_eval, *ask, "--results", "ppl.json") == 0
    row = read_results(Path("ppl.json"))["rows"][0]
    assert row["kv_bytes_per_token"] == summary["latent_bytes_per_token"] + 4
    bits = {side: [r["bits"] for r in rows if r["kind"] == "rank" and r["side"] == side] for side in SIDES}
    assert min(bits["key"]) <= row["bits"] <= max(bits["key"])
    assert min(bits["value"]) <= row["value_bits"] <= max(bits["value"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lt_hadamard": False}, "plans for turned latents; give lt_hadamard"),
        ({"quantization": QuantizationConfig(4, 4)}, "chooses the bits; give no lt_bits"),
    ],
)
def test_what_a_plan_of_bits_cannot_use_is_refused(settings, message):
    asked = {"search_method": "global_bits", "lt_hadamard": True} | settings
    with pytest.raises(palu.PaluError, match=message):
        palu.CompressionConfig(**asked)


@pytest.mark.parametrize(
    "bits",
    [
        {"key": [4]},
        {"key": [4], "value": [5]},
        [4, 4],
        {"key": 4, "value": 4},
        {"key": [4.0], "value": [4]},
        {"key": [4], "value": [4, 4]},
        {"key": [], "value": []},
    ],
    ids=str,
)
def test_malformed_bits_of_layers_are_refused(bits):
    with pytest.raises(palu.PaluError, match="'layer_bits' must hold a list of 2, 3, 4, 8, 16"):
        QuantizationConfig(layer_bits=bits)


@pytest.mark.parametrize("layers", [2, 4])
def test_bits_of_more_or_fewer_layers_than_the_model_has_are_refused(layers):
    quantization = QuantizationConfig(layer_bits={"key": [4] * layers, "value": [4] * layers})
    with pytest.raises(palu.PaluError, match=f"'layer_bits' holds {layers} layers of each side, the model has 3"):
        planned(tiny_model("llama"), 0.5, search_method="uniform", quantization=quantization)


def test_bits_of_layers_that_are_given_are_kept_and_others_are_not_mentioned():
    quantization = QuantizationConfig(layer_bits={"key": [4, 8, 2], "value": [8, 16, 3]})
    model = planned(tiny_model("llama"), 0.5, search_method="uniform", quantization=quantization).model
    assert model.config.latent.quantization == quantization
    assert "layer_bits" not in QuantizationConfig(4, 4).to_dict()


def test_keys_have_at_most_so_many_ranks():
    shapes = sites(3, 2, 2, 64, 64)
    budget = RankBudget(0.3, 16, codes=QuantizationConfig(), max_key_rank=40)
    plan = get_search("global_bits")(shapes, evidence_for(shapes, random.Random()), budget)
    kept = {side: max(rank for site, rank in plan.ranks.items() if site.side == side) for side in ("key", "value")}
    assert kept["key"] <= 32 < kept["value"]
