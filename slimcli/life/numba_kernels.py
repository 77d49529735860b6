"""Numba kernels of `slimcli.life.on_processor`: a plan, its shares and a drop, compiled for the processor at hand.

Shapes: B images, N patches, n groups of them, K times that patches leave, P prefix tokens, T = P + N, D token width.
Each runs the images `begin` to `end` on one thread, without Python's lock. Signatures are given, so that arrays that
are laid out otherwise are no reason to compile once more.
"""

import math

import numba
import numpy as np
from numba import float32, float64, int64, uint16, void

#: the highest exponent of a patch's mass, as `slimcli.life.heirs.MOST`
MOST = 40.0
#: added to the variance of scores and of features, as `normalise_life` and `slimcli.life.heirs.LEAST_VARIANCE` have it
LEAST = 1e-12

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
# sums may be reordered, so that they fill the processor's registers; what is not a number stays what it is
_REORDERED = {"reassoc", "nsz", "contract"}
_inner = numba.njit(**_OPTIONS, fastmath=_REORDERED)
# of two numbers the lower: not so exact about what is none, or it would be taken one by one
_minimum = numba.njit(**_OPTIONS, fastmath=_REORDERED | {"nnan"})


def _kernel(signature):
    return numba.njit([signature], **_OPTIONS, fastmath=_REORDERED)


@_inner
def _power(standard, times):
    return np.float32(math.exp(min(max(times * standard, -MOST), MOST)))


@_inner
def _rank(key, n, rank):
    """How many of the n keys come before each: those that are lower, and those as low that stand before it."""
    for i in range(n):
        own, before = key[i], 0
        for j in range(n):
            before += key[j] < own
        for j in range(i):
            before += key[j] == own
        rank[i] = before


@_minimum
def _cheapest(root, inverse, row, own, end):
    """The least of root[j] (1 - r) over the j before `end`, r being row[j], times what makes lengths 1."""
    least = np.float32(np.inf)
    for j in range(end):
        least = min(least, root[j] - root[j] * inverse[j] * own * row[j])
    return least


@_inner
def _leave(alike, mass, inverse, n, stay, order):
    """`order`: the groups that stay as they are, then the others, the dearest to join first."""
    root, key, rank = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int64)
    for i in range(n):
        root[i] = math.sqrt(mass[i])
    for i in range(n):
        cost = root[i] * _cheapest(root, inverse, alike[i], inverse[i], i)
        # what is not a number is dearest, as torch sorts
        key[i] = -cost if cost == cost else -np.float32(np.inf)
    _rank(key, n, rank)
    staying = 0
    for i in range(n):
        if rank[i] < stay:
            order[staying] = i
            staying += 1
        else:
            order[rank[i]] = i


@_inner
def _most_like(alike, inverse, order, steps, n, stay, heirs):
    """`heirs`: of each that leaves, by its place, the first place of those most like it that are there then."""
    for place in range(stay, n):
        there = stay
        for k in range(steps.shape[0]):
            if there < steps[k] <= place:
                there = steps[k]
        row = alike[order[place]]
        best, most = 0, -np.float32(np.inf)
        for other in range(there):
            value = row[order[other]] * inverse[order[other]]
            if value > most:
                best, most = other, value
        heirs[place] = best


@_inner
def _joined(alike, mass, order, heirs, n, stay):
    """Products (`stay`, `stay`) and masses of the groups that stay, with those that each takes over."""
    for place in range(stay, n):
        own, more = alike[order[heirs[place]]], alike[order[place]]
        for j in range(n):
            own[j] += more[j]
        mass[order[heirs[place]]] += mass[order[place]]
    found, left = np.empty((stay, stay), np.float32), np.empty(stay, np.float32)
    for i in range(stay):
        row = alike[order[i]]
        for place in range(stay, n):
            row[order[heirs[place]]] += row[order[place]]
        for j in range(stay):
            found[i, j] = row[order[j]]
        left[i] = mass[order[i]]
    return found, left


@_inner
def _first(products, score, key, names, weighs, mass, importance, inverse_redundancy):
    """`names` of patches, the most important first, their `mass` and what each `weighs`, and their products."""
    n = score.shape[0]
    mean, square = np.float32(0), np.float32(0)
    for i in range(n):
        mean += score[i]
    mean /= n
    for i in range(n):
        square += (score[i] - mean) ** 2
    scale = np.float32(1 / math.sqrt(square / n + LEAST))
    for i in range(n):
        standard = (score[i] - mean) * scale
        weighs[i] = _power(standard, importance)
        key[i] = -standard if standard == standard else -np.float32(np.inf)
    rank = np.empty(n, np.int64)
    _rank(key, n, rank)
    for i in range(n):
        names[rank[i]] = i
        mass[rank[i]] = _power((score[i] - mean) * scale, inverse_redundancy)
    alike = np.empty((n, n), np.float32)
    for i in range(n):
        row, own = products[names[i]], weighs[names[i]]
        for j in range(n):
            alike[i, j] = row[names[j]] * (own * weighs[names[j]])
    return alike


