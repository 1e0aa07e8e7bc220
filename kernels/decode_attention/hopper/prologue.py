"""What is made ready before the first tile: up factors in shared memory, with queries folded in or beside them.

q . RoPE_t(B x) = sum_i cos(t w_i) (a_i . x) + sin(t w_i) (b_i . x),
a_i = q_i B_i + q_{i+D/2} B_{i+D/2},   b_i = q_{i+D/2} B_i - q_i B_{i+D/2}.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from palu.kernels.decode_attention.hopper.common import WARPS, copied_layout, copy_to_shared
from palu.kernels.decode_attention.hopper.operands import column_of, latent_at
from palu.kernels.decode_attention.hopper.turns import LEAST, UNIT, in_columns, place_in_factor

# Rows of a factor that are folded at a time.
ROWS: gl.constexpr = gl.constexpr(32)


@gluon.jit
def of_head(by_group, head: gl.constexpr, KV: gl.constexpr):
    """Of a tuple with as many for each of the program's key groups, what a kv head's group has."""
    return by_group[head // (KV // len(by_group))]


@gluon.jit
def there_if(ok, ranks):
    """Ranks of key groups, a tuple, zero unless a condition holds: of these nothing is read."""
    result = ()
    for group in gl.static_range(len(ranks)):
        result = result + (gl.where(ok, ranks[group], 0),)
    return result


@gluon.jit
def _latents(
    WIDE: gl.constexpr, layout: gl.constexpr, TURNED: gl.constexpr, WHICH_SECTION: gl.constexpr, SECTIONS: gl.constexpr
):  # fmt: skip
    """Which latents a section of factors has, as in `_copy_pairs`."""
    latent = WHICH_SECTION * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    return column_of(latent, SECTIONS * WIDE) if TURNED else latent


@gluon.jit
def _copy_pairs(
    to, up, up_stride, rank, head: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr, TURNED: gl.constexpr,
    WHICH_SECTION: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """Start copying pairs FIRST .. of a kv head's factor to [2 * pairs, latents], both of a pair side by side.

    Zero where there are none. TURNED: in the order of `place_in_factor`, and latents in that of `last_first`.
    WHICH_SECTION: of SECTIONS, which have as many latents each.
    """
    layout: gl.constexpr = copied_layout(to.shape[1])
    row = gl.arange(0, to.shape[0], gl.SliceLayout(1, layout))
    latent = _latents(to.shape[1], layout, TURNED, WHICH_SECTION, SECTIONS)
    pair, half = row // 2, row % 2
    if TURNED:
        pair, half = place_in_factor(row)
    ok = (FIRST + pair < WIDTH // 2)[:, None] & (latent < rank)[None, :]
    at = up + ((pair + half * (WIDTH // 2)) * up_stride)[:, None] + latent[None, :]
    copy_to_shared(to, at + (head * WIDTH + FIRST) * up_stride, mask=ok)


@gluon.jit
def copy_factors(
    factors, up, up_stride, rank, KV: gl.constexpr, UNITS: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr,
    TURNED: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """Start copying rows of the up factor of every other kv head from WHICH on, as `_copy_pairs`.

    factors: shared memory [at least KV * UNITS of every section, UNIT, latents of a section]. up, rank: of every key
    group, a tuple; up from where the program's first head would have its rows.
    """
    for head in gl.static_range(WHICH, KV, 2):
        for unit in gl.static_range(UNITS):
            at, latents = of_head(up, head, KV), of_head(rank, head, KV)
            for section in gl.static_range(SECTIONS):
                to = factors.index(section * (factors.shape[0] // SECTIONS) + head * UNITS + unit)
                _copy_pairs(
                    to, at, up_stride, latents, head, unit * (UNIT // 2), WIDTH, TURNED, section, SECTIONS
                )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def pieces_of(
    factors, KV: gl.constexpr, WHICH: gl.constexpr, WINDOWS: gl.constexpr, WHICH_SECTION: gl.constexpr,
    SECTIONS: gl.constexpr,
):  # fmt: skip
    """Every other kv head's rows that a query is folded into, as shared memory [ROWS, latents of a section] each.

    Of windows each head has one, every other unit of which has two.
    """
    PIECES: gl.constexpr = UNIT // ROWS
    UNITS: gl.constexpr = factors.shape[0] // SECTIONS
    OF_HEAD: gl.constexpr = 1 if WINDOWS else UNITS // KV * PIECES
    result = ()
    for head in gl.static_range(WHICH, KV, 2):
        for piece in gl.static_range(head * OF_HEAD, (head + 1) * OF_HEAD):
            unit = factors.index(WHICH_SECTION * UNITS + piece // PIECES * (2 if WINDOWS else 1))
            result = result + (unit.slice(piece % PIECES * ROWS, ROWS),)
    return result


@gluon.jit
def copy_fast(
    factors, up, up_stride, rank, KV: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr, SECTIONS: gl.constexpr
):  # fmt: skip
    """Start copying the first pairs of every other kv head's factor, of a window, both of a pair side by side.

    up, rank: as in `copy_factors`.
    """
    for section in gl.static_range(SECTIONS):
        pieces = pieces_of(factors, KV, WHICH, True, section, SECTIONS)
        for piece in gl.static_range(len(pieces)):
            at, latents = of_head(up, WHICH + 2 * piece, KV), of_head(rank, WHICH + 2 * piece, KV)
            _copy_pairs(
                pieces[piece], at, up_stride, latents, WHICH + 2 * piece, 0, WIDTH, False, section, SECTIONS
            )  # fmt: skip


@gluon.jit
def copy_halves(
    to, up, up_stride, rank, FIRST: gl.constexpr, PLACE: gl.constexpr, BEGIN: gl.constexpr, END: gl.constexpr,
    WIDTH: gl.constexpr, TURNED: gl.constexpr, WHICH_SECTION: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """Start copying pairs FIRST .. of kv heads' up factors, both numbers of the pairs, of one of SECTIONS sections.

    to: [halves, pairs, latents], zero where there are none, from half PLACE on. BEGIN .. END: which of a section, two
    of every head. TURNED: latents in the order of `last_first`.
    """
    PAIRS: gl.constexpr = to.shape[1]
    layout: gl.constexpr = copied_layout(to.shape[2])
    pair = FIRST + gl.arange(0, PAIRS, gl.SliceLayout(1, layout))
    latent = _latents(to.shape[2], layout, TURNED, WHICH_SECTION, SECTIONS)
    ok = (pair < WIDTH // 2)[:, None] & (latent < rank)[None, :]
    at = up + (pair * up_stride)[:, None] + latent[None, :]
    for half in gl.static_range(BEGIN, END):
        copy_to_shared(to.index(PLACE + half), at + half * (WIDTH // 2) * up_stride, mask=ok)


@gluon.jit
def _rows_of(factor):
    """Rows of a factor in registers, eight neighbouring latents of two neighbouring rows a thread."""
    across: gl.constexpr = factor.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([2, 8], [32 // across, across], [WARPS, 1], [1, 0])
    return factor.load(layout)


@gluon.jit
def _fold(factor, q_first, q_second):
    """Rows of both numbers of a pair, side by side in shared memory [ROWS, RANK], become a and b of the pair."""
    RANK: gl.constexpr = factor.shape[1]
    first, second = gl.split(_rows_of(factor).reshape([ROWS // 2, 2, RANK]).permute([0, 2, 1]))
    of_pair: gl.constexpr = gl.SliceLayout(1, first.type.layout)
    q_first = gl.convert_layout(q_first, of_pair)[:, None]
    q_second = gl.convert_layout(q_second, of_pair)[:, None]
    first, second = first.to(gl.float32), second.to(gl.float32)
    a = q_first * first + q_second * second
    b = q_second * first - q_first * second
    factor.store(gl.join(a, b).permute([0, 2, 1]).reshape([ROWS, RANK]).to(factor.dtype))


@gluon.jit
def load_pairs(
    query, head_step, scaling, KV: gl.constexpr, WIDE: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """Both numbers of every pair of every other kv head's query, in pieces as `fold` needs them."""
    across: gl.constexpr = RANK // 8
    layout: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [32 // across, across], [WARPS, 1], [1, 0]))
    q_first, q_second = (), ()
    for head in gl.static_range(WHICH, KV, 2):
        for row in gl.static_range(0, WIDE, ROWS):
            pair = row // 2 + gl.arange(0, ROWS // 2, layout)
            ok = pair < WIDTH // 2
            at = query + head * head_step + pair
            q_first = q_first + (gl.load(at, mask=ok, other=0.0).to(gl.float32) * scaling,)
            q_second = q_second + (gl.load(at + WIDTH // 2, mask=ok, other=0.0).to(gl.float32) * scaling,)
    return q_first, q_second


@gluon.jit
def fold(pieces, q_first, q_second):
    """Pieces of factors in shared memory, folded with queries, to the same place."""
    for piece in gl.static_range(len(pieces)):
        _fold(pieces[piece], q_first[piece], q_second[piece])


@gluon.jit
def load_queries(
    query, head_step, width, first_slot, SLOTS: gl.constexpr, COLUMNS: gl.constexpr, QUERIES: gl.constexpr,
    FIRST: gl.constexpr, PAIRED: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """Queries of a kv head in slots first_slot .. of [SLOTS, COLUMNS], zero elsewhere.

    PAIRED: first numbers of pairs from FIRST on, then second ones; else, absorbed, as the latents come.
    """
    # Eight neighbours, which pairs' numbers are in the order of `in_columns` as well.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    wanted = gl.arange(0, SLOTS, gl.SliceLayout(1, layout)) - first_slot
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    if PAIRED:
        pair = FIRST + column % (COLUMNS // 2)
        dim, inside = pair + column // (COLUMNS // 2) * (width // 2), pair < width // 2
    else:
        dim = latent_at(column, COLUMNS, BITS)
        inside = dim < width
    ok = ((wanted >= 0) & (wanted < QUERIES))[:, None] & inside[None, :]
    return gl.load(query + (wanted * head_step)[:, None] + dim[None, :], mask=ok, other=0.0).to(gl.float32)


@gluon.constexpr_function
def bias_columns(units: int) -> int:
    """Columns of biases, a power of two: two of each unit, and latents of a product at least."""
    return max(16, 1 << (2 * units - 1).bit_length())


@gluon.jit
def load_biases(bias, COLUMNS: gl.constexpr, UNITS: gl.constexpr, KV: gl.constexpr, WIDTH: gl.constexpr):
    """Key biases [UNIT, COLUMNS], in the order of the factors' rows, two columns of each unit; zeros behind them."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    row = gl.arange(0, UNIT, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    unit = column // 2
    pair, half = place_in_factor(row)
    pair += unit % (UNITS // KV) * (UNIT // 2)
    at = bias + unit // (UNITS // KV) * WIDTH + pair + half * (WIDTH // 2)
    return gl.load(at, mask=(pair < WIDTH // 2) & (unit < UNITS), other=0.0)


@gluon.jit
def store_biases(biases, loaded):
    """Key biases of `load_biases` to shared memory [UNIT, columns]: rounded, and what is left of them, by turns."""
    column = gl.arange(0, loaded.shape[1], gl.SliceLayout(0, loaded.type.layout))[None, :]
    numbers = loaded.to(gl.float32)
    rounded = numbers.to(biases.dtype)
    rest = (numbers - rounded.to(gl.float32)).to(biases.dtype)
    biases.store(gl.where(column % 2 == 0, rounded, rest))


@gluon.jit
def load_norm(norm, UNITS: gl.constexpr, WIDTH: gl.constexpr):
    """A key norm's weights, [UNIT] of each unit of a head, in the order of the factors' rows."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row = gl.arange(0, UNIT, layout)
    loaded = ()
    for unit in gl.static_range(UNITS):
        pair, half = place_in_factor(row)
        pair += unit * (UNIT // 2)
        loaded = loaded + (gl.load(norm + pair + half * (WIDTH // 2), mask=pair < WIDTH // 2, other=0.0),)
    return loaded


@gluon.jit
def store_norm(weights, loaded):
    """A key norm's weights of `load_norm` to shared memory [units of a head, UNIT]."""
    for unit in gl.static_range(len(loaded)):
        weights.index(unit).store(loaded[unit].to(gl.float32))


@gluon.jit
def load_beside(
    query, head_step, UNITS: gl.constexpr, SLOTS: gl.constexpr, KV: gl.constexpr, TOGETHER: gl.constexpr,
    QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Queries that turned keys meet, [SLOTS, UNIT], of UNITS units of every other kv head.

    Of TOGETHER heads in columns of their own; where there are more slots, those of others lie behind.
    """
    loaded = ()
    for head in gl.static_range(WHICH, KV, 2):
        for unit in gl.static_range(UNITS):
            numbers = load_queries(
                query + head * QUERIES * head_step, head_step, WIDTH,
                (head // TOGETHER * LEAST + head % TOGETHER * QUERY_SLOTS) % SLOTS, SLOTS, UNIT, QUERIES,
                unit * (UNIT // 2), True, 16,
            )  # fmt: skip
            loaded = loaded + (numbers,)
    return loaded


@gluon.jit
def store_beside(queries, loaded, scaling, KV: gl.constexpr, WHICH: gl.constexpr):
    """Queries of `load_beside` to shared memory [KV * units, slots, UNIT]."""
    UNITS: gl.constexpr = queries.shape[0] // KV
    for head in gl.static_range(WHICH, KV, 2):
        for unit in gl.static_range(UNITS):
            numbers = in_columns(loaded[head // 2 * UNITS + unit] * scaling)
            queries.index(head * UNITS + unit).store(numbers.to(queries.dtype))
