"""Which pictures are nearly the same: copies that were resized, encoded anew, made brighter,
mirrored or cropped a little.

    grey [SIDE, SIDE] -> trace int8 [2, 64]; traces int8 [n, 2, 64] -> groups of their numbers

A trace is the direction of a picture's lowest frequencies, weighted so that each says about as
much: of the whole picture, and of its inner part, which is nearer to what a crop leaves. How alike
two pictures are is the cosine between traces; plain ones have shorter traces, so that they are like
nothing.
"""

import math
import os
from functools import partial

import numpy as np
from tqdm import tqdm

from ddpm.common import files
from ddpm.data import source


def near_duplicates(root, facts):
    """Groups of near-duplicates among images of a folder, tuples of their numbers; remembered until
    the images are others.

    What has the same bytes is compared once, and what is of one colour is like nothing.
    """
    content = source.fingerprint([(one.digest, one.signature) for one in facts], SIMILARITY)
    name = f"alike/{source.fingerprint(os.path.realpath(root))}"
    known = files.read_cached_json(name)
    if known.get("content") != content:
        same = {}
        for number, one in enumerate(facts):
            same.setdefault(one.digest, []).append(number)
        firsts = [numbers[0] for numbers in same.values() if not facts[numbers[0]].one_colour]
        near = group_similar(np.array([facts[number].signature_vectors for number in firsts]))
        joined = [
            [number for k in group for number in same[facts[firsts[k]].digest]] for group in near
        ]
        alone = {number for group in joined for number in group}
        joined += [
            numbers for numbers in same.values() if len(numbers) > 1 and numbers[0] not in alone
        ]
        known = {"content": content, "groups": sorted(sorted(group) for group in joined)}
        with files.cached_json(name) as kept:  # nobody waits for the comparing
            kept.update(known)
    return tuple(map(tuple, known["groups"]))


def split_leakage(alike, held_out):
    """How many of the held-out images have a near-duplicate that is learned from."""
    held_out = set(map(int, held_out))
    return sum(len(held) for group in alike if len(held := held_out & set(group)) < len(group))


SIDE = 50
MARGIN = 2  # pixels that the inner part leaves on each side, 4 %
FREQUENCIES = 8  # on each axis
# length of the waves of a clear sky, whose direction is noise; those of a photograph are 20,000 to
# 300,000 long
FLAT = 5000.0
# Of 408 photographs and parts of them, and 81,026 pairs of different ones: at 0.9 no pair, and of
# copies that were mirrored, halved, saved as JPEG of quality 30 or cropped by up to 5 % on each
# side 98 % and more; at 0.85 two pairs.
SIMILARITY = 0.9
# ways of sorting: of 100,000 pictures a pair at ALIKE is missed by all of them once in a hundred,
# at 0.95 never
TABLES = 20
GROUP = 512  # traces that are compared with each other in one of them, on average
ROWS = 256  # pictures that are compared with others at once
MAX_PRODUCTS = 2**24  # numbers that come of it: 64 MiB


def signature(grey):
    """The trace int8 [2, FREQUENCIES ** 2] of a grey picture [SIDE, SIDE]."""
    parts = [low_frequencies(grey), low_frequencies(grey[MARGIN:-MARGIN, MARGIN:-MARGIN])]
    return np.stack(
        [
            np.round(127 * part / np.hypot(np.linalg.norm(part), FLAT)).astype(np.int8)
            for part in parts
        ]
    )


def low_frequencies(grey):
    """The lowest cosine waves in a square picture, without its mean; photographs have less of a
    wave the shorter it is.
    """
    waves = np.arange(FREQUENCIES)[:, None]
    places = np.arange(len(grey)) + 0.5
    basis = np.cos(np.pi * waves * places / len(grey))
    return (basis @ grey @ basis.T * np.hypot(waves, waves.T)).ravel()


