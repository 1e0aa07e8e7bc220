"""lm-eval's model class `palu`: a stock or compressed checkpoint, with settings of its cache.

The package declares it as an entry point of the group `lm_eval.models`; as lm-eval 0.4.13 does not look there,
lm_eval_hook.py, installed beside the package, gives lm-eval the name.
"""

import logging
import os
import weakref
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn
from tqdm import tqdm

from palu.checkpoint import load_model
from palu.core.errors import PaluError
from palu.core.validate import require
from palu.evaluate.continuation import continuation_scores
from palu.models import is_latent
from palu.nn.fusion import fold_hadamard, set_cache
from palu.nn.latent_cache import cache_nbytes, has_dropped
from palu.quantization import FLAGS as LATENT_FLAGS
from palu.token_sparsity import FLAGS as SPARSITY_FLAGS
from palu.token_sparsity import changed_by_flags

logger = logging.getLogger(__name__)
CACHE_FLAGS = ("lt_bits", "lt_value_bits", *LATENT_FLAGS, *SPARSITY_FLAGS)


@register_model("palu")
class PaluLM(HFLM):
    """lm-eval's `hf` that knows what the cache of a compressed model can do, and measures it.

    Arguments are those of `hf` (with `pretrained`, a path or hub name) and, for a compressed checkpoint, the scripts'
    flags `lt_*` (without `lt_clip_ratio=auto`) and those of token policies. A stock model is evaluated exactly as by
    `hf`, and so is a compressed one, but that where the cache drops tokens, or keeps the newest exact, contexts go
    through it before what is scored.

    Raises:
        PaluError: if the checkpoint's tensors are not the model's, or a flag is not for it.
    """

    def __init__(self, pretrained: str, lt_hadamard: bool = False, **kwargs: Any) -> None:
        flags = {name: kwargs.pop(name, None) for name in CACHE_FLAGS}
        super().__init__(pretrained=pretrained, **({"backend": "causal"} | kwargs))
        self._share_rows()
        given = [name for name, value in flags.items() if value is not None] + ["lt_hadamard"] * lt_hadamard
        if is_latent(self.model):
            self._set_cache(flags, lt_hadamard)
        elif given:
            raise PaluError(f"{pretrained} is not a compressed model; {given[0]} needs one")
        # Fine-tuned checkpoints often come with it off.
        self.model.config.use_cache = True
        self.cache_bytes = self.cache_tokens = self.drops = 0
        self.counts = True
        # A hook that held this object would keep the model alive with it.
        count = weakref.WeakMethod(self._note_cache)
        self.model.register_forward_hook(lambda *call: count()(*call) if count() else None, with_kwargs=True)

    def _share_rows(self) -> None:
        """Have every process of a launch take its part; `hf` does so where each has a GPU, else all would do all."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self._world_size == 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        require(
            self._world_size == launched,
            f"these {launched} processes do not know of each other; without GPUs set ACCELERATE_USE_CPU=true",
        )

    def _create_model(
        self, pretrained: str, dtype: Any = "auto", trust_remote_code: bool = False, **kwargs: Any
    ) -> None:
        """As `hf`, but tensors that are missing or misshapen are an error; `hf` would draw them at random."""
        # Adapters, other formats and other ways of placing a model are left to `hf`.
        usual = {"revision": "main", "gpus": kwargs.get("gpus"), "offload_folder": kwargs.get("offload_folder")}
        if any(value and usual.get(name) != value for name, value in kwargs.items()):
            super()._create_model(pretrained, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
        else:
            number = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
            self._model = load_model(pretrained, number, str(self.device), bool(trust_remote_code))

    def _set_cache(self, flags: dict[str, Any], hadamard: bool) -> None:
        if hadamard:
            # First, as ratios that were found for latents as they were are forgotten then.
            fold_hadamard(self.model)
        latent = self.model.config.latent
        quantization = latent.quantization.changed_by_flags(flags)
        require(not quantization.needs_search, "lt_clip_ratio auto has to be searched: use run_lm_eval.py")
        set_cache(self.model, quantization, changed_by_flags(latent.sparsity, flags))

    def kv_bytes_per_token(self) -> float:
        """Bytes that caches held after prompts, per token of these; 0 before the first.

        Of the prompts of all processes, each of which must call this.
        """
        held, tokens = self._summed(self.cache_bytes, self.cache_tokens)
        return held / tokens if tokens else 0.0

    def has_dropped_tokens(self) -> bool:
        """Whether the token policy dropped anything, in any process, each of which must call this."""
        return self._summed(self.drops)[0] > 0

    def _summed(self, *counts: int) -> list[int]:
        """Counts of all processes together."""
        summed = torch.tensor(counts, dtype=torch.int64, device=self.device)
        if self._world_size > 1:
            summed = self.accelerator.reduce(summed, reduction="sum")
        return summed.tolist()

    @property
    def drops_tokens(self) -> bool:
        """Whether the model's cache has a token policy."""
        return is_latent(self.model) and self.model.config.latent.sparsity is not None

    @property
    def has_exact_tokens(self) -> bool:
        """Whether some of the cache's tokens are codes and others are not, by their places in a row."""
        settings = self.model.config.latent.quantization if is_latent(self.model) else None
        return settings is not None and not settings.is_full and bool(settings.sinks or settings.window)

    def _note_cache(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Count what the cache of a prompt holds, later tokens not, and calls whose cache has dropped any."""
        if not self.counts:
            return
        ids, cache = kwargs.get("input_ids", args[0] if args else None), output.get("past_key_values")
        self.drops += has_dropped(cache)
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
        """As `hf`, in one forward pass; where it makes a difference, behind contexts that went through the cache."""
        if not (self.drops_tokens or self.has_exact_tokens):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            require(
                len(continuation) <= self.max_length, f"an answer exceeds the {self.max_length} tokens of the model"
            )
            kept = (context or [self.prefix_token_id])[-max(1, self.max_length + 1 - len(continuation)) :]
            by_context.setdefault(tuple(kept), []).append(index)
        # The longest first, so that what does not fit into the memory shows at once.
        contexts = sorted(by_context, key=len, reverse=True)
        size = override_bs or self._contexts_at_a_time(contexts[0], max(map(len, by_context.values())))
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

    def _contexts_at_a_time(self, longest: tuple[int, ...], answers: int) -> int:
        """As many as the batch size says, or as fit; one where places in a row count, which padding would move."""
        if self.has_exact_tokens:
            if self.batch_size != 1:
                logger.warning("contexts go one at a time: padding would move which tokens stay exact")
            return 1
        if isinstance(self.batch_size, int):
            return self.batch_size
        request = (("", ""), list(longest), [self.prefix_token_id])
        return max(1, self._detect_batch_size([request]) // answers)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """As `hf`; what the cache holds meanwhile is not counted."""
        self.counts = False
        try:
            return super()._detect_batch_size(requests, pos)
        finally:
            self.counts = True
