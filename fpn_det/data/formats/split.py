"""Dividing a data set so that each part has its share of every class.

Iterative stratification (Sechidis, Tsoumakas, Vlahavas: "On the Stratification of Multi-label Data", 2011): the class
of which the fewest images are left decides next where these go. Counted are boxes, not images, and a box goes where
the share is filled least by the rule of Sainte-Laguë, which favours neither large parts nor small ones.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

IMAGES = "images"
"""Counted like a class; those are integers."""

Counts = Counter[int | str]


def assign(groups: Mapping[str, Counts], fractions: Sequence[float], *, seed: int) -> dict[str, int]:
    """Say which part each group of images goes to.

    The result depends on the names and contents of the groups and on the seed, not on their order.

    Args:
        groups: by name, how many boxes of each class it has, and its `IMAGES`.
        fractions: the shares of the parts, positive, of sum 1.
        seed: another seed, another division.

    Returns:
        The index of a part for each group. Where every group is one image, the parts have the numbers of images that
        the fractions say, rounded.
    """
    names = sorted(groups, key=lambda name: (_draw(seed, name), name))
    totals: Counts = Counter()
    members: dict[int | str, list[str]] = {}  # class -> groups
    for name in names:
        totals.update(groups[name])
        for key, count in groups[name].items():
            if count:
                members.setdefault(key, []).append(name)
    num_left = {key: len(found) for key, found in members.items()}
    capacity = _apportion(totals[IMAGES], fractions)
    filled: list[Counts] = [Counter() for _ in fractions]
    assigned: dict[str, int] = {}

    def fill(part: int, key: int | str, count: int) -> float:
        """How full the share of a class would be, with half of what is to come (Sainte-Laguë)."""
        return (filled[part][key] + count / 2) / (fractions[part] * totals[key])

    while num_left:
        rarest = min(num_left, key=lambda key: (num_left[key], key == IMAGES, totals[key], str(key)))
        for name in sorted(members[rarest], key=lambda name: -groups[name][rarest]):
            if name in assigned:
                continue
            counts = groups[name]
            everywhere = range(len(fractions))
            with_room = [part for part in everywhere if filled[part][IMAGES] + counts[IMAGES] <= capacity[part]]
            order = (rarest, IMAGES) if with_room else (IMAGES,)
            fills = {part: [fill(part, key, counts[key]) for key in order] for part in with_room or everywhere}
            part = assigned[name] = min(fills, key=fills.__getitem__)
            filled[part].update(counts)
            for key, count in counts.items():
                if count:
                    num_left[key] -= 1
        del num_left[rarest]
    return assigned


def _draw(seed: int, name: str) -> bytes:
    """A random value of this name."""
    return hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _apportion(total: int, fractions: Sequence[float]) -> list[int]:
    """Integers of this sum, as near to the fractions as can be (largest remainders)."""
    shares = [total * fraction for fraction in fractions]
    counts = [math.floor(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
