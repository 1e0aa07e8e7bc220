"""The warps that score, in groups of four: of two groups each has every other tile and a buffer that it hands on."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from palu.kernels.decode_attention.hopper.common import (
    TILE,
    WARPS,
    allow_launch_after,
    buffer_in,
    hand_over,
    load_seen,
    phase_of,
    synchronize,
)
from palu.kernels.decode_attention.hopper.parameters import (
    hand_on_parameters,
    load_parameters,
    logarithm_of,
    place_of_scales,
    zeros_of,
)
from palu.kernels.decode_attention.hopper.prologue import (
    copy_factors,
    copy_fast,
    fold,
    load_beside,
    load_biases,
    load_norm,
    load_pairs,
    pieces_of,
    store_beside,
    store_biases,
    store_norm,
    there_if,
)
from palu.kernels.decode_attention.hopper.slow import (
    load_basis,
    load_slow_of,
    make_slow,
    sections_held,
    slow_numbers,
    start_slow,
)
from palu.kernels.decode_attention.hopper.tiles import copy_tile, loaded_of
from palu.kernels.decode_attention.hopper.turns import LEAST, UNIT, by_pair, load_turns, units_of
from palu.kernels.decode_attention.hopper.units import hand_on_slow, score_turned, score_weighed, with_slow
from palu.kernels.decode_attention.hopper.windows import (
    COLUMNS,
    FAST,
    copy_slow,
    first_of,
    load_frequencies,
    load_own_queries,
    make_window,
    own_parts,
)


@gluon.jit
def places_of(found, WHICH: gl.constexpr):
    """Shared memory [places, tile, columns] for scores, and the first place of a group's."""
    return (found[0], WHICH * (found[0].shape[0] // 2)) if len(found) == 1 else (found[WHICH], 0)


@gluon.jit
def _row_of(index, window, SPAN: gl.constexpr):
    """Which row of the basis a tile begins with, that is in the window that begins with a tile, or in the next one."""
    inside = (index - window) * TILE
    return gl.where(inside < SPAN, inside, inside - SPAN)


@gluon.jit
def _turns_of(table, basis, tiles, index, window, table_t, after, WORDS: gl.constexpr, SPAN: gl.constexpr):
    """Of a tile's tokens, what weighs their products: cosines and sines, and rows of the basis of windows of SPAN.

    window: as of `_row_of`; after: zeros [tile], which these loads wait for.
    """
    first, step, _, _, length = tiles
    words = (load_turns(table, (first + index * step) * TILE, table_t, length, after, WORDS),)
    if SPAN > 0:
        words = words + (load_turns(basis, _row_of(index, window, SPAN), COLUMNS, SPAN, after, COLUMNS // 2),)
    return words


@gluon.jit
def _words_of(turns, layout: gl.constexpr):
    """Words of a tile's turns for every unit of a head, or of windows of fast and of slow pairs."""
    return (by_pair(turns[0]), by_pair(turns[1])) if len(turns) == 2 else units_of(turns[0], layout)


@gluon.jit
def _start(
    factors, beside, up, up_stride, rank, KV: gl.constexpr, WIDTH: gl.constexpr, MODE: gl.constexpr,
    WHICH: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """Start copying what this group of warps prepares."""
    if MODE == "windows":
        if WHICH < KV:
            copy_fast(factors, up, up_stride, rank, KV, WIDTH, WHICH, SECTIONS)
        FIRST: gl.constexpr = first_of(KV, WHICH)
        HEADS: gl.constexpr = min(beside[0][0].shape[0] // own_parts(KV, SECTIONS) // 2, max(0, KV - FIRST))
        copy_slow(beside[0], up, up_stride, rank, FIRST, HEADS, KV, WIDTH, WHICH, SECTIONS)
    else:
        # In mixed mode a unit of each head; behind these comes one of slow pairs for every key group.
        UNITS: gl.constexpr = 1 if MODE == "mixed" else factors.shape[0] // SECTIONS // KV
        copy_factors(factors, up, up_stride, rank, KV, UNITS, WIDTH, WHICH, MODE != "folded", SECTIONS)


@gluon.jit
def _prepare(
    factors, beside, ready, loaded, bases, frequencies, query, up, numbers, position, window, begin, more,
    PENDING: gl.constexpr, WHICH: gl.constexpr, MODE: gl.constexpr, KV: gl.constexpr, TOGETHER: gl.constexpr,
    QUERIES: gl.constexpr, QUERY_SLOTS: gl.constexpr, WIDTH: gl.constexpr, SECTIONS: gl.constexpr,
):  # fmt: skip
    """Make what tiles are multiplied with: of all, or of a window. Each of two groups of warps does a part.

    loaded: what windows are made of, or (). PENDING: copies of latents that are under way. In mixed mode the first
    window is made by `make_first_window`, which the later ones are made as here.
    """
    up_stride, rank, query_stride, scaling = numbers
    if MODE == "windows":
        frequency, own = loaded
        make_window(
            factors, beside, ready, frequency, own, bases, up, (up_stride, rank), position, more, KV, WIDTH, WHICH,
            SECTIONS,
        )  # fmt: skip
    elif MODE == "mixed":
        async_copy.wait_group(PENDING)
        if window > begin:
            # All warps have done their products with the last window.
            synchronize()
            mbarrier.arrive(ready, count=1)
            mbarrier.wait(ready, 1)
            if WHICH == 0:
                HEADS: gl.constexpr = (KV, QUERIES, QUERY_SLOTS, TOGETHER)
                own = load_slow_of(factors, beside, bases, frequencies, query, query_stride, HEADS, WIDTH)
                slow = slow_numbers(
                    own, scaling, position, QUERY_SLOTS, TOGETHER, LEAST, beside[0].shape[1], factors.dtype
                )
                source = (up, up_stride, rank)
                if sections_held(beside[1].shape[0], KV) < SECTIONS:
                    start_slow(beside[1], source, KV, WIDTH, SECTIONS)
                make_slow(factors, beside[1], window >> 30, slow, source, PENDING, KV, WIDTH, SECTIONS)
    else:
        if MODE == "folded":
            q_first, q_second = load_pairs(
                query, query_stride, scaling, KV, factors.shape[0] // SECTIONS // KV * UNIT, factors.shape[2], WIDTH,
                WHICH,
            )  # fmt: skip
        async_copy.wait_group(PENDING)
        synchronize()
        if MODE == "folded":
            for section in gl.static_range(SECTIONS):
                fold(pieces_of(factors, KV, WHICH, False, section, SECTIONS), q_first, q_second)


@gluon.jit
def score_rebuilt(
    found, scales, full, empty, ready, ring, factors, beside, arguments,
    WHICH: gl.constexpr, OF: gl.constexpr, PLAN: gl.constexpr,
):  # fmt: skip
    """Scores of every other tile of keys that are rebuilt head after head, from tile WHICH (0 or 1) on.

    found: shared memory for scores [places, tile, columns], as `places_of` takes it. factors: [KV * units of every
    section, UNIT, latents], rows of every kv head, a pair's side by side or, turned, as `place_in_factor` has them, or
    a window's columns, in mixed mode with what `make_slow` makes behind them. beside: what the mode needs besides:
    queries [KV * units, LEAST, UNIT] with the key biases and the key norm's weights where there are any, or what
    `make_window` takes, or queries [KV, SLOTS, UNIT] and what `make_slow` takes. ring: as in `copy_tile`, of every key
    group; what arguments have of each is a tuple as well. full, empty: as in `buffer_in`. OF, PLAN: as of `attend`.
    """
    (
        tiles, latents, stored, table, mask, up, query, bias, norm, units, rank, latents_t, table_t, row_mask, mask_t,
        up_stride, query_stride, scaling, epsilon, bases, basis, frequencies, position,
    ) = arguments  # fmt: skip
    MODE: gl.constexpr = PLAN.mode
    SPAN: gl.constexpr = PLAN.span
    KV: gl.constexpr = OF.kv
    QUERY_SLOTS: gl.constexpr = OF.query_slots
    WIDTH: gl.constexpr = OF.width
    DTYPE: gl.constexpr = OF.dtype
    BITS: gl.constexpr = OF.bits
    ASYMMETRIC: gl.constexpr = OF.asymmetric
    MASK: gl.constexpr = OF.mask
    SCALED: gl.constexpr = OF.scaled
    SECTIONS: gl.constexpr = OF.sections
    STAGES: gl.constexpr = ring[0][0].shape[0]
    UNITS: gl.constexpr = factors.shape[0] // SECTIONS
    GROUPS: gl.constexpr = len(ring)
    PENDING: gl.constexpr = STAGES * GROUPS
    TURNED: gl.constexpr = MODE == "rotated" or MODE == "mixed"
    SLOTS: gl.constexpr = found[0].shape[2] if TURNED else LEAST
    # An even number of tiles: each group has every other one.
    WINDOW: gl.constexpr = SPAN // TILE if SPAN > 0 else 1 << 30
    # Of windows, rows of the basis weigh products besides.
    ROWS_SPAN: gl.constexpr = SPAN if MODE == "windows" else 0
    PAIRS: gl.constexpr = (
        FAST if MODE == "windows" else (UNITS - (GROUPS if MODE == "mixed" else 0)) // KV * (UNIT // 2)
    )
    # Of a key group's heads; mixed, without the one of their slow pairs.
    OF_GROUP: gl.constexpr = UNITS // GROUPS - (1 if MODE == "mixed" else 0)
    # Numbers are made of what is stored: as `operand_of` takes it.
    HOW: gl.constexpr = (BITS, TURNED, SCALED)
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, UNIT, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SLOTS, 16])
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    first, step, begin, end, length = tiles
    loaded = ()
    if TURNED:
        # Asked for first: they are stored before anything is computed.
        own = load_beside(
            query, query_stride, beside[0].shape[0] // KV, beside[0].shape[1], KV, OF.together, OF.queries, QUERY_SLOTS,
            WIDTH, WHICH,
        )  # fmt: skip
    # Each is one group's to store.
    own_biases, own_norm = (), ()
    if MODE == "rotated":
        if len(beside[1]) > 0 and WHICH == 1:
            own_biases = (load_biases(bias, beside[1][0].shape[1], UNITS, KV, WIDTH),)
        if len(beside[2]) > 0 and WHICH == 0:
            own_norm = load_norm(norm, beside[2][0].shape[0], WIDTH)
    # Nothing is read where there is no tile.
    _start(factors, beside, up, up_stride, there_if(begin < end, rank), KV, WIDTH, MODE, WHICH, SECTIONS)
    for stage in gl.static_range(STAGES):
        for group in gl.static_range(GROUPS):
            index = begin + WHICH + 2 * stage
            copy_tile(ring[group], stage, latents[group], tiles, index, latents_t, units[group])
    nothing = gl.zeros([TILE], gl.int32, rows)
    if MODE != "windows":
        turns = _turns_of(table, basis, tiles, begin + WHICH, begin, table_t, nothing, PAIRS, ROWS_SPAN)
        parameters = load_parameters(stored, tiles, begin + WHICH, rows, BITS, ASYMMETRIC)
    if MODE == "mixed":
        shares = load_basis(basis, WHICH * TILE, UNIT // SLOTS, SLOTS)
    if MODE == "windows":
        own = load_own_queries(query, query_stride, scaling, KV, WIDTH, WHICH)
        loaded = (load_frequencies(frequencies, WIDTH), own)
        q_first, q_second = load_pairs(query, query_stride, scaling, KV, UNIT // 2, factors.shape[2], WIDTH, WHICH)
        async_copy.wait_group(PENDING)
        synchronize()
        for section in gl.static_range(SECTIONS):
            fold(pieces_of(factors, KV, WHICH, True, section, SECTIONS), q_first, q_second)
    if TURNED:
        store_beside(beside[0], own, scaling, KV, WHICH)
    numbers = (up_stride, rank, query_stride, scaling)
    biases, normed = (), ()
    if MODE == "rotated":
        biases = beside[1]
        if len(own_biases) > 0:
            store_biases(biases[0], own_biases[0])
        if len(beside[2]) > 0:
            normed = (beside[2][0], epsilon)
            store_norm(beside[2][0], own_norm)
    for window in range(begin, end, WINDOW):
        _prepare(
            factors, beside, ready, loaded, bases, frequencies, query, up, numbers,
            position + (window - begin) * TILE, window, begin, (window + WINDOW < end).to(gl.int32),
            PENDING, WHICH, MODE, KV, OF.together, OF.queries, QUERY_SLOTS, WIDTH, SECTIONS,
        )  # fmt: skip
        if MODE == "windows" or (MODE == "mixed" and window > begin):
            # Not before: there are no registers where a group makes a window.
            turns = _turns_of(table, basis, tiles, window + WHICH, window, table_t, nothing, PAIRS, ROWS_SPAN)
            parameters = load_parameters(stored, tiles, window + WHICH, rows, BITS, ASYMMETRIC)
            if MODE == "mixed":
                shares = load_basis(basis, WHICH * TILE, UNIT // SLOTS, SLOTS)
        hand_over(ready, 1 if MODE == "windows" else 0)
        for index in range(window + WHICH, gl.minimum(window + WINDOW, end), 2):
            done = (index - begin) // 2
            inside = (first + index * step) * TILE + gl.arange(0, TILE, rows)
            seen = load_seen(mask, row_mask, mask_t, inside, inside < length, MASK)
            if not TURNED:
                next_parameters = load_parameters(stored, tiles, index + 2, rows, BITS, ASYMMETRIC)
            # Asked for long before they are needed, where there are registers.
            if MODE == "windows":
                next_turns = _turns_of(table, basis, tiles, index + 2, window, table_t, nothing, PAIRS, ROWS_SPAN)
            scores = gl.zeros([TILE, SLOTS], gl.float32, narrow)
            of_scores = ()
            turn = done % STAGES
            # A zero that is not known before the loop, where else addresses of units would be computed, and spilled.
            first_unit = index >> 30 if GROUPS > 1 or OF_GROUP <= 2 else 0
            for group in gl.static_range(GROUPS):
                unit = first_unit + group * OF_GROUP
                key_latents, scale = loaded_of(
                    ring[group], turn, parameters, group, PENDING, wide, BITS, ASYMMETRIC, TURNED, SCALED
                )  # fmt: skip
                of_scores = of_scores + (scale,)
                # All have read the latents.
                synchronize()
                copy_tile(ring[group], turn, latents[group], tiles, index + 2 * STAGES, latents_t, units[group])
                if group == 0:
                    if TURNED:
                        # Not before: it waits for this tile's cosines.
                        next_parameters = load_parameters(stored, tiles, index + 2, rows, BITS, ASYMMETRIC)
                    logarithm = logarithm_of(parameters, seen, rows, BITS, ASYMMETRIC)
                    free = (buffer_in(empty, WHICH, done, False), phase_of(done, False) ^ 1)
                    places = places_of(found, WHICH)
                    words = _words_of(turns, wide)
                if TURNED:
                    scores, operand = score_turned(
                        places, free, key_latents, factors, beside[0], biases, normed, words, scores, seen, scale,
                        logarithm, narrow, unit, OF_GROUP, KV // GROUPS, OF.together, QUERY_SLOTS, WIDTH, MODE, DTYPE,
                        HOW,
                    )  # fmt: skip
                else:
                    score_weighed(
                        places, free, key_latents, factors, words, seen, scale, logarithm, unit, OF_GROUP, MODE,
                        HOW,
                    )  # fmt: skip
                if group == GROUPS - 1 and MODE != "windows":
                    after = zeros_of(next_parameters, rows, BITS, ASYMMETRIC) if TURNED else nothing
                    next_turns = _turns_of(table, basis, tiles, index + 2, window, table_t, after, PAIRS, ROWS_SPAN)
                if MODE == "mixed":
                    if group == GROUPS - 1:
                        next_shares = load_basis(basis, _row_of(index + 2, window, SPAN), UNIT // SLOTS, SLOTS)
                    if group == 0:
                        # The first window's matrices are there.
                        mbarrier.wait(beside[2], 0)
                    scores = with_slow(operand, factors, shares, scores, first_unit + UNITS - GROUPS + group)
            if MODE == "mixed":
                hand_on_slow(places, free, scores, seen, of_scores, logarithm)
                shares = next_shares
            place = place_of_scales(WHICH, done, False)
            hand_on_parameters(scales, place, parameters, seen, rows, OF.value_bits, ASYMMETRIC, OF.whole > 0)
            turns, parameters = next_turns, next_parameters
            synchronize()
            mbarrier.arrive(buffer_in(full, WHICH, done, False), count=1)
    async_copy.wait_group(0)
    # The values of the last tile take less than a launch.
    allow_launch_after()
