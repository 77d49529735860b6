"""Triton kernels of `slimcli.life.fused`: what a plan, its shares and a drop do, in as few launches as there can be.

Shapes: N patches, C channels of the features, K times that patches leave, P prefix tokens, T = P + N, D token width.
A kernel's first program axis is the image. Work of an image that is split among the programs of its second axis goes
tile by tile: one program alone does all of it.
"""

import triton
import triton.language as tl

# `PHASE` of `plan`: everything in one program an image, or one of what must be done in turn
ALL = tl.constexpr(0)
BEGIN = tl.constexpr(1)
COST = tl.constexpr(2)
RANK = tl.constexpr(3)
HEIRS = tl.constexpr(4)
MERGE = tl.constexpr(5)
END = tl.constexpr(6)
#: above every place
NONE = tl.constexpr(2**30)
#: the highest exponent of a patch's mass, as `slimcli.life.heirs.MOST`
MOST = tl.constexpr(40.0)


@triton.jit
def _power(standard, times):
    return tl.exp(tl.minimum(tl.maximum(standard * times, -MOST), MOST))


@triton.jit
def _store_groups(f, row, inside, sums, round, N: tl.constexpr, C: tl.constexpr, CPAD: tl.constexpr):
    """Groups (rows, C) for `round`, and their features without the mean and of length 1, at places `row`."""
    c = tl.arange(0, CPAD)
    at = row[:, None] * C + c[None, :]
    there = inside[:, None] & (c < C)[None, :]
    tl.store(f + (round % 2) * (N * C) + at, sums, mask=there)
    mean = tl.sum(tl.where(there, sums, 0.0), 1) / C
    apart = tl.where(there, sums - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(apart * apart, 1) / C + 1e-12)
    tl.store(f + 2 * N * C + at, apart / deviation[:, None] * tl.rsqrt(C * 1.0), mask=there)


@triton.jit
def _begin(
    score, features, stride, f, i, inverse, importance, tile,
    N: tl.constexpr, C: tl.constexpr, CPAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Patches, most important first: their names, features and masses; and the weight of each, in raster order."""
    every = tl.arange(0, WIDE)
    values = tl.load(score + every, mask=every < N, other=0.0)
    mean = tl.sum(values, 0) / N
    apart = tl.where(every < N, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(apart * apart, 0) / N + 1e-12)
    own = tile * ROWS + tl.arange(0, ROWS)
    inside = own < N
    standard = (tl.load(score + own, mask=inside, other=0.0) - mean) * scale
    # what is not a number comes first, as torch sorts: the order names every patch once whatever it is
    key = tl.where(standard == standard, standard, float("inf"))
    rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, N, TILE):
        j = start + tl.arange(0, TILE)
        other = (tl.load(score + j, mask=j < N, other=0.0) - mean) * scale
        other = tl.where(other == other, other, float("inf"))
        before = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < own[:, None]))
        rank += tl.sum((before & (j < N)[None, :]).to(tl.int32), 1)
    tl.store(i + rank, own, mask=inside)
    tl.store(f + 3 * N * C + rank, _power(standard, inverse), mask=inside)
    c = tl.arange(0, CPAD)
    there = inside[:, None] & (c < C)[None, :]
    sums = tl.load(features + own[:, None].to(tl.int64) * stride + c[None, :], mask=there, other=0.0)
    if WEIGHTED:
        weight = _power(standard, importance)
        tl.store(f + 3 * N * C + 3 * N + own, weight, mask=inside)
        sums = sums * weight[:, None]
    _store_groups(f, rank, inside, sums, 0, N, C, CPAD)


@triton.jit
def _alike(unit, a, a_inside, b, b_inside, C: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Correlations of the groups at places `a` with those at `b`: (TILE, TILE)."""
    found = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, C, CHUNK):
        c = start + tl.arange(0, CHUNK)
        left = tl.load(unit + a[:, None] * C + c[None, :], mask=a_inside[:, None] & (c < C)[None, :], other=0.0)
        right = tl.load(unit + b[None, :] * C + c[:, None], mask=b_inside[None, :] & (c < C)[:, None], other=0.0)
        found = tl.dot(left, right, found, input_precision="ieee")
    return found