@_kernel(
    void(
        float32[:, :, ::1], float32[:, ::1], int64[::1], int64[:, ::1], int64, float64, float64, int64[:, ::1],
        int64[:, ::1], float32[:, ::1], int64, int64,
    )
)  # fmt: skip
def plan(products, score, steps, rounds, channels, inverse_redundancy, importance, order, heirs, weight, begin, end):
    """`slimcli.life.heirs.plan`, from `products` (B, N, N) of features without their means, `channels` of them.

    `rounds` (R, 2) has the counts that each round starts from and comes to; `weight` is (B, 0) where all weigh alike.
    The products of groups are sums of those of their patches.
    """
    patches = score.shape[1]
    key, weighs, inverse = np.empty(patches, np.float32), np.empty(patches, np.float32), np.empty(patches, np.float32)
    names, renamed, places = np.empty(patches, np.int64), np.empty(patches, np.int64), np.empty(patches, np.int64)
    to, heir_names = np.empty(patches, np.int64), np.empty(patches, np.int64)
    for b in range(begin, end):
        mass = np.empty(patches, np.float32)
        alike = _first(products[b], score[b], key, names, weighs, mass, importance, inverse_redundancy)
        for r in range(rounds.shape[0]):
            n, stay, last = rounds[r, 0], rounds[r, 1], r == rounds.shape[0] - 1
            for i in range(n):
                inverse[i] = 1 / math.sqrt(alike[i, i] + channels * LEAST)
                places[i] = i
            if inverse_redundancy > 0:
                _leave(alike, mass, inverse, n, stay, places)
            _most_like(alike, inverse, places, steps if last else rounds[r], n, stay, to)
            for place in range(n):
                renamed[place] = names[places[place]]
            for place in range(n):
                names[place] = renamed[place]
            for place in range(stay, n):
                order[b, place] = names[place]
                heir_names[place] = names[to[place]]
            if last:
                for place in range(stay):
                    order[b, place] = heir_names[place] = names[place]
            else:
                alike, mass = _joined(alike, mass, places, to, n, stay)
        for place in range(patches):
            places[order[b, place]] = place
        for place in range(patches):
            heirs[b, place] = places[heir_names[place]]
        for place in range(weight.shape[1]):
            weight[b, place] = weighs[order[b, place]]


@_kernel(void(int64[:, ::1], float32[:, ::1], int64[::1], int64, float32[:, :, ::1], float32[:, :, ::1], int64, int64))
def shares(heirs, weight, steps, prefix, share, log_size, begin, end):
    """`slimcli.life.heirs.shares`: `share` (B, K, T) and `log_size` (B, K + 1, T), time after time."""
    times, tokens = share.shape[1], share.shape[2]
    size, mass = np.empty(tokens, np.float32), np.empty(tokens, np.float32)
    for b in range(begin, end):
        for j in range(tokens):
            size[j] = mass[j] = 1
            log_size[b, 0, j] = 0
        for j in range(weight.shape[1]):
            mass[prefix + j] = weight[b, j]
        for k in range(times):
            n, stay = prefix + steps[k], prefix + steps[k + 1]
            for j in range(n):
                share[b, k, j] = mass[j]
            for j in range(stay, n):
                heir = prefix + heirs[b, j - prefix]
                size[heir] += size[j]
                mass[heir] += mass[j]
            for j in range(n):
                share[b, k, j] /= mass[j] if j < stay else mass[prefix + heirs[b, j - prefix]]
            for j in range(tokens):
                log_size[b, k + 1, j] = math.log(size[j]) if j < stay else -np.inf


@_inner
def _joiners(heirs, prefix, n, stay, first, after):
    """Those that each of `stay` tokens takes over, as a chain: its `first`, and the one `after` each; -1: none."""
    for i in range(stay):
        first[i] = -1
    for j in range(n - 1, stay - 1, -1):
        heir = prefix + heirs[j - prefix]
        after[j] = first[heir]
        first[heir] = j


@_kernel(void(float32[::1], int64, int64, int64[:, ::1], float32[:, :], int64, int64, float32[:, :, ::1], int64, int64))
def take_over(tokens, image, row, heirs, share, prefix, n, out, begin, end):
    """`slimcli.life.heirs.take_over`: `out` (B, stay, D) of B times n tokens, one every `row` numbers, images `image`
    numbers apart.
    """
    stay, width = out.shape[1], out.shape[2]
    first, after = np.empty(stay, np.int64), np.empty(n, np.int64)
    for b in range(begin, end):
        _joiners(heirs[b], prefix, n, stay, first, after)
        for i in range(stay):
            at, part, sums = b * image + i * row, share[b, i], out[b, i]
            own = tokens[at : at + width]
            for c in range(width):
                sums[c] = part * own[c]
            j = first[i]
            while j >= 0:
                at, part = b * image + j * row, share[b, j]
                more = tokens[at : at + width]
                for c in range(width):
                    sums[c] += part * more[c]
                j = after[j]


@_kernel(void(uint16[::1], int64, int64, int64[:, ::1], float32[:, :], int64, int64, uint16[:, :, ::1], int64, int64))
def take_over_in_bfloat16(tokens, image, row, heirs, share, prefix, n, out, begin, end):
    """As `take_over`, of bfloat16, which are the upper halves of float32; sums are rounded once, ties to even."""
    stay, width = out.shape[1], out.shape[2]
    first, after = np.empty(stay, np.int64), np.empty(n, np.int64)
    bits, more_bits = np.empty(width, np.uint32), np.empty(width, np.uint32)
    sums, more = bits.view(np.float32), more_bits.view(np.float32)
    half, most = np.uint32(16), np.uint32(0x7FFF)
    for b in range(begin, end):
        _joiners(heirs[b], prefix, n, stay, first, after)
        for i in range(stay):
            at, part, rounded = b * image + i * row, share[b, i], out[b, i]
            own = tokens[at : at + width]
            for c in range(width):
                bits[c] = np.uint32(own[c]) << half
            for c in range(width):
                sums[c] *= part
            j = first[i]
            while j >= 0:
                at, part = b * image + j * row, share[b, j]
                own = tokens[at : at + width]
                for c in range(width):
                    more_bits[c] = np.uint32(own[c]) << half
                for c in range(width):
                    sums[c] += part * more[c]
                j = after[j]
            for c in range(width):
                odd = (bits[c] >> half) & np.uint32(1)
                rounded[c] = np.uint16((bits[c] + most + odd) >> half)