def group_similar(traces):
    """Groups of two or more pictures that are alike, or are both alike to a third: sorted lists of
    numbers.

    Each is compared with those on the same side of random planes through the origin (Charikar
    2002), so n pictures cost n log n comparisons and not n * n; where so many are on one side that
    this would cost more, each is compared with all. Pictures that are known to be in one group are
    not compared with each other, so thousands of a kind cost about as much as thousands of
    different ones.
    """
    count = len(traces)
    if not count:
        return []
    units = traces / 127
    mirrored = units * np.tile(np.where(np.arange(FREQUENCIES) % 2, -1, 1), FREQUENCIES)
    whole = units[:, 0]
    inner = units[:, 1]
    views = np.concatenate([whole, mirrored[:, 0], inner, mirrored[:, 1]]).astype(np.float32)
    found = Partition(count)
    with tqdm(
        total=count, desc="comparing images", leave=False, disable=None, unit=" images", delay=1
    ) as bar:
        tables = hash_tables(views, count)
        bar.total = count * len(tables)
        for table in tables:
            for members in table():
                join_similar(views, members, found, bar)
    return found.groups()


def hash_tables(views, count):
    """Functions that sort the views of so many pictures into arrays of their numbers, those that
    are to be compared.
    """
    planes = max(0, math.ceil(math.log2(len(views) / GROUP)))
    everything = [lambda: [np.arange(len(views))]]
    if not planes:
        return everything
    generator = np.random.default_rng(0)
    directions = [
        generator.standard_normal((FREQUENCIES**2, planes), dtype=np.float32) for _ in range(TABLES)
    ]
    tables = [partial(split_by_side, views, each) for each in directions]
    comparisons = sum(len(members) * np.count_nonzero(members < count) for members in tables[0]())
    return tables if TABLES * comparisons < count * len(views) else everything


def split_by_side(views, directions):
    """The numbers of views in arrays of those that lie on the same side of each plane."""
    keys = (views @ directions > 0) @ (1 << np.arange(directions.shape[1]))
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)


def join_similar(views, members, found, bar):
    """Join in the Partition `found` the pictures among `members` one of whose views is like the
    other one, as it is.

    `members` are numbers of views, rising. View k is of picture k modulo their number, and the
    first is the picture as it is.
    """
    count = len(found.labels)
    asking = members[members < count]
    while len(asking):
        others = members
        chosen = np.ones(len(asking), bool)
        if len(asking) > ROWS:
            labels, sizes = np.unique(found.labels[asking], return_counts=True)
            if sizes.max() > ROWS:  # members of one group, which look for others
                label = labels[sizes.argmax()]
                others = members[found.labels[members % count] != label]
                chosen = found.labels[asking] == label
        if len(others):
            chosen &= chosen.cumsum() <= max(1, min(ROWS, MAX_PRODUCTS // len(others)))
            rows = asking[chosen]
            alike = views[rows] @ views[others].T >= SIMILARITY
            if others is members:
                # each is like itself
                alike[np.arange(len(rows)), np.searchsorted(members, rows)] = False
            for row in np.flatnonzero(alike.any(1)):
                found.join(rows[row], others[alike[row]] % count)
        bar.update(int(chosen.sum()))
        asking = asking[~chosen]


class Partition:
    """Numbers from 0 on in disjoint groups, first each in one of its own: `labels[k]` is the
    same for those of one group.
    """

    def __init__(self, count):
        self.labels = np.arange(count)
        self.members = {}

    def join(self, number, others):
        """Make one group of those of a number and of others: the smaller ones take the label of
        the largest.
        """
        labels = np.unique(self.labels[others])
        if len(labels) > 1 or labels[0] != self.labels[number]:
            groups = {
                label: self.members.pop(label, [label])
                for label in {*labels.tolist(), int(self.labels[number])}
            }
            largest = max(groups, key=lambda label: len(groups[label]))
            together = groups.pop(largest)
            for smaller in groups.values():
                self.labels[smaller] = largest
                together += smaller
            self.members[largest] = together

    def groups(self):
        """The groups of two or more, as sorted lists, in the order of their first numbers."""
        return sorted(sorted(group) for group in self.members.values())
