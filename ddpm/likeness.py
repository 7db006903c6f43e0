"""Which pictures are nearly the same: copies that were resized, encoded anew, made brighter, mirrored or cropped a little.

    grey [SIDE, SIDE] -> trace int8 [2, 64]; traces int8 [n, 2, 64] -> groups of their numbers

A trace is the direction of a picture's lowest frequencies, weighted so that each says about as much: of the whole picture, and
of its inner part, which is nearer to what a crop leaves. How alike two pictures are is the cosine between traces; plain ones
have shorter traces, so that they are like nothing.
"""

import math
from collections import defaultdict

import numpy as np

SIDE = 50
MARGIN = 2  # pixels that the inner part leaves on each side, 4 %
FREQUENCIES = 8  # on each axis
PLAIN = 5000.0  # length of the waves of a clear sky, whose direction is noise; those of a photograph are 20,000 to 300,000 long
# Of 408 photographs and parts of them, and 81,026 pairs of different ones: at 0.9 no pair, and of copies that were mirrored,
# halved, saved as JPEG of quality 30 or cropped by up to 5 % on each side 98 % and more; at 0.85 two pairs.
ALIKE = 0.9
TABLES = 20  # ways of sorting: of 100,000 pictures a pair at ALIKE is missed by all of them once in a hundred, at 0.95 never
GROUP = 512  # traces that are compared with each other in one of them, on average


def trace(grey):
    """The trace int8 [2, FREQUENCIES ** 2] of a grey picture [SIDE, SIDE]."""
    parts = [waves(grey), waves(grey[MARGIN:-MARGIN, MARGIN:-MARGIN])]
    return np.stack([np.round(127 * part / np.hypot(np.linalg.norm(part), PLAIN)).astype(np.int8) for part in parts])


def waves(grey):
    """The lowest cosine waves in a square picture, without its mean; photographs have less of a wave the shorter it is."""
    waves, places = np.arange(FREQUENCIES)[:, None], np.arange(len(grey)) + 0.5
    basis = np.cos(np.pi * waves * places / len(grey))
    return (basis @ grey @ basis.T * np.hypot(waves, waves.T)).ravel()


def groups(traces):
    """Groups of two or more pictures that are alike, or are both alike to a third: sorted lists of numbers.

    Each is compared with those on the same side of random planes through the origin (Charikar 2002), so n pictures cost n log n
    comparisons and not n * n.
    """
    count = len(traces)
    if not count:
        return []
    units = traces / 127
    mirrored = units * np.tile(np.where(np.arange(FREQUENCIES) % 2, -1, 1), FREQUENCIES)
    whole, inner = units[:, 0], units[:, 1]
    views = np.concatenate([whole, mirrored[:, 0], inner, mirrored[:, 1]]).astype(np.float32)
    whole, planes = views[:count], max(0, math.ceil(math.log2(len(views) / GROUP)))
    generator, parents = np.random.default_rng(0), list(range(count))
    for _ in range(TABLES if planes else 1):
        sides = views @ generator.standard_normal((FREQUENCIES**2, planes), dtype=np.float32) > 0
        keys = sides @ (1 << np.arange(planes))
        order = np.argsort(keys, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for asking in np.array_split(members[members < count], len(members) // 4096 + 1):
                alike = whole[asking] @ views[members].T >= ALIKE
                for row in np.flatnonzero(alike.sum(1) > 1):
                    for other in np.unique(members[alike[row]] % count):
                        join(parents, asking[row], other)
    found = defaultdict(list)
    for number in range(count):
        found[root(parents, number)].append(number)
    return [group for group in found.values() if len(group) > 1]


def root(parents, number):
    """The number that stands for the group of a number."""
    while parents[number] != number:
        parents[number] = number = parents[parents[number]]
    return int(number)


def join(parents, one, other):
    one, other = root(parents, one), root(parents, other)
    parents[max(one, other)] = min(one, other)
