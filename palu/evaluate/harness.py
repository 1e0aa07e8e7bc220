"""lm-eval's model class `palu`: a stock or compressed checkpoint, with settings of its cache.

`lm_eval.models` is the group of the entry point. Versions of lm-eval that do not look there (0.4.13 does not) find the
name once this module is imported; the command `palu-lm-eval` is lm-eval's own with that done.
"""

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn
from tqdm import tqdm

from palu.core.errors import PaluError
from palu.core.validate import require
from palu.evaluate.continuation import continuation_scores
from palu.models import is_latent
from palu.nn.fusion import fold_hadamard, set_quantization, set_token_sparsity
from palu.nn.latent_cache import cache_nbytes
from palu.quantization import FLAGS as LATENT_FLAGS
from palu.token_sparsity import FLAGS as SPARSITY_FLAGS
from palu.token_sparsity import changed_by_flags

CACHE_FLAGS = ("lt_bits", "lt_value_bits", *LATENT_FLAGS, *SPARSITY_FLAGS)


@register_model("palu")
class PaluLM(HFLM):
    """lm-eval's `hf` that knows what the cache of a compressed model can do, and measures it.

    Arguments are those of `hf` (with `pretrained`, a path or hub name) and, for a compressed checkpoint, the scripts'
    flags `lt_*` (without `lt_clip_ratio=auto`) and those of token policies. A stock model is evaluated exactly as by
    `hf`. So is a compressed one, but that with a token policy contexts go through the cache before what is scored.
    """

    def __init__(self, pretrained: str, lt_hadamard: bool = False, **kwargs: Any) -> None:
        flags = {name: kwargs.pop(name, None) for name in CACHE_FLAGS}
        super().__init__(pretrained=pretrained, **({"backend": "causal"} | kwargs))
        given = [name for name, value in flags.items() if value is not None] + ["lt_hadamard"] * lt_hadamard
        if is_latent(self.model):
            self._set_cache(flags, lt_hadamard)
        elif given:
            raise PaluError(f"{pretrained} is not a compressed model; {given[0]} needs one")
        self.cache_bytes = self.cache_tokens = 0
        self.model.register_forward_hook(self._note_cache, with_kwargs=True)

    def _set_cache(self, flags: dict[str, Any], hadamard: bool) -> None:
        latent = self.model.config.latent
        quantization, sparsity = latent.quantization.changed_by_flags(flags), changed_by_flags(latent.sparsity, flags)
        set_token_sparsity(self.model, None)
        if hadamard:
            fold_hadamard(self.model)
        set_quantization(self.model, quantization)
        set_token_sparsity(self.model, sparsity)

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes that caches held after prompts, per token of these; 0 before the first."""
        return self.cache_bytes / self.cache_tokens if self.cache_tokens else 0.0

    @property
    def drops_tokens(self) -> bool:
        """Whether the model's cache has a token policy."""
        return is_latent(self.model) and self.model.config.latent.sparsity is not None

    def _note_cache(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Count what the cache of a prompt holds; later tokens are not counted."""
        ids, cache = kwargs.get("input_ids", args[0] if args else None), output.get("past_key_values")
        if ids is not None and cache is not None and int(cache.get_seq_length()) == ids.shape[1] > 1:
            self.cache_bytes += cache_nbytes(cache)
            self.cache_tokens += ids.numel()

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of whole texts.

        Raises:
            PaluError: with a token policy, which would have nothing to do.
        """
        require(
            not self.drops_tokens, "a token policy drops tokens behind a context, and tasks of whole texts have none"
        )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As `hf`, in one forward pass; where tokens are dropped, behind contexts that went through the cache."""
        if not self.drops_tokens:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            kept = (context or [self.prefix_token_id])[-max(1, self.max_length + 1 - len(continuation)) :]
            by_context.setdefault(tuple(kept), []).append(index)
        # The longest first, so that what does not fit into the memory shows at once.
        contexts = sorted(by_context, key=len, reverse=True)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else self._detect_batch_size())
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for start in range(0, len(contexts), size):
            batch = contexts[start : start + size]
            members = [(row, index) for row, context in enumerate(batch) for index in by_context[context]]
            scores = continuation_scores(self.model, batch, [(row, requests[index][2]) for row, index in members])
            for (_, index), score in zip(members, scores.continuations, strict=True):
                answers[index] = tuple(score)
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
            bar.update(len(members))
        bar.close()
        return [answers[index] for index in range(len(requests))]


def main() -> None:
    """lm-eval's command line, which knows `--model palu` here."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
