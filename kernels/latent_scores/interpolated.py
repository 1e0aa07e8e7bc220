"""Scores of a tile of tokens: interpolated pairs, rebuilt fast pairs, products with absorbed queries."""

import triton
import triton.language as tl

from palu.kernels.codes import load_latents
from palu.kernels.latent_scores.tiles import (
    GAPS,
    as_operand,
    less_zero_points,
    load_scales,
    paired_rows,
    slots_used,
    store_scores,
    visible_tokens,
)


@triton.jit
def _product(
    x, kept, first: tl.constexpr, weights, limit, source, plane, ok, shift, rank,
    RANK: tl.constexpr, PART: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
    ASSEMBLY: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Products of latents with columns of weights, pointers to which [1, columns] are given: [tokens, columns].

    x: if KEPT, the latents, in parts of PART; kept: the columns in such parts, from place `first` on; limit: the
    latents that the columns have.
    """
    if KEPT:
        product = tl.dot(x[0], kept[first], input_precision="ieee")
        for part in tl.static_range(1, RANK // PART):
            product = tl.dot(x[part], kept[first + part], product, input_precision="ieee")
    else:
        product = tl.zeros((ok.shape[0], weights.shape[1]), tl.float32)
        for part in tl.range(0, RANK, PART, num_stages=1):
            more = load_latents(source, plane, ok, part, rank, dtype, BITS, PART, ASSEMBLY)
            latent = part + tl.arange(0, PART)[:, None]
            columns = tl.load(weights + latent, mask=latent < limit, other=0.0).to(dtype)
            product = tl.dot(less_zero_points(more, shift, ASYMMETRIC), columns, product, input_precision="ieee")
    return product


@triton.jit
def _weighed(
    product, table, scale, biases, KV: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Products [tokens, KV * columns] times a table [tokens, columns], added up to [tokens, KV, COLUMNS]."""
    TILE: tl.constexpr = product.shape[0]
    if HAS_BIAS:
        product = product * scale[:, None] + biases[None, :] if BITS < 16 else product + biases[None, :]
    wide: tl.constexpr = table.shape[1]
    product = tl.reshape(product, (TILE, KV, wide)) * table.to(tl.float32)[:, None, :]
    if wide > COLUMNS:
        product = tl.sum(tl.reshape(product, (TILE, KV, wide // COLUMNS, COLUMNS)), 2)
    return product


@triton.jit
def _folded_tile(
    x, fast, slow, table, share, scale, shift, fast_weights, slow_weights, fast_biases, slow_biases, source, plane, ok,
    rank,
    KV: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    PART: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, ASSEMBLY: tl.constexpr,
    HAS_BIAS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scores of one tile for one query per kv head, with the query folded into the fast pairs too, [tokens, KV]."""
    product = _product(
        x, slow, 0, slow_weights, RANK, source, plane, ok, shift, rank, RANK, PART, KEPT, BITS, ASYMMETRIC, ASSEMBLY,
        dtype,
    )  # fmt: skip
    # Columns are added up across threads once, in the end.
    terms = _weighed(product, tl.load(share), scale, slow_biases, KV, COLUMNS, BITS, HAS_BIAS)
    for chunk in tl.static_range(2 * FAST // CHUNK):
        first = chunk * KV * CHUNK
        product = _product(
            x, fast, chunk * (RANK // PART), fast_weights + first * RANK, RANK, source, plane, ok, shift, rank, RANK,
            PART, KEPT, BITS, ASYMMETRIC, ASSEMBLY, dtype,
        )  # fmt: skip
        turned = tl.load(table + chunk * CHUNK + tl.arange(0, CHUNK)[None, :], mask=ok, other=0.0)
        biases = slow_biases
        if HAS_BIAS:
            biases = tl.load(fast_biases + first + tl.arange(0, KV * CHUNK))
        terms += _weighed(product, turned, scale, biases, KV, COLUMNS, BITS, HAS_BIAS)
    score = tl.sum(terms, 2)
    return score * scale[:, None] if (BITS < 16) and not HAS_BIAS else score


@triton.jit
def _shared_tile(
    x, factors, queries, slow, gather, slow_biases, scale, shift, at_up, up_stride, bias, table, share, slow_weights,
    source, plane, ok, rank, factor_rank, kv_left,
    HEAD_DIM: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, KV: tl.constexpr, QUERIES: tl.constexpr,
    QUERY_SLOTS: tl.constexpr, FAST: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr,
    PART: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, ASSEMBLY: tl.constexpr,
    HAS_BIAS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scores of one tile for several queries per kv head, which share the rebuilt fast pairs, [tokens, SLOTS]."""
    TILE: tl.constexpr = ok.shape[0]
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS
    PAIRS: tl.constexpr = CHUNK // 2
    product = _product(
        x, slow, 0, slow_weights, RANK, source, plane, ok, shift, rank, RANK, PART, KEPT, BITS, ASYMMETRIC, ASSEMBLY,
        dtype,
    )  # fmt: skip
    along = tl.load(share).to(tl.float32)
    # Scales meet the small tables, or the products where a bias has to be added to them.
    if (BITS < 16) and not HAS_BIAS:
        along *= scale[:, None]
    if HAS_BIAS:
        product = product * scale[:, None] + slow_biases[None, :] if BITS < 16 else product + slow_biases[None, :]
    if (QUERIES != QUERY_SLOTS) or HEADS_PER_GROUP % KV > 0:
        # Columns of no query head, and their biases, may hold anything.
        used = slots_used(tl.arange(0, WIDE) // COLUMNS, QUERY_SLOTS, QUERIES, kv_left * QUERIES)
        product = tl.where(used[None, :], product, 0.0)
    product = tl.reshape(product, (TILE, KV * QUERY_SLOTS, COLUMNS)) * along[:, None, :]
    score = tl.dot(tl.reshape(product, (TILE, WIDE)).to(dtype), gather, input_precision="ieee")
    for chunk in tl.static_range(FAST // PAIRS):
        at_rows = at_up + paired_rows(chunk, kv_left, HEAD_DIM, KV, CHUNK)[None, :] * up_stride
        product = _product(
            x, factors, chunk * (RANK // PART), at_rows, factor_rank, source, plane, ok, shift, rank, RANK, PART, KEPT,
            BITS, ASYMMETRIC, ASSEMBLY, dtype,
        )  # fmt: skip
        turned = tl.load(table + chunk * CHUNK + tl.arange(0, CHUNK)[None, :], mask=ok, other=0.0).to(tl.float32)
        if HAS_BIAS:
            added = tl.load(bias + paired_rows(chunk, kv_left, HEAD_DIM, KV, CHUNK)).to(tl.float32)[None, :]
            product = product * scale[:, None] + added if BITS < 16 else product + added
        elif BITS < 16:
            turned *= scale[:, None]
        cos, sin = tl.split(tl.reshape(turned, (TILE, 1, PAIRS, 2)))
        first, second = tl.split(tl.reshape(product, (TILE, KV, PAIRS, 2)))
        turned_first = as_operand(first * cos - second * sin).to(dtype)
        score = tl.dot(turned_first, queries[2 * chunk], score, input_precision="ieee")
        turned_second = as_operand(second * cos + first * sin).to(dtype)
        score = tl.dot(turned_second, queries[2 * chunk + 1], score, input_precision="ieee")
    return score


@triton.jit
def score_tile(
    tile_start, factors, queries, gather, at_fast, at_fast_biases, at_slow, slow_step, at_slow_biases, at_up, up_stride,
    bias, table, basis, starts, scales, mask, scores, source, plane, latents_t, at_scales, scales_t, at_table, table_t,
    at_mask, mask_t, length, rank, factor_rank, kv_left, out, stored, stored_from, scaling,
    MODE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, KV: tl.constexpr,
    QUERIES: tl.constexpr, QUERY_SLOTS: tl.constexpr, SLOTS: tl.constexpr, SCORED: tl.constexpr, FAST: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr,
    PART: tl.constexpr, KEPT: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr, MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Scores of TILE tokens of one block; if CHECKED, some may lie behind the last token, or the block have gaps.

    at_up: pointers to the up factor of the block's first kv head, or to the absorbed queries [1, slots].
    """
    WIDE: tl.constexpr = KV * QUERY_SLOTS * COLUMNS
    inside = tl.arange(0, TILE)
    token = tile_start + inside
    ok = token < length if CHECKED else inside >= 0
    # From the tile on in 32 bits, so that addresses stay cheap.
    source += tl.cast(tile_start, tl.int64) * latents_t + (inside * latents_t)[:, None]
    plane += tl.cast(tile_start, tl.int64) * latents_t + (inside * latents_t)[:, None]
    scale, shift = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    if BITS < 16:
        scale, shift = load_scales(scales, at_scales + token * scales_t, ok, BITS, ASYMMETRIC)
    x, slow = (), ()
    for part in tl.static_range(0, RANK if KEPT and MODE != "absorbed" else 0, PART):
        more = load_latents(source, plane, ok[:, None], part, rank, dtype, BITS, PART, ASSEMBLY)
        x = x + (less_zero_points(more, shift, ASYMMETRIC),)
    slot_ok = slots_used(tl.arange(0, SCORED), QUERY_SLOTS, QUERIES, kv_left * QUERIES)
    if MODE == "absorbed":
        score = tl.zeros((TILE, SCORED), tl.float32)
        for part in tl.static_range(0, RANK, PART):
            # One part after the other: all of a wide group's do not fit into registers.
            more = load_latents(source, plane, ok[:, None], part, rank, dtype, BITS, PART, ASSEMBLY)
            more = less_zero_points(more, shift, ASYMMETRIC)
            if KEPT:
                factor = factors[part // PART]
            else:
                latent = part + tl.arange(0, PART)[:, None]
                both_ok = (latent < factor_rank) & slot_ok[None, :]
                factor = (tl.load(at_up + latent, mask=both_ok, other=0.0).to(tl.float32) * scaling).to(dtype)
            score = tl.dot(more, factor, score, input_precision="ieee")
        if BITS < 16:
            score *= scale[:, None]
    else:
        block = tile_start // SPAN
        at_slow += tl.cast(slow_step * block, tl.int64) * (WIDE * RANK)
        for part in tl.static_range(0, RANK if KEPT else 0, PART):
            slow = slow + (tl.load(at_slow + part + tl.arange(0, PART)[:, None]),)
        slow_biases = tl.zeros((WIDE,), tl.float32)
        if HAS_BIAS:
            slow_biases = tl.load(at_slow_biases + slow_step * block * WIDE + tl.arange(0, WIDE))
        share = basis + (tile_start % SPAN + inside)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        turns = table + at_table + (token * table_t)[:, None]
        if CHECKED:
            # `weight_kernel` has the scores of blocks with gaps.
            slot_ok = slot_ok & (tl.load(starts + block + tl.zeros((SCORED,), tl.int32)) != GAPS)
        if MODE == "folded":
            score = _folded_tile(
                x, factors, slow, turns, share, scale, shift, at_fast, at_slow, at_fast_biases, slow_biases, source,
                plane, ok[:, None], rank, KV, FAST, COLUMNS, CHUNK, RANK, PART, KEPT, BITS, ASYMMETRIC, ASSEMBLY,
                HAS_BIAS, dtype,
            )  # fmt: skip
        else:
            score = _shared_tile(
                x, factors, queries, slow, gather[0], slow_biases, scale, shift, at_up, up_stride, bias, turns, share,
                at_slow, source, plane, ok[:, None], rank, factor_rank, kv_left, HEAD_DIM, HEADS_PER_GROUP, KV, QUERIES,
                QUERY_SLOTS, FAST, COLUMNS, CHUNK, RANK, PART, KEPT, BITS, ASYMMETRIC, ASSEMBLY, HAS_BIAS, dtype,
            )  # fmt: skip
    seen, added = visible_tokens(mask, at_mask, token, mask_t, ok, MASK)
    store_scores(score, added, seen, token + stored_from, scores, out, stored, slot_ok, SLOTS, MASK)
