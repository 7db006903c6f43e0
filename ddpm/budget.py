"""How a training is evaluated within a budget: drawn how, of how many images, how often.

The choice hangs on operations alone, never on speed, so that a run that goes on, and one elsewhere, choose the same.
"""

from typing import NamedTuple

COUNTS = (1000, 2000, 5000, 10_000, 20_000, 50_000)  # images: few numbers, so that runs that cost nearly the same compare
COMPARED = 10_000  # images that a distance should rest on before it is drawn at leisure
FAST = ("dpmpp", 20, "karras")  # as good as 24 steps of any sampler without fresh noise: experiments/solvers
CURVE = 5  # evaluations that make a curve
MOST = 20  # more show nothing new


class Way(NamedTuple):
    """How images are drawn, and the operations that one takes, drawn and looked at."""

    sampler: str
    steps: int
    cost: float
    spacing: str = "auto"


def portion(share, of=""):
    """A share in words: `"4.9%"`, with what follows a percentage as in `"4.9% of"`, and above one `"12 times"`."""
    return f"{share:.1%}{of}" if share <= 1 else f"{share:,.0f} times" if share >= 10 else f"{share:.2g} times"


def choose(room, ways, each=0.0, count=0, times=0):
    """(way, count, times): evaluations that together take no more than `room` operations; `times` 0 where not one fits.

    An evaluation takes `each` operations beside its images. Of `ways`, the best first, it takes one by which five evaluations
    of 10,000 images fit, else the last and fastest; of COUNTS the most images that leave five evaluations, else the fewest; and
    then as many evaluations as fit, up to twenty. A `count` or `times` that is given stays, whatever it costs, and takes the
    place of those 10,000 or five.
    """
    enough = times or CURVE

    def fit(way, count):
        cost = each + count * way.cost
        return int(room // cost) if cost else MOST

    way = next((way for way in ways if fit(way, count or COMPARED) >= enough), ways[-1])
    count = count or max((some for some in COUNTS if fit(way, some) >= enough), default=COUNTS[0])
    return way, count, times or min(fit(way, count), MOST)
