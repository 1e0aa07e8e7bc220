"""Decode attention over latents on Hopper: one launch in which groups of four warps score or weigh values.

The matrix units take the up factor from shared memory, where it stays, and key latents from registers, where codes
become numbers. Keys are rebuilt whole, or partly interpolated in windows of positions (`windows`, `slow`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import (
    allow_launch_after,
    place_of,
    read_what_is_written,
    wait_for_launch_before,
)
from palu.kernels.decode_attention.hopper.planes import planes_at, row_at, steps_of, units_of
from palu.kernels.decode_attention.hopper.program import attend
from palu.kernels.latent_scores.tiles import GAPS


@gluon.jit(do_not_specialize=["length", "table_b", "fast_b", "mask_b", "spans_b", "rows_heads"])
def hopper_kernel(
    query, keys, values, up, bias, norm, table, fast_table, mask, key_parameters, value_parameters, spans,
    bases, basis, frequencies, means, logarithms,
    key_rank_of, key_offset_of, value_rank_of, value_offset_of,
    length, keys_b, keys_t, values_b, values_t, keys_plane, values_plane, key_parameters_b, key_parameters_t,
    value_parameters_b, value_parameters_t, up_stride, table_b, table_t, fast_b, fast_t, mask_b, mask_t, spans_b,
    query_stride, rows_heads, scaling, epsilon,
    MODE: gl.constexpr, KEY_STAGES: gl.constexpr, STEP: gl.constexpr, VALUE_STAGES: gl.constexpr,
    SPAN: gl.constexpr, SPAN_MODE: gl.constexpr, SPAN_KEY_STAGES: gl.constexpr, SPAN_STEP: gl.constexpr,
    SPAN_VALUE_STAGES: gl.constexpr, HELD: gl.constexpr, GROUPS: gl.constexpr, SHARES: gl.constexpr,
    JOINED: gl.constexpr, KEY_GROUPS: gl.constexpr,
    KV: gl.constexpr, QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr,
    SLOTS: gl.constexpr, QUERY_ROWS: gl.constexpr, WIDTH: gl.constexpr, WIDE: gl.constexpr, RANK: gl.constexpr,
    KEY_DIVISOR: gl.constexpr, CHUNKS: gl.constexpr, VALUE_DIVISOR: gl.constexpr, RANK_STRIDE: gl.constexpr,
    MASK: gl.constexpr, DTYPE: gl.constexpr, TOGETHER: gl.constexpr, COLUMNS: gl.constexpr, BITS: gl.constexpr,
    VALUE_BITS: gl.constexpr,
    ASYMMETRIC: gl.constexpr, SCORERS: gl.constexpr, WEIGHERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr,
    VALUE_REGISTERS: gl.constexpr, WHOLE: gl.constexpr, SCALED: gl.constexpr, SECTIONS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_NORM: gl.constexpr, EVEN_KEYS: gl.constexpr, EVEN_VALUES: gl.constexpr,
    KEY_COPY: gl.constexpr, VALUE_COPY: gl.constexpr, BEGINS: gl.constexpr, ENDS: gl.constexpr,
):  # fmt: skip
    """Mean value latents of a program's heads over a part of the tokens, and the logarithms of the weights' sums.

    GROUPS: programs for a row's heads: SHARES for each key group's, or one for those of KEY_GROUPS. JOINED: key groups
    whose values are in the same latents.

    query: [rows, GROUPS * KV * QUERIES, query_stride]; absorbed, KV is one. keys, values: of codes, bytes. BITS: of
    keys, VALUE_BITS: of values, which have codes if keys do. keys_plane, values_plane: bytes of a token's codes before
    the high plane; KEY_COPY, VALUE_COPY: as KIND in `planes`. up: of codes in the order of `unit_order`, or section by
    section where keys have several (SECTIONS, of `section_of` latents). SCALED: codes of keys meet it times their
    scales, else scores are. bias: of all keys; norm: a key norm's weights, epsilon what it adds to mean squares. table:
    `lane_table`, fast_table: that of the fast pairs. parameters: of codes, scales of every group, with their zero
    points behind them if ASYMMETRIC. SPAN: tokens of a window, or 0; where there are windows, rows without gaps, by
    `spans_of`, are computed in them, with a mode and a plan of their own (SPAN_*), the others as without; bases, basis:
    of `palu.kernels.rotation.Window`, of folded queries by lane. means: [parts, rows, heads, RANK_STRIDE]; logarithms:
    of base 2, float32 [parts, rows, heads]: WEIGHERS parts of every program. BEGINS, ENDS: of launches that run side by
    side the first one begins, and waits for what came before all of them; the others begin when it has, and are not
    over before those that were launched earlier.
    """
    if BEGINS:
        wait_for_launch_before()
    else:
        read_what_is_written()
    if not ENDS:
        allow_launch_after()
    # First of all: everything waits for them.
    lead, leading, end_tile = 0, 0, 0
    if SPAN > 0:
        at_span = spans + gl.program_id(2) * spans_b
        lead, leading, end_tile = gl.load(at_span), gl.load(at_span + 1), gl.load(at_span + 2)
    # Programs of a group's shares have the same latents.
    share, row = gl.program_id(1), gl.program_id(2)
    first_group = share // SHARES * KEY_GROUPS
    value_group = first_group // JOINED
    at_row = (row // QUERY_ROWS).to(gl.int64)
    value_rank, value_offset = place_of(value_rank_of, value_offset_of, value_group, EVEN_VALUES, VALUE_DIVISOR)
    of_keys: gl.constexpr = (BITS, KEY_COPY)
    of_values: gl.constexpr = (VALUE_BITS, VALUE_COPY)
    at_keys, at_values = row_at(keys, at_row, keys_b, of_keys), row_at(values, at_row, values_b, of_values)
    if BITS < 16:
        PARAMETERS: gl.constexpr = 2 if ASYMMETRIC else 1
        key_parameters += at_row * key_parameters_b + first_group * PARAMETERS
        value_parameters += at_row * value_parameters_b + value_group * PARAMETERS
    first_head = (row * GROUPS + share) * (KV * QUERIES)
    at_query = query + first_head * query_stride
    own_keys, own_parameters, own_up, key_ranks, key_units, up_ranks = (), (), (), (), (), ()
    for which in gl.static_range(KEY_GROUPS):
        group = first_group + which
        key_rank, key_offset = place_of(key_rank_of, key_offset_of, group, EVEN_KEYS, KEY_DIVISOR)
        # Factors for codes are in the codes' order, every group as wide as the others.
        up_offset, up_rank = key_offset, key_rank
        if BITS < 16:
            up_offset, up_rank = group * RANK, RANK
            own_parameters = own_parameters + (key_parameters + which * PARAMETERS,)
        at_up = up + up_offset
        if SHARES > 1:
            at_up += share % SHARES * (KV * WIDTH) * up_stride
        if which > 0:
            # The program's heads are counted on, the rows of a group's factor from its own first one.
            at_up -= which * (KV // KEY_GROUPS * WIDTH) * up_stride
        own_keys = own_keys + (planes_at(at_keys, keys_plane, key_offset, of_keys),)
        key_units = key_units + (units_of(key_rank, of_keys),)
        own_up, key_ranks, up_ranks = own_up + (at_up,), key_ranks + (key_rank,), up_ranks + (up_rank,)
    parameters = (own_parameters, value_parameters, key_parameters_t, value_parameters_t)
    given = (
        own_keys, planes_at(at_values, values_plane, value_offset, of_values), parameters, own_up, at_query,
        bias + share * (KV * WIDTH), norm, mask, bases, basis, frequencies, means, logarithms,
        key_ranks, key_units, up_ranks, value_rank, units_of(value_rank, of_values), length,
        steps_of(keys_t, of_keys), steps_of(values_t, of_values), row * mask_b, mask_t, up_stride, query_stride,
        rows_heads, scaling, epsilon,
    )  # fmt: skip
    at_table = table + gl.multiple_of(at_row * table_b, 8)
    if SPAN == 0 or lead == GAPS:
        attend(
            given, first_head, 0, 0, 0, at_table, table_t, MODE, 0, KEY_STAGES, STEP, VALUE_STAGES, 1,
            KV, QUERIES, QUERY_SLOTS, SLOTS, WIDTH, WIDE,
            RANK, CHUNKS, RANK_STRIDE, MASK, DTYPE, TOGETHER, COLUMNS, BITS, VALUE_BITS, ASYMMETRIC, SCORERS, WEIGHERS,
            SCORE_REGISTERS, VALUE_REGISTERS, WHOLE, SCALED, SECTIONS, HAS_BIAS, HAS_NORM,
        )  # fmt: skip
    else:
        attend(
            given, first_head, lead, leading, end_tile, fast_table + gl.multiple_of(at_row * fast_b, 8), fast_t,
            SPAN_MODE, SPAN, SPAN_KEY_STAGES, SPAN_STEP, SPAN_VALUE_STAGES, HELD,
            KV, QUERIES, QUERY_SLOTS, SLOTS, WIDTH, WIDE,
            RANK, CHUNKS, RANK_STRIDE, MASK, DTYPE, TOGETHER, COLUMNS, BITS, VALUE_BITS, ASYMMETRIC, SCORERS, WEIGHERS,
            SCORE_REGISTERS, VALUE_REGISTERS, WHOLE, SCALED, SECTIONS, HAS_BIAS, HAS_NORM,
        )  # fmt: skip
    if not BEGINS:
        wait_for_launch_before()