@triton.jit
def _cost(
    f, tile, n, round,
    N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """What it costs to join each group to the one before it that is cheapest; without masses, its place, reversed."""
    cost = f + 3 * N * C + 2 * N
    own = tile * TILE + tl.arange(0, TILE)
    best = -own.to(tl.float32)
    if RANKED:
        mass = f + 3 * N * C + (round % 2) * N
        root = tl.sqrt(tl.load(mass + own, mask=own < n, other=0.0))
        best = tl.full([TILE], float("inf"), tl.float32)
        for start in range(0, tl.minimum(n, (tile + 1) * TILE), TILE):
            j = start + tl.arange(0, TILE)
            both = root[:, None] * tl.sqrt(tl.load(mass + j, mask=j < n, other=0.0))[None, :]
            apart = both - both * _alike(f + 2 * N * C, own, own < n, j, j < n, C, CHUNK, TILE)
            apart = tl.where((j[None, :] < own[:, None]) & (apart == apart), apart, float("inf"))
            best = tl.minimum(best, tl.min(apart, 1))
    tl.store(cost + own, best, mask=own < n)


@triton.jit
def _rank(f, i, tile, n, N: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """The rank of each group, dearest to join first, ties in their order; and which group has each rank."""
    cost = f + 3 * N * C + 2 * N
    own = tile * TILE + tl.arange(0, TILE)
    key = tl.load(cost + own, mask=own < n, other=0.0)
    rank = tl.zeros([TILE], tl.int32)
    for start in range(0, n, TILE):
        j = start + tl.arange(0, TILE)
        other = tl.load(cost + j, mask=j < n, other=0.0)
        before = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < own[:, None]))
        rank += tl.sum((before & (j < n)[None, :]).to(tl.int32), 1)
    tl.store(i + 2 * N + own, rank, mask=own < n)
    tl.store(i + 3 * N + rank, own, mask=own < n)


