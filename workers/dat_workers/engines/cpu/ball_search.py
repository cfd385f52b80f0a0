"""Finds the nearest codebook entry (Eq. 3) without comparing with all of them, for codebooks of few dimensions.

Neighbouring entries form groups, each inside a ball. A latent vector r is compared with the balls' centres and then
with the entries of the nearest ball. The best of them gives a distance that the nearest entry of all cannot exceed.
Last, r is compared with the entries of all balls that come that near: a few hundredths of the codebook.

The index is that of the published formula in fp32, D = |r|² + |e|² − 2·r·e, whose rounding decides near-ties. With
c = (d + 4)·2⁻²⁴ and the exact T = |r − e|², in whatever order the terms of D are added (d + 2 roundings at most),

    |D − T|  ≤  c·(|r| + |e|)²  ≤  c·(2|r| + √T)²

which grows slower than T. So all entries at T₂ or beyond lose to one at T₁ if T₂ − T₁ > 2c·(2|r| + √T₂)². T itself
is summed from differences and at most c·T off. A ball is left out only if all of its entries lose by this bound,
and an index is accepted only if it wins by it; otherwise (one vector in forty of `tiny-f8`) the formula itself
decides, over all K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import Codebook

BALL_ENTRIES = 32
LEAST_ENTRIES = 2048  # in smaller codebooks comparing with all is as fast
MOST_DIMENSIONS = 4  # in more dimensions a ball has too many neighbours
MOST_BALLS = 64  # compared per vector, on average; with more, comparing with all is as fast
LEAST_ROWS = 32  # in a matrix product, see `_by_formula`
BLOCK_ROWS = 1024  # vectors at a time: their distances stay in a CPU's cache


def pick_search(codebook: Codebook) -> BallSearch | Codebook:
    """Returns the faster of two exact searches: a `BallSearch`, or the codebook, which compares all entries."""
    size, dim = codebook.embedding.weight.shape
    balls = size // BALL_ENTRIES
    halvable = size % BALL_ENTRIES == 0 and balls & (balls - 1) == 0  # see `group_neighbours`
    suits = size >= LEAST_ENTRIES and halvable and dim <= MOST_DIMENSIONS
    return BallSearch(codebook) if suits else codebook


class BallSearch:
    """Exact search on the CPU in `codebook`, whose vectors must not change.

    >>> BallSearch(model.quantize).nearest(z).shape  # doctest: +SKIP
    torch.Size([1, 28, 28])
    """

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        vectors = codebook.embedding.weight.detach().float()
        self.members = group_neighbours(vectors)
        self.entries = vectors[self.members]  # [balls,BALL_ENTRIES,d]
        self.centres = self.entries.mean(1)
        self.centre_norms = self.centres.square().sum(1)
        radii = (self.entries.double() - self.centres.double()[:, None]).norm(dim=2).amax(1)
        self.radii = (radii * (1 + 1e-6)).float()  # rounded up
        self.error = (vectors.shape[1] + 4) * 2.0**-24  # c

    def nearest(self, z: Tensor) -> Tensor:
        """Returns the nearest entries, int64 [N,h,w], of finite z fp32 [N,d,h,w], as `Codebook.nearest` does."""
        n, d, height, width = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, d)
        indices = torch.cat([self._nearest(rows, len(flat)) for rows in torch.split(flat, BLOCK_ROWS)])
        return indices.view(n, height, width)

    def _nearest(self, rows: Tensor, image_rows: int) -> Tensor:
        """Searches for rows [n,d] of an image with `image_rows` vectors.

        All distances are squared. Pairs [P] are the (row, ball) that may hold the row's nearest entry.
        """
        c, count = self.error, len(rows)
        norms = rows.square().sum(1)
        to_centres = torch.addmm(norms[:, None] + self.centre_norms, rows, self.centres.t(), alpha=-2.0)
        in_nearest_ball = self.entries[to_centres.argmin(1)].sub_(rows[:, None]).square_().sum(2).amin(1)
        reach = (in_nearest_ball + self._margin(norms, in_nearest_ball)).sqrt_()[:, None]
        # the distances to centres are D, too: D ≤ T + c·(8|r|² + 2T)
        limit = (reach + self.radii).square_().mul_(1 + 8 * c).add_(9 * c * norms[:, None])
        row, ball = (to_centres <= limit).nonzero().unbind(1)
        if not count <= len(row) <= MOST_BALLS * count:  # fewer than one ball per row: numbers that overflow
            return self._by_formula(rows, image_rows)
        distances = self.entries[ball].sub_(rows[row][:, None]).square_().sum(2)
        best, place = distances.topk(2, largest=False)
        first = minimum_by_row(best[:, 0], row, count)
        # The winner of a row is the pair that holds its nearest entry. The second nearest entry is either the next
        # one in that ball or the best of another ball.
        pairs = torch.arange(len(row))
        winner = minimum_by_row(torch.where(best[:, 0] == first[row], pairs, len(row) - 1), row, count)
        rest = best[:, 0].clone()
        rest[winner] = best[winner, 1]
        second = minimum_by_row(rest, row, count)
        indices = self.members[ball[winner], place[winner, 0]]
        unsure = (second - first > self._margin(norms, second)).logical_not().nonzero()[:, 0]
        if len(unsure):
            indices[unsure] = self._by_formula(rows[unsure], image_rows)
        return indices

    def _margin(self, norms: Tensor, distances: Tensor) -> Tensor:
        """Returns how much nearer than `distances` an entry must be to be nearer by the formula, too."""
        return 2.02 * self.error * ((2 * norms.sqrt() + distances.sqrt()).square_() + distances)

    def _by_formula(self, rows: Tensor, image_rows: int) -> Tensor:
        """Compares rows of an image with all entries.

        The matrix product never has fewer than LEAST_ROWS rows, unless the image has no more: MKL rounds short
        products differently, and the published quantizer takes all vectors of an image together.
        """
        missing = max(0, min(LEAST_ROWS, image_rows) - len(rows))
        padded = torch.cat([rows, rows[:1].expand(missing, -1)]) if missing else rows
        return self.codebook.nearest(padded.t()[None, :, None])[0, 0, : len(rows)]


def minimum_by_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Returns the lowest of the values [P] of each row, as [rows]; `row` [P] says to which row a value belongs.

    A row without values gets infinity, or the number of the last pair if the values are integers.
    """
    highest = torch.inf if values.is_floating_point() else len(values) - 1
    return torch.full((rows,), highest, dtype=values.dtype).scatter_reduce_(0, row, values, "amin")


def group_neighbours(vectors: Tensor) -> Tensor:
    """Divides the indices of vectors fp32 [K,d] into groups of neighbours: int64 [balls,BALL_ENTRIES].

    Every group is halved along its widest axis, again and again.
    """
    members = torch.arange(len(vectors))[None]
    while members.shape[1] > BALL_ENTRIES and members.shape[1] % (2 * BALL_ENTRIES) == 0:
        values = vectors[members]
        axis = (values.amax(1) - values.amin(1)).argmax(1)
        along = values.gather(2, axis[:, None, None].expand(-1, values.shape[1], 1))[:, :, 0]
        members = members.gather(1, along.argsort(1)).reshape(2 * len(members), -1)
    return members
