"""Near-duplicates: copies that were resized, compressed again, brightened, mirrored or cropped.

    grey [SIDE, SIDE] -> signature int8 [2, 64]; signatures int8 [n, 2, 64] -> groups of indices

A signature is the direction of an image's lowest frequencies, weighted so that each counts about
the same: of the whole image, and of its inner part, which is closer to what a crop leaves. The
similarity of two images is the cosine between signatures; flat images have shorter signatures, so
they are similar to none.
"""

import math
import os
from functools import partial

import numpy as np
from tqdm import tqdm

from ddpm.common import files
from ddpm.data import source

SIDE = 50
MARGIN = 2  # pixels that the inner part leaves out on each side, 4 %
FREQUENCIES = 8  # on each axis
# length of the frequencies of a clear sky, whose direction is noise; photographs have 20,000 to
# 300,000
FLAT = 5000.0
# In 408 photographs and parts of them, with 81,026 pairs of different ones: at 0.9 no pair, and of
# copies that were mirrored, halved, saved as JPEG of quality 30 or cropped by up to 5 % on each
# side at least 98 %; at 0.85 two pairs.
SIMILARITY = 0.9
# hash tables: of 100,000 images, all of them miss a pair at SIMILARITY once in a hundred, at 0.95
# never
TABLES = 20
BUCKET = 512  # signatures in a bucket of a table, on average
ROWS = 256  # images that are compared with others at once
MAX_PRODUCTS = 2**24  # similarities held at once: 64 MiB


def near_duplicates(root, infos):
    """Groups of near-duplicates, tuples of indices of `infos`, cached until the images change.

    Files with the same bytes are compared once; images of one colour are similar only to those.
    """
    content = source.fingerprint([(info.digest, info.signature) for info in infos], SIMILARITY)
    cache_name = f"alike/{source.fingerprint(os.path.realpath(root))}"
    cached = files.read_cached_json(cache_name)
    if cached.get("content") != content:
        copies = {}
        for index, info in enumerate(infos):
            copies.setdefault(info.digest, []).append(index)
        firsts = [same[0] for same in copies.values() if not infos[same[0]].one_colour]
        groups = []
        for similar in group_similar(np.array([infos[k].signature_vectors for k in firsts])):
            digests = [infos[firsts[k]].digest for k in similar]
            groups.append(sorted(sum((copies.pop(digest) for digest in digests), [])))
        groups += [same for same in copies.values() if len(same) > 1]
        cached = {"content": content, "groups": sorted(groups)}
        with files.cached_json(cache_name) as entry:  # no process waits for the comparison
            entry.update(cached)
    return tuple(map(tuple, cached["groups"]))


def split_leakage(groups, held_out):
    """How many held-out images have a near-duplicate among the training images."""
    held_out = set(map(int, held_out))
    shared = [(held_out & set(group), group) for group in groups]
    return sum(len(held) for held, group in shared if len(held) < len(group))


def signature(grey):
    """The signature int8 [2, FREQUENCIES ** 2] of a grey image [SIDE, SIDE]."""
    vectors = [low_frequencies(grey), low_frequencies(grey[MARGIN:-MARGIN, MARGIN:-MARGIN])]
    scaled = [127 * vector / np.hypot(np.linalg.norm(vector), FLAT) for vector in vectors]
    return np.round(np.stack(scaled)).astype(np.int8)


def low_frequencies(grey):
    """The lowest cosine frequencies [n ** 2] of a square image, each times its frequency."""
    frequencies = np.arange(FREQUENCIES)[:, None]
    places = np.arange(len(grey)) + 0.5
    basis = np.cos(np.pi * frequencies * places / len(grey))
    return (basis @ grey @ basis.T * np.hypot(frequencies, frequencies.T)).ravel()


