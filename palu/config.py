"""Frozen, validated descriptions: what was asked of a compression, and what a compressed checkpoint holds."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from transformers import PreTrainedConfig

from palu.core.errors import PaluError
from palu.core.types import RankPlan, Side
from palu.core.validate import is_count, require
from palu.quantization import QuantizationConfig
from palu.token_sparsity import TokenSparsity

FORMAT_VERSION = 1
DEFAULT_FISHER_SEQLEN = 1024
GroupSize = int | Literal["all"]
# What Palu does, as fields of CompressionConfig.
PALU_METHODS = {"search_method": "fisher_uniform", "decompose_method": "whiten", "sequential": False}


def resolve_group_size(group_size: GroupSize, num_kv_heads: int, name: str) -> int:
    """Number of kv heads that share a latent; `all` is every head (J-LRD), 1 is M-LRD.

    Raises:
        PaluError: if the size does not divide the number of kv heads.
    """
    if group_size == "all":
        return num_kv_heads
    divisors = [d for d in range(1, num_kv_heads + 1) if num_kv_heads % d == 0]
    if group_size not in divisors:
        allowed = ", ".join(map(str, divisors))
        raise PaluError(
            f"{name} {group_size} does not divide the model's {num_kv_heads} kv heads; use {allowed} or all"
        )
    return group_size


def chooses_bits(search_method: str) -> bool:
    """Whether a rank search shares out bytes rather than numbers, and chooses every projection's bits as well."""
    return search_method == "global_bits"


def head_dim(model_config: PreTrainedConfig) -> int:
    """Numbers per key or value head of a model."""
    return getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads


