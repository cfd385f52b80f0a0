"""The exact nearest codebook entry without looking at all of them (Eq. 3), for codebooks of few dimensions.

Neighbouring entries form groups, each inside a ball. A latent vector r is compared with the balls' centres, then
with the entries of the nearest one, whose best is a distance that the nearest entry of all cannot exceed, and last
with the entries of all balls that come that near: a few hundredths of the codebook.

The index is that of the published formula in fp32, D = |r|² + |e|² − 2·r·e, whose rounding decides near-ties. With
c = (d + 4)·2⁻²⁴ and T = |r − e|² in truth, in whatever order the terms of D are added (d + 2 roundings at most),

    |D − T|  ≤  c·(|r| + |e|)²  ≤  c·(2|r| + √T)²

which grows slower than T. So all entries from T₂ on lose to one at T₁ if T₂ − T₁ > 2c·(2|r| + √T₂)². T itself is
summed from differences, at most c·T off. A ball is left out only where all in it lose so, and an index is taken
only where it wins so; elsewhere (one vector in forty of `tiny-f8`) the formula itself is asked, over all K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import Codebook

GROUP = 32  # entries in a ball
LEAST_ENTRIES = 2048  # below, comparing with all is as fast
MOST_DIMENSIONS = 4  # above, a ball has too many neighbours
MOST_BALLS = 64  # looked into for a vector, on average; above, comparing with all is as fast
LEAST_ROWS = 32  # in a product, see `_by_formula`
ROWS = 1024  # vectors at a time: what is compared stays in a CPU's cache


class GroupSearch:
    """Exact search on the CPU in `codebook`, whose vectors must not change.

    >>> GroupSearch(model.quantize).nearest(z).shape  # doctest: +SKIP
    torch.Size([1, 28, 28])
    """

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        vectors = codebook.embedding.weight.detach().float()
        self.members = grouped(vectors)
        self.entries = vectors[self.members]  # [G,GROUP,d]
        self.centres = self.entries.mean(1)
        self.centre_norms = self.centres.square().sum(1)
        radii = (self.entries.double() - self.centres.double()[:, None]).norm(dim=2).amax(1)
        self.radii = (radii * (1 + 1e-6)).float()  # rounded up
        self.error = (vectors.shape[1] + 4) * 2.0**-24  # c

    @staticmethod
    def suits(codebook: Codebook) -> bool:
        """Whether such a codebook is searched faster so."""
        size, dim = codebook.embedding.weight.shape
        balls = size // GROUP
        whole = size % GROUP == 0 and balls & (balls - 1) == 0  # halved again and again, see `grouped`
        return bool(size >= LEAST_ENTRIES and whole and dim <= MOST_DIMENSIONS)

    def nearest(self, z: Tensor) -> Tensor:
        """As `Codebook.nearest`: finite z fp32 [N,d,h,w] to int64 [N,h,w]."""
        n, d, height, width = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, d)
        indices = torch.cat([self._nearest(rows, len(flat)) for rows in torch.split(flat, ROWS)])
        return indices.view(n, height, width)

    def _nearest(self, rows: Tensor, whole: int) -> Tensor:
        c, count = self.error, len(rows)
        norms = rows.square().sum(1)
        to_centres = torch.addmm(norms[:, None] + self.centre_norms, rows, self.centres.t(), alpha=-2.0)
        own = self.entries[to_centres.argmin(1)].sub_(rows[:, None]).square_().sum(2).amin(1)
        reach = (own + self._margin(norms, own)).sqrt_()[:, None]
        # the centres' distances are D too: D ≤ T + c·(8|r|² + 2T)
        limit = (reach + self.radii).square_().mul_(1 + 8 * c).add_(9 * c * norms[:, None])
        row, ball = (to_centres <= limit).nonzero().unbind(1)
        if not count <= len(row) <= MOST_BALLS * count:  # below: numbers that overflow
            return self._by_formula(rows, whole)
        distances = self.entries[ball].sub_(rows[row][:, None]).square_().sum(2)
        best, place = distances.topk(2, largest=False)
        first = lowest(best[:, 0], row, count)
        # of each vector the ball that holds its first; the second is the next in that ball, or another's best
        pairs = torch.arange(len(row))
        winner = lowest(torch.where(best[:, 0] == first[row], pairs, len(row) - 1), row, count)
        rest = best[:, 0].clone()
        rest[winner] = best[winner, 1]
        second = lowest(rest, row, count)
        indices = self.members[ball[winner], place[winner, 0]]
        unsure = (second - first > self._margin(norms, second)).logical_not().nonzero()[:, 0]
        if len(unsure):
            indices[unsure] = self._by_formula(rows[unsure], whole)
        return indices

    def _margin(self, norms: Tensor, distances: Tensor) -> Tensor:
        """By how much an entry must be nearer than one at `distances` (squared) to be nearer by the formula too."""
        return 2.02 * self.error * ((2 * norms.sqrt() + distances.sqrt()).square_() + distances)

    def _by_formula(self, rows: Tensor, whole: int) -> Tensor:
        """Rows of a picture of `whole` vectors. Never a product of fewer than LEAST_ROWS, unless the picture has no
        more: MKL rounds those otherwise, and the published quantizer takes the picture's vectors together."""
        missing = max(0, min(LEAST_ROWS, whole) - len(rows))
        padded = torch.cat([rows, rows[:1].expand(missing, -1)]) if missing else rows
        return self.codebook.nearest(padded.t()[None, :, None])[0, 0, : len(rows)]


def lowest(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """The lowest of the values [P] of each row [P], as [rows]; the largest there is for a row without any."""
    top = torch.inf if values.is_floating_point() else len(values) - 1
    return torch.full((rows,), top, dtype=values.dtype).scatter_reduce_(0, row, values, "amin")


def grouped(vectors: Tensor) -> Tensor:
    """int64 [G,GROUP]: all indices of fp32 [K,d], neighbours together, by halving along the widest axis."""
    members = torch.arange(len(vectors))[None]
    while members.shape[1] > GROUP and members.shape[1] % (2 * GROUP) == 0:
        values = vectors[members]
        axis = (values.amax(1) - values.amin(1)).argmax(1)
        along = values.gather(2, axis[:, None, None].expand(-1, values.shape[1], 1))[:, :, 0]
        members = members.gather(1, along.argsort(1)).reshape(2 * len(members), -1)
    return members