@triton.jit
def _heirs(
    f, i, order, steps, K, tile, n, stay, round, last,
    N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each group that leaves, the group most like it that is still there then; the first of several."""
    names, rank, perm = i + (round % 2) * N, i + 2 * N, i + 3 * N
    place = stay + tile * TILE + tl.arange(0, TILE)
    inside = place < n
    own = tl.load(perm + place, mask=inside, other=0)
    # how many are there when it leaves
    there = tl.zeros([TILE], tl.int32) + stay
    if last:
        for k in range(K + 1):
            step = tl.load(steps + k)
            there = tl.where(step <= place, tl.maximum(there, step), there)
    best = tl.full([TILE], float("-inf"), tl.float32)
    first = tl.full([TILE], NONE, tl.int32)
    for start in range(0, n, TILE):
        j = start + tl.arange(0, TILE)
        ranks = tl.load(rank + j, mask=j < n, other=NONE)
        alike = _alike(f + 2 * N * C, own, inside, j, j < n, C, CHUNK, TILE)
        possible = ranks[None, :] < there[:, None]
        alike = tl.where(possible & (alike == alike), alike, float("-inf"))
        # the order that they will have: those that stay as they are, then those that leave later
        key = tl.where(ranks < stay, j, n + ranks)[None, :]
        most = tl.max(alike, 1)
        at = tl.min(tl.where(possible & (alike == most[:, None]), key, NONE), 1)
        closer = (most > best) | ((most == best) & (at < first))
        best, first = tl.where(closer, most, best), tl.where(closer, at, first)
    later = inside & (first >= n)
    heir = tl.where(later, tl.load(perm + first - n, mask=later, other=0), first)
    name = tl.load(names + own, mask=inside, other=0)
    tl.store(i + 4 * N + place, heir, mask=inside)
    tl.store(order + place, name.to(tl.int64), mask=inside)
    tl.store(i + 5 * N + name, place, mask=inside)
    tl.store(i + 6 * N + place, tl.load(names + heir, mask=inside, other=0), mask=inside)


@triton.jit
def _stay(i, own, n, stay, start, N: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Which groups `own` stay, and the places that they come to, in the order that they have."""
    rank = i + 2 * N
    staying = tl.load(rank + own, mask=own < n, other=NONE) < stay
    place = tl.zeros([ROWS], tl.int32)
    for begin in range(0, tl.minimum(n, start + ROWS), TILE):
        j = begin + tl.arange(0, TILE)
        stays = tl.load(rank + j, mask=j < n, other=NONE) < stay
        place += tl.sum((stays[None, :] & (j[None, :] < own[:, None])).to(tl.int32), 1)
    return staying, place


@triton.jit
def _merge(
    f, i, order, tile, n, stay, round, last,
    N: tl.constexpr, C: tl.constexpr, CPAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The groups that stay, with those that they take over, for the next round; after the last one, only where."""
    own = tile * ROWS + tl.arange(0, ROWS)
    staying, place = _stay(i, own, n, stay, tile * ROWS, N, ROWS, TILE)
    name = tl.load(i + (round % 2) * N + own, mask=staying, other=0)
    if last:
        tl.store(order + place, name.to(tl.int64), mask=staying)
        tl.store(i + 5 * N + name, place, mask=staying)
        tl.store(i + 6 * N + place, name, mask=staying)
    else:
        c = tl.arange(0, CPAD)
        groups, mass = f + (round % 2) * (N * C), f + 3 * N * C + (round % 2) * N
        sums = tl.load(groups + own[:, None] * C + c[None, :], mask=staying[:, None] & (c < C)[None, :], other=0.0)
        masses = tl.load(mass + own, mask=staying, other=0.0)
        for start in range(stay, n, 16):
            leaving = start + tl.arange(0, 16)
            goes = tl.load(i + 3 * N + leaving, mask=leaving < n, other=0)
            into = tl.load(i + 4 * N + leaving, mask=leaving < n, other=NONE)
            more = tl.load(
                groups + goes[:, None] * C + c[None, :], mask=(leaving < n)[:, None] & (c < C)[None, :], other=0.0
            )
            joins = into[None, :] == own[:, None]
            sums = tl.dot(joins.to(tl.float32), more, sums, input_precision="ieee")
            masses += tl.sum(tl.where(joins, tl.load(mass + goes, mask=leaving < n, other=0.0)[None, :], 0.0), 1)
        tl.store(i + ((round + 1) % 2) * N + place, name, mask=staying)
        tl.store(f + 3 * N * C + ((round + 1) % 2) * N + place, masses, mask=staying)
        _store_groups(f, place, staying, sums, round + 1, N, C, CPAD)


@triton.jit
def _end(f, i, order, heirs, weight, N: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Heirs by their places, and weights in the order of the places."""
    place = tl.arange(0, WIDE)
    inside = place < N
    name = tl.load(i + 6 * N + place, mask=inside, other=0)
    tl.store(heirs + place, tl.load(i + 5 * N + name, mask=inside, other=0).to(tl.int64), mask=inside)
    if WEIGHTED:
        name = tl.load(order + place, mask=inside, other=0)
        tl.store(weight + place, tl.load(f + 3 * N * C + 3 * N + name, mask=inside, other=0.0), mask=inside)


# numbers that differ from call to call: not compiled anew for each kind of them
@triton.jit(do_not_specialize=["K", "first", "end"])
def plan(
    score, features, image_stride, stride, steps, K, rounds, floats, ints, order, heirs, weight, inverse, importance,
    first, end, ROUNDS: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, CPAD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WIDE: tl.constexpr, RANKED: tl.constexpr, WEIGHTED: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """`slimcli.life.heirs.plan`: phase by phase, for the rounds `first` to `end`, which `rounds` (ROUNDS, 2) has."""
    b = tl.program_id(0).to(tl.int64)
    mine, programs = tl.program_id(1), tl.num_programs(1)
    f, i = floats + b * (3 * N * C + 4 * N), ints + b * (7 * N)
    score, order, heirs, weight = score + b * N, order + b * N, heirs + b * N, weight + b * N
    features += b * image_stride
    whole: tl.constexpr = PHASE == ALL
    if whole or PHASE == BEGIN:
        for tile in range(mine, tl.cdiv(N, ROWS), programs):
            _begin(
                score, features, stride, f, i, inverse, importance, tile, N, C, CPAD, ROWS, TILE, WIDE, WEIGHTED
            )  # fmt: skip
        tl.debug_barrier()
    for round in range(first, end):
        n, stay, last = tl.load(rounds + 2 * round), tl.load(rounds + 2 * round + 1), round == ROUNDS - 1
        if whole or PHASE == COST:
            for tile in range(mine, tl.cdiv(n, TILE), programs):
                _cost(f, tile, n, round, N, C, CHUNK, TILE, RANKED)
            tl.debug_barrier()
        if whole or PHASE == RANK:
            for tile in range(mine, tl.cdiv(n, TILE), programs):
                _rank(f, i, tile, n, N, C, TILE)
            tl.debug_barrier()
        if whole or PHASE == HEIRS:
            for tile in range(mine, tl.cdiv(n - stay, TILE), programs):
                _heirs(f, i, order, steps, K, tile, n, stay, round, last, N, C, CHUNK, TILE)
            tl.debug_barrier()
        if whole or PHASE == MERGE:
            for tile in range(mine, tl.cdiv(n, ROWS), programs):
                _merge(f, i, order, tile, n, stay, round, last, N, C, CPAD, ROWS, TILE)
            tl.debug_barrier()
    if whole or PHASE == END:
        _end(f, i, order, heirs, weight, N, C, WIDE, WEIGHTED)


@triton.jit
def _inherited(sums, heirs, tile, n, stay, P, TILE: tl.constexpr):
    """`sums` (T,) of the tokens before `stay` with those of the tokens from there to `n` that they take over."""
    own = tile * TILE + tl.arange(0, TILE)
    found = tl.load(sums + own, mask=own < stay, other=0.0)
    for start in range(stay, n, TILE):
        j = start + tl.arange(0, TILE)
        heir = tl.load(heirs + j - P, mask=j < n, other=NONE).to(tl.int32) + P
        joins = heir[None, :] == own[:, None]
        found += tl.sum(tl.where(joins, tl.load(sums + j, mask=j < n, other=0.0)[None, :], 0.0), 1)
    return found


@triton.jit(do_not_specialize=["K"])
def shares(
    heirs, weight, steps, K, P, T, scratch, share, log_size, TILE: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """`slimcli.life.heirs.shares` of one image: `share` (B, K, T) and `log_size` (B, K + 1, T), time after time."""
    b = tl.program_id(0).to(tl.int64)
    heirs, weight, share = heirs + b * (T - P), weight + b * (T - P), share + b * K * T
    log_size = log_size + b * (K + 1) * T
    # how many patches each stands for, and what these weigh: before and after a time, in turns
    size, sums = scratch + b * 4 * T, scratch + b * 4 * T + 2 * T
    for tile in range(tl.cdiv(T, TILE)):
        own = tile * TILE + tl.arange(0, TILE)
        tl.store(size + own, tl.full([TILE], 1.0, tl.float32), mask=own < T)
        tl.store(log_size + own, tl.zeros([TILE], tl.float32), mask=own < T)
        known = tl.full([TILE], 1.0, tl.float32)
        if WEIGHTED:
            known = tl.load(weight + own - P, mask=(own >= P) & (own < T), other=1.0)
        tl.store(sums + own, known, mask=own < T)
    tl.debug_barrier()
    for k in range(K):
        n, stay = tl.load(steps + k) + P, tl.load(steps + k + 1) + P
        old, new = (k % 2) * T, ((k + 1) % 2) * T
        for tile in range(tl.cdiv(T, TILE)):
            own = tile * TILE + tl.arange(0, TILE)
            patches = _inherited(size + old, heirs, tile, n, stay, P, TILE)
            tl.store(size + new + own, patches, mask=own < T)
            log = tl.where(patches > 0, tl.log(tl.maximum(patches, 1.0)), float("-inf"))
            tl.store(log_size + (k + 1) * T + own, log, mask=own < T)
            tl.store(sums + new + own, _inherited(sums + old, heirs, tile, n, stay, P, TILE), mask=own < T)
        tl.debug_barrier()
        for tile in range(tl.cdiv(T, TILE)):
            own = tile * TILE + tl.arange(0, TILE)
            leaves = (own >= stay) & (own < n)
            heir = tl.where(leaves, tl.load(heirs + own - P, mask=leaves, other=0).to(tl.int32) + P, own)
            part = tl.load(sums + old + own, mask=own < n, other=0.0)
            whole = tl.load(sums + new + heir, mask=own < n, other=1.0)
            tl.store(share + k * T + own, (part / whole).to(share.dtype.element_ty), mask=own < T)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "stay", "share_stride", "N"])
def take_over(
    tokens, image_stride, stride, heirs, share, share_stride, out, n, stay, P, N, D,
    WIDTH: tl.constexpr, LEAVING: tl.constexpr,
):  # fmt: skip
    """`slimcli.life.heirs.take_over`: one token that stays, and a part of its channels, in each program."""
    b, own = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens, heirs, share = tokens + b * image_stride, heirs + b * N, share + b * share_stride
    c = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    found = tl.load(tokens + own * stride + c, mask=c < D, other=0.0).to(tl.float32)
    found = found * tl.load(share + own).to(tl.float32)
    for start in range(stay, n, LEAVING):
        j = start + tl.arange(0, LEAVING)
        joins = (tl.load(heirs + j - P, mask=j < n, other=NONE) + P == own) & (j < n)
        if tl.max(joins.to(tl.int32), 0) > 0:
            there = joins[:, None] & (c < D)[None, :]
            more = tl.load(tokens + j[:, None] * stride + c[None, :], mask=there, other=0.0).to(tl.float32)
            part = tl.load(share + j, mask=joins, other=0.0).to(tl.float32)
            found += tl.sum(more * part[:, None], 0)
    tl.store(out + (b * stay + own) * D + c, found.to(out.dtype.element_ty), mask=c < D)