@dataclass(frozen=True)
class CompressionConfig:
    """Everything that determines a compressed model besides the model and the calibration text.

    param_ratio_target: KEPT fraction of the cached numbers, in (0, 1]; of the bytes of a 16-bit cache where the search
        is `global_bits`, which chooses every projection's bits as well.
    head_group_size, value_group_size: kv heads per key and per value group; `all` joins every head, and a value group
        size of None means the same as the keys'.
    search_method, decompose_method: names in `palu.search` and `palu.decompose`.
    rank_multiple: ranks are multiples of this (or a group's whole dimension).
    key_cost: how much more a rank of keys costs than one of values where the search is `global`: keys are rebuilt in
        every decoding step, values are not.
    max_key_rank: the most ranks of a group of keys, a bound on what a decoding step rebuilds; None for none. The other
        groups get what it cuts off.
    n_whiten_calib_samples, calib_seqlen: windows and tokens per window for the input moments.
    n_fisher_calib_samples, fisher_seqlen: the same for the Fisher information; a length of None means 1024, or
        calib_seqlen where that is shorter.
    n_probe_calib_samples: how many of the moments' windows the searches `global` and `global_bits` probe projections
        with.
    calib_dataset: a data set's name, or a file or directory.
    lt_hadamard: turn every group's latents by a Hadamard matrix, and use only ranks that have one.
    quantization: how the compressed model's cache stores latents; clip ratios `auto` are searched on calibration text.
    fuse_values: fold the values' up factors into o_proj in the layers where that makes the weights smaller.
    sequential: fit every o_proj again, layer after layer, to what compressed attention hands it (on the moments'
        windows).
    adapt: then move the o_projs towards the calibration text, as far as predictions change by that share more than they
        do already (on the moments' windows); 0 does not.
    regroup: put the kv heads side by side whose keys lose least together, layer by layer, before anything else.
    seed: draws the calibration windows.
    """

    param_ratio_target: float = 0.5
    head_group_size: GroupSize = 4
    value_group_size: GroupSize | None = None
    search_method: str = "global"
    decompose_method: str = "fisher"
    rank_multiple: int = 32
    key_cost: float = 1.0
    max_key_rank: int | None = None
    n_whiten_calib_samples: int = 256
    n_fisher_calib_samples: int = 32
    n_probe_calib_samples: int = 4
    calib_seqlen: int = 1024
    fisher_seqlen: int | None = None
    calib_dataset: str = "wikitext2"
    seed: int = 0
    lt_hadamard: bool = False
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    fuse_values: bool = True
    sequential: bool = True
    adapt: float = 0.0
    regroup: bool = False

    def __post_init__(self) -> None:
        ratio = self.param_ratio_target
        valid = isinstance(ratio, int | float) and 0 < ratio <= 1
        require(valid, f"param_ratio_target {ratio!r} is the kept fraction and must lie in (0, 1]")
        if self.fisher_seqlen is None and is_count(self.calib_seqlen):
            object.__setattr__(self, "fisher_seqlen", min(DEFAULT_FISHER_SEQLEN, self.calib_seqlen))
        for name in ("lt_hadamard", "fuse_values", "sequential", "regroup"):
            require(isinstance(getattr(self, name), bool), f"{name} {getattr(self, name)!r} must be True or False")
        drops = ratio < 1 or self.max_key_rank is not None
        require(not self.regroup or drops, "regroup does nothing at param_ratio_target 1")
        names = ("rank_multiple", "n_whiten_calib_samples", "n_fisher_calib_samples", "n_probe_calib_samples")
        counts = dict.fromkeys(names, 1)
        for name, least in (counts | {"calib_seqlen": 2, "fisher_seqlen": 2, "seed": 0}).items():
            value = getattr(self, name)
            require(is_count(value) and value >= least, f"{name} {value!r} must be a number of at least {least}")
        cost = self.key_cost
        require(isinstance(cost, int | float) and 0 < cost < math.inf, f"key_cost {cost!r} must be a positive number")
        require(
            cost == 1 or self.search_method == "global",
            f"key_cost {cost} is for the search_method global, which weighs it",
        )
        most = self.max_key_rank
        require(most is None or (is_count(most) and most > 0), f"max_key_rank {most!r} must be a number of at least 1")
        if chooses_bits(self.search_method):
            named = f"search_method {self.search_method}"
            require(self.lt_hadamard, f"{named} plans for turned latents; give lt_hadamard")
            plain = self.quantization.is_full and self.quantization.layer_bits is None
            require(plain, f"{named} chooses the bits; give no lt_bits or lt_value_bits")
        share = self.adapt
        require(
            isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1,
            f"adapt {share!r} must be a share from 0, which does nothing, to 1",
        )
        for name in self.on_moments:
            require(
                self.n_whiten_calib_samples > 1,
                f"{name} needs n_whiten_calib_samples of two or more; or turn {name} off",
            )
        require(self.seed < 2**63, f"seed {self.seed} must be below 2**63")
        for name, size in (("head_group_size", self.head_group_size), ("value_group_size", self.value_group_size)):
            valid = size == "all" or (is_count(size) and size >= 1) or (size is None and name == "value_group_size")
            require(valid, f"{name} {size!r} must be a number of kv heads or 'all'")

    @property
    def on_moments(self) -> tuple[str, ...]:
        """What is done on the moments' windows besides, and needs two or more of them."""
        return tuple(name for name in ("sequential", "adapt") if getattr(self, name))

    @property
    def searches_clip_ratios(self) -> bool:
        """Whether clip ratios are to be found on calibration text once the model is compressed."""
        chosen = chooses_bits(self.search_method) and self.quantization.clip_ratio == "auto"
        return chosen or self.quantization.needs_search

    def group_size(self, side: Side, num_kv_heads: int) -> int:
        """Kv heads per group of one side of a model.

        Raises:
            PaluError: if the size does not divide `num_kv_heads`.
        """
        if side == "value" and self.value_group_size is not None:
            return resolve_group_size(self.value_group_size, num_kv_heads, "value_group_size")
        return resolve_group_size(self.head_group_size, num_kv_heads, "head_group_size")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LayerRanks:
    """Rank of every key group and every value group of one layer.

    fused_values: whether the values' up factors are folded into o_proj.
    """

    key: tuple[int, ...]
    value: tuple[int, ...]
    fused_values: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """The `palu` block of a compressed checkpoint's config.json.

    layers: the ranks, one entry per decoder layer; the group size follows from the number of groups.
    compression: the CompressionConfig that made it, with the calibration as it really was (for the record).
    hadamard: whether every group's latents are turned by a Hadamard matrix.
    quantization: how the cache stores latents.
    sparsity: which tokens the cache keeps; all if None.
    """

    layers: tuple[LayerRanks, ...]
    compression: Mapping[str, Any] = field(default_factory=dict)
    hadamard: bool = False
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    sparsity: TokenSparsity | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        exact = self.quantization.sinks or self.quantization.window
        require(
            self.sparsity is None or not exact,
            "lt_sinks and lt_window are not for a cache that drops tokens; give token_sparse_method none, or neither",
        )

    @classmethod
    def from_plan(cls, plan: RankPlan, num_layers: int, compression: Mapping[str, Any]) -> "LatentConfig":
        """The block for a searched plan."""
        layers = tuple(
            LayerRanks(key=tuple(plan.group_ranks(layer, "key")), value=tuple(plan.group_ranks(layer, "value")))
            for layer in range(num_layers)
        )
        return cls(layers=layers, compression=dict(compression))

    @classmethod
    def from_dict(cls, block: Mapping[str, Any] | None) -> "LatentConfig":
        """Parse the JSON block.

        Raises:
            PaluError: if the block is missing, of another format version or malformed.
        """
        require(isinstance(block, Mapping), "config.json has no 'palu' block: not a compressed checkpoint")
        version = block.get("format_version")
        require(
            version == FORMAT_VERSION, f"'palu' block has format_version {version}; this code reads {FORMAT_VERSION}"
        )
        unknown = set(block) - {f.name for f in fields(cls)}
        require(not unknown, f"'palu' block has unknown entries: {', '.join(sorted(unknown))}")
        layers = block.get("layers")
        require(isinstance(layers, list | tuple) and len(layers) > 0, "'palu' block: 'layers' must be a non-empty list")
        return cls(
            layers=tuple(_parse_layer(index, entry) for index, entry in enumerate(layers)),
            compression=block.get("compression") or {},
            hadamard=bool(block.get("hadamard", False)),
            quantization=QuantizationConfig.from_dict(block.get("quantization") or {}),
            sparsity=TokenSparsity.from_dict(block["sparsity"]) if block.get("sparsity") is not None else None,
        )

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes of a token's latents as they are cached, over all layers, without its position.

        itemsize: bytes of a number that is not a code.
        """
        total = 0
        for index, layer in enumerate(self.layers):
            for side, ranks in (("key", layer.key), ("value", layer.value)):
                codes = self.quantization.of(ranks, side, index)
                total += itemsize * sum(ranks) if codes is None else codes.bytes_per_token
        return total

    def to_dict(self) -> dict[str, Any]:
        """The JSON block; `sparsity` only where it is set, which earlier versions do not know."""
        sparsity = {} if self.sparsity is None else {"sparsity": self.sparsity.to_dict()}
        layers = [asdict(layer) | {"key": list(layer.key), "value": list(layer.value)} for layer in self.layers]
        return {
            "format_version": self.format_version,
            "hadamard": self.hadamard,
            "quantization": self.quantization.to_dict(),
            **sparsity,
            "layers": layers,
            "compression": dict(self.compression),
        }

    def check_model(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        """Refuse ranks that do not fit the model's shape.

        Raises:
            PaluError: naming the layer and side.
        """
        found = len(self.layers)
        require(found == num_layers, f"'palu' block has ranks for {found} layers, the model has {num_layers}")
        self.quantization.check_layers(num_layers)
        for index, layer in enumerate(self.layers):
            for side, ranks in (("key", layer.key), ("value", layer.value)):
                where = f"'palu' block, layer {index}, {side}"
                require(
                    len(ranks) > 0 and num_kv_heads % len(ranks) == 0,
                    f"{where}: {len(ranks)} groups do not divide {num_kv_heads} kv heads",
                )
                group_dim = num_kv_heads // len(ranks) * head_dim
                largest = head_dim if side == "value" and layer.fused_values else group_dim
                require(
                    all(1 <= rank <= largest for rank in ranks),
                    f"{where}: ranks {list(ranks)} must lie in 1..{largest}",
                )


def _parse_layer(index: int, entry: Any) -> LayerRanks:
    valid = isinstance(entry, Mapping) and all(
        isinstance(entry.get(side), list | tuple) and all(isinstance(rank, int) for rank in entry[side])
        for side in ("key", "value")
    )
    require(valid, f"'palu' block, layer {index}: needs lists of integer ranks under 'key' and 'value'")
    return LayerRanks(tuple(entry["key"]), tuple(entry["value"]), bool(entry.get("fused_values", False)))
