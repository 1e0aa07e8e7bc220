"""Decode attention over latents on Hopper: one launch in which groups of four warps score or weigh values.

The matrix units take the up factor from shared memory, where it stays, and key latents from registers, where codes
become numbers. Keys are rebuilt whole, or partly interpolated in windows of positions (`windows`, `slow`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from palu.kernels.decode_attention.hopper.common import place_of, wait_for_launch_before
from palu.kernels.decode_attention.hopper.planes import planes_at, row_at, steps_of, units_of
from palu.kernels.decode_attention.hopper.program import attend
from palu.kernels.latent_scores.tiles import GAPS


@gluon.jit(
    do_not_specialize=[
        "length", "table_b", "fast_b", "mask_b", "spans_b", "rows_heads", "parts", "start", "first_length",
        "first_start", "first_parts", "more_length", "more_start", "more_parts",
    ]
)  # fmt: skip
def hopper_kernel(
    query, keys, values, up, bias, norm, table, fast_table, mask, key_parameters, value_parameters, spans,
    bases, basis, frequencies, means, logarithms,
    key_rank_of, key_offset_of, value_rank_of, value_offset_of,
    exact_up, first_keys, first_values, more_keys, more_values,
    length, keys_b, keys_t, values_b, values_t, keys_plane, values_plane, key_parameters_b, key_parameters_t,
    value_parameters_b, value_parameters_t, up_stride, table_b, table_t, fast_b, fast_t, mask_b, mask_t, spans_b,
    query_stride, rows_heads, scaling, epsilon, parts, start,
    exact_up_stride, exact_scaling, first_length, first_start, first_parts, first_keys_b, first_keys_t, first_values_b,
    first_values_t, more_length, more_start, more_parts, more_keys_b, more_keys_t, more_values_b, more_values_t,
    MAIN: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Mean value latents of a program's heads over a part of the tokens, and the logarithms of the weights' sums.

    Grid: parts of the tokens, programs for the row's heads, rows. With one or two stretches of exact tokens beside the
    others, BESIDE, the first axis counts the programs of all parts: of the `parts` of the others, MAIN, which begin at
    token `start`, then of the `first_parts` of the first exact ones, then of the `more_parts` of the second ones.

    query: [rows, heads, query_stride]. keys, values: of codes, bytes. keys_plane, values_plane: bytes of a token's
    codes before the high plane. up: of codes in the order of `unit_order`, or section by section where keys have
    several (of `section_of` latents). bias: of all keys; norm: a key norm's weights, epsilon what it adds to mean
    squares. table: `lane_table`, fast_table: that of the fast pairs; they and the mask are of all tokens.
    parameters: of codes, scales of every group, with their zero points behind them if they are asymmetric. Where
    there are windows, rows without gaps, by `spans_of`, are computed in them, with a mode and a plan of their own,
    the others as without; bases, basis: of `palu.kernels.rotation.Window`, of folded queries by lane. means:
    [parts, rows, heads, rank_stride]; logarithms: of base 2, float32 [parts, rows, heads]: `weighers` parts of
    every program. MAIN, BESIDE: `StretchConstants`.
    """
    wait_for_launch_before()
    of_heads = (query, bias, norm, mask, key_rank_of, key_offset_of, value_rank_of, value_offset_of, means, logarithms)
    numbers = (table_b, table_t, mask_b, mask_t, query_stride, rows_heads, epsilon)
    stored = (
        keys, values, key_parameters, value_parameters, keys_b, keys_t, values_b, values_t, keys_plane, values_plane,
        key_parameters_b, key_parameters_t, value_parameters_b, value_parameters_t,
    )  # fmt: skip
    tables = (up, table, fast_table, spans, bases, basis, frequencies, up_stride, fast_b, fast_t, spans_b)
    program = gl.program_id(0)
    if BESIDE is None:
        _attend_stretch(
            of_heads, stored, tables, numbers, length, start, scaling, program, parts, gl.program_id(1), 0, MAIN, True
        )  # fmt: skip
    elif program < parts * MAIN.groups:
        part, share = program // MAIN.groups, program % MAIN.groups
        _attend_stretch(
            of_heads, stored, tables, numbers, length, start, scaling, part, parts, share, 0, MAIN, False
        )  # fmt: skip
    else:
        # None is idle: it would wait for a multiprocessor as the others do.
        own = program - parts * MAIN.groups
        part, share = own // BESIDE.groups, own % BESIDE.groups
        more = part >= first_parts
        exact = (
            gl.where(more, more_keys, first_keys), gl.where(more, more_values, first_values), query, query,
            gl.where(more, more_keys_b, first_keys_b), gl.where(more, more_keys_t, first_keys_t),
            gl.where(more, more_values_b, first_values_b), gl.where(more, more_values_t, first_values_t),
            0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        exact_tables = (exact_up, table, table, spans, bases, basis, frequencies, exact_up_stride, 0, 0, 0)
        _attend_stretch(
            of_heads, exact, exact_tables, numbers, gl.where(more, more_length, first_length),
            gl.where(more, more_start, first_start), exact_scaling, gl.where(more, part - first_parts, part),
            gl.where(more, more_parts, first_parts), share,
            parts * MAIN.weighers + gl.where(more, first_parts * BESIDE.weighers, 0), BESIDE, False,
        )  # fmt: skip


@gluon.jit
def _attend_stretch(
    of_heads, stored, tables, numbers, length, start, scaling, part, parts, share, stored_before, OF: gl.constexpr,
    IS_WHOLE: gl.constexpr,
):  # fmt: skip
    """One of `parts` programs for heads of a row and `length` tokens from `start` on, of all tokens if IS_WHOLE.

    share: which of the programs for the row's heads. stored_before: parts that other stretches' programs leave. OF:
    `StretchConstants`.
    """
    query, bias, norm, mask, key_rank_of, key_offset_of, value_rank_of, value_offset_of, means, logarithms = of_heads
    (
        keys, values, key_parameters, value_parameters, keys_b, keys_t, values_b, values_t, keys_plane, values_plane,
        key_parameters_b, key_parameters_t, value_parameters_b, value_parameters_t,
    ) = stored  # fmt: skip
    up, table, fast_table, spans, bases, basis, frequencies, up_stride, fast_b, fast_t, spans_b = tables
    table_b, table_t, mask_b, mask_t, query_stride, rows_heads, epsilon = numbers
    BITS: gl.constexpr = OF.bits
    EXACT: gl.constexpr = OF.exact
    WINDOWS: gl.constexpr = OF.windows
    SHARES: gl.constexpr = OF.shares
    KEY_GROUPS: gl.constexpr = OF.key_groups
    RANK: gl.constexpr = OF.rank
    # Of a program's factor.
    ROWS: gl.constexpr = OF.kv * OF.width
    # First of all: everything waits for them.
    row = gl.program_id(2)
    lead, leading, end_tile = 0, 0, 0
    if WINDOWS is not None:
        at_span = spans + row * spans_b
        lead, leading, end_tile = gl.load(at_span), gl.load(at_span + 1), gl.load(at_span + 2)
    # Programs of a group's shares have the same latents.
    first_group = share // SHARES * KEY_GROUPS
    value_group = first_group // OF.joined
    at_row = (row // OF.query_rows).to(gl.int64)
    value_rank, value_offset = place_of(value_rank_of, value_offset_of, value_group, OF.even_values, OF.value_divisor)
    of_keys: gl.constexpr = (BITS, OF.key_copy)
    of_values: gl.constexpr = (OF.value_bits, OF.value_copy)
    at_keys, at_values = row_at(keys, at_row, keys_b, of_keys), row_at(values, at_row, values_b, of_values)
    if BITS < 16:
        PARAMETERS: gl.constexpr = 2 if OF.asymmetric else 1
        key_parameters += at_row * key_parameters_b + first_group * PARAMETERS
        value_parameters += at_row * value_parameters_b + value_group * PARAMETERS
    first_head = (row * OF.groups + share) * (OF.kv * OF.queries)
    at_query = query + first_head * query_stride
    own_keys, own_parameters, own_up, key_ranks, key_units, up_ranks = (), (), (), (), (), ()
    for which in gl.static_range(KEY_GROUPS):
        group = first_group + which
        key_rank, key_offset = place_of(key_rank_of, key_offset_of, group, OF.even_keys, OF.key_divisor)
        # Factors for codes are in the codes' order, every group as wide as the others.
        up_offset, up_rank = key_offset, key_rank
        if BITS < 16:
            up_offset, up_rank = group * RANK, RANK
            own_parameters = own_parameters + (key_parameters + which * PARAMETERS,)
        at_up = up + up_offset
        if SHARES > 1:
            at_up += share % SHARES * ROWS * up_stride
        if which > 0:
            # The program's heads are counted on, the rows of a group's factor from its own first one.
            at_up -= which * (ROWS // KEY_GROUPS) * up_stride
        own_keys = own_keys + (planes_at(at_keys, keys_plane, key_offset, of_keys),)
        key_units = key_units + (units_of(key_rank, of_keys),)
        own_up, key_ranks, up_ranks = own_up + (at_up,), key_ranks + (key_rank,), up_ranks + (up_rank,)
    parameters = (own_parameters, value_parameters, key_parameters_t, value_parameters_t)
    at_table, at_fast = table + gl.multiple_of(at_row * table_b, 8), fast_table + gl.multiple_of(at_row * fast_b, 8)
    if not IS_WHOLE:
        before = gl.cast(start, gl.int64)
        at_table, at_fast, mask = at_table + before * table_t, at_fast + before * fast_t, mask + before * mask_t
    given = (
        (length, mask, row * mask_b, mask_t),
        (planes_at(at_values, values_plane, value_offset, of_values), value_rank, units_of(value_rank, of_values),
         steps_of(values_t, of_values)),
        (own_keys, parameters, key_units, steps_of(keys_t, of_keys)),
        (at_query, query_stride, scaling, key_ranks),
        (own_up, up_ranks, up_stride, bias + share * ROWS, norm, epsilon),
        (bases, basis, frequencies),
        (means, logarithms, rows_heads),
    )  # fmt: skip
    # Each group of warps that weighs values leaves a part of its own.
    out = (stored_before + part * OF.weighers) * rows_heads + first_head
    if WINDOWS is None or lead == GAPS:
        attend(given, part, parts, out, 0, 0, 0, at_table, table_t, OF, EXACT)
    else:
        attend(given, part, parts, out, lead, leading, end_tile, at_fast, fast_t, OF, WINDOWS)