def group_similar(signatures):
    """Groups of two or more similar images, as sorted lists of indices; similarity is transitive.

    Each image is compared with those on the same side of random planes through the origin (Charikar
    2002), so n images take n log n comparisons instead of n * n; where one side holds so many that
    this costs more, each is compared with all. Images of one group are not compared with each
    other, so thousands of copies cost about as much as thousands of different images.
    """
    count = len(signatures)
    if not count:
        return []
    units = signatures / 127
    mirrored = units * np.tile(np.where(np.arange(FREQUENCIES) % 2, -1, 1), FREQUENCIES)
    views = [units[:, 0], mirrored[:, 0], units[:, 1], mirrored[:, 1]]
    views = np.concatenate(views).astype(np.float32)
    partition = Partition(count)
    tables = hash_tables(views, count)
    with tqdm(
        total=count * len(tables),
        desc="comparing images",
        leave=False,
        disable=None,
        unit=" images",
        delay=1,
    ) as bar:
        for table in tables:
            for members in table():
                join_similar(views, members, partition, bar)
    return partition.groups()


def hash_tables(views, count):
    """Functions that return buckets of the views, arrays of indices, to be compared inside."""
    planes = max(0, math.ceil(math.log2(len(views) / BUCKET)))
    all_in_one = [lambda: [np.arange(len(views))]]
    if not planes:
        return all_in_one
    generator = np.random.default_rng(0)
    shape = FREQUENCIES**2, planes
    directions = [generator.standard_normal(shape, dtype=np.float32) for _ in range(TABLES)]
    tables = [partial(split_by_side, views, normals) for normals in directions]
    comparisons = sum(len(members) * np.count_nonzero(members < count) for members in tables[0]())
    return tables if TABLES * comparisons < count * len(views) else all_in_one


def split_by_side(views, normals):
    """Arrays of the indices of views that lie on the same side of each plane."""
    keys = (views @ normals > 0) @ (1 << np.arange(normals.shape[1]))
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)


def join_similar(views, members, partition, bar):
    """Join images of a bucket in a Partition if a view of one is similar to the other's first.

    `members` are rising indices of views; the first view of image k is k, its next k + count, ...
    """
    count = len(partition.labels)
    pending = members[members < count]
    while len(pending):
        others = members
        chosen = np.ones(len(pending), bool)
        if len(pending) > ROWS:
            labels, sizes = np.unique(partition.labels[pending], return_counts=True)
            if sizes.max() > ROWS:  # of one group, which only looks for images outside it
                label = labels[sizes.argmax()]
                others = members[partition.labels[members % count] != label]
                chosen = partition.labels[pending] == label
        if len(others):
            chosen &= chosen.cumsum() <= max(1, min(ROWS, MAX_PRODUCTS // len(others)))
            rows = pending[chosen]
            similar = views[rows] @ views[others].T >= SIMILARITY
            if others is members:  # each is similar to itself
                similar[np.arange(len(rows)), np.searchsorted(members, rows)] = False
            for row in np.flatnonzero(similar.any(1)):
                partition.join(rows[row], others[similar[row]] % count)
        bar.update(int(chosen.sum()))
        pending = pending[~chosen]


class Partition:
    """The numbers 0 to count - 1 in groups, at first of one: `labels[k]` is the group of k."""

    def __init__(self, count):
        self.labels = np.arange(count)
        self.members = {}

    def join(self, number, others):
        """Unite the groups of a number and of others; smaller groups take the largest's label."""
        labels = {*np.unique(self.labels[others]).tolist(), int(self.labels[number])}
        if len(labels) == 1:
            return
        groups = {label: self.members.pop(label, [label]) for label in labels}
        largest = max(groups, key=lambda label: len(groups[label]))
        united = groups.pop(largest)
        for smaller in groups.values():
            self.labels[smaller] = largest
            united += smaller
        self.members[largest] = united

    def groups(self):
        """The groups of two or more, as sorted lists, in the order of their first numbers."""
        return sorted(sorted(group) for group in self.members.values())
