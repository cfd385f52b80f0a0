"""Finds the nearest codebook entry (Eq. 3) without comparing all entries, for codebooks of few dimensions.

Neighbouring entries form groups, and each group lies inside a ball. A latent vector r is compared first with the
centres of the balls, and then with the entries of the nearest ball. The smallest of these distances is an upper
bound for the distance to the nearest entry of the codebook. Finally r is compared with the entries of every ball
that reaches within this bound, which are a few hundredths of the codebook.

The returned index is that of the published formula in fp32, D = |r|² + |e|² − 2·r·e, whose rounding decides
near-ties. Let c = (d + 4)·2⁻²⁴, and let T = |r − e|² be the exact squared distance. In whatever order the terms of
D are added (d + 2 roundings at most),

    |D − T|  ≤  c·(|r| + |e|)²  ≤  c·(2|r| + √T)²

and this bound grows more slowly than T. Therefore an entry at T₂ or beyond is farther than an entry at T₁ by the
formula, too, if T₂ − T₁ > 2c·(2|r| + √T₂)². The computed T is summed from differences, with an error of at most
c·T. A ball is skipped only if the inequality excludes all of its entries, and an index is accepted only if the
inequality excludes the second nearest entry. Otherwise (for one vector in forty of `tiny-f8`) the formula is
computed for all K entries: in fp32, to round as published, or in fp64, to round as little as possible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import Codebook

BALL_ENTRIES = 32
LEAST_ENTRIES = 2048  # in smaller codebooks comparing all entries is as fast
MOST_DIMENSIONS = 4  # in more dimensions a ball has too many neighbours
MOST_BALLS = 64  # average number of balls per vector; above it comparing all entries is as fast
LEAST_ROWS = 32  # fewest rows of a matrix product, see `_by_formula`
BLOCK_ROWS = 1024  # number of vectors searched at a time, so that their distances stay in a CPU's cache


def pick_search(codebook: Codebook) -> BallSearch | Codebook:
    """Returns the faster of two exact searches: a `BallSearch`, or the codebook, which compares all its entries."""
    size, dim = codebook.embedding.weight.shape
    balls = size // BALL_ENTRIES
    halvable = size % BALL_ENTRIES == 0 and balls & (balls - 1) == 0  # see `group_neighbours`
    suits = size >= LEAST_ENTRIES and halvable and dim <= MOST_DIMENSIONS
    return BallSearch(codebook) if suits else codebook


class BallSearch:
    """Searches `codebook` exactly on the CPU; the codebook's vectors must not change afterwards.

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

    def nearest(self, z: Tensor, *, exact: bool = False) -> Tensor:
        """Returns the nearest entries, int64 [N,h,w], of finite z fp32 [N,d,h,w], as `Codebook.nearest` does.

        `exact` means that near-ties are decided in fp64. The images are searched together, but the result of an
        image does not depend on the others.
        """
        n, d, height, width = z.shape
        image_rows = height * width
        whole_images = max(1, BLOCK_ROWS // image_rows) * image_rows
        parts = torch.split(z.permute(0, 2, 3, 1).reshape(-1, d), whole_images)
        blocks = [block for part in parts for block in torch.split(part, BLOCK_ROWS)]
        return torch.cat([self._nearest(rows, image_rows, exact) for rows in blocks]).view(n, height, width)

    def _nearest(self, rows: Tensor, image_rows: int, exact: bool) -> Tensor:
        """Searches for rows [n,d]: a part of an image of `image_rows` vectors, or several such images.

        All distances are squared. The P pairs are the combinations (row, ball) in which the ball may hold the row's
        nearest entry.
        """
        c, count = self.error, len(rows)
        norms = rows.square().sum(1)
        to_centres = torch.addmm(norms[:, None] + self.centre_norms, rows, self.centres.t(), alpha=-2.0)
        in_nearest_ball = self.entries[to_centres.argmin(1)].sub_(rows[:, None]).square_().sum(2).amin(1)
        reach = (in_nearest_ball + self._margin(norms, in_nearest_ball)).sqrt_()[:, None]
        # The distances to the centres are computed by the formula D, too: D ≤ T + c·(8|r|² + 2T).
        limit = (reach + self.radii).square_().mul_(1 + 8 * c).add_(9 * c * norms[:, None])
        row, ball = (to_centres <= limit).nonzero().unbind(1)
        if not count <= len(row) <= MOST_BALLS * count:  # fewer than one ball per row means that numbers overflow
            return self._by_formula(rows, torch.arange(count), image_rows, exact)
        distances = self.entries[ball].sub_(rows[row][:, None]).square_().sum(2)
        best, place = distances.topk(2, largest=False)
        first = minimum_by_row(best[:, 0], row, count)
        # The winner of a row is the pair whose ball holds the row's nearest entry. The second nearest entry is
        # either the second nearest in that ball or the nearest in any of the row's other balls.
        pairs = torch.arange(len(row))
        winner = minimum_by_row(torch.where(best[:, 0] == first[row], pairs, len(row) - 1), row, count)
        rest = best[:, 0].clone()
        rest[winner] = best[winner, 1]
        second = minimum_by_row(rest, row, count)
        indices = self.members[ball[winner], place[winner, 0]]
        unsure = (second - first > self._margin(norms, second)).logical_not().nonzero()[:, 0]
        if len(unsure):
            indices[unsure] = self._by_formula(rows, unsure, image_rows, exact)
        return indices

    def _margin(self, norms: Tensor, distances: Tensor) -> Tensor:
        """Returns by how much an entry must be nearer than `distances` to be also nearer by the formula D."""
        return 2.02 * self.error * ((2 * norms.sqrt() + distances.sqrt()).square_() + distances)

    def _by_formula(self, rows: Tensor, chosen: Tensor, image_rows: int, exact: bool) -> Tensor:
        """Returns the nearest entries of the rows at the ascending places `chosen`, by the published formula.

        Each image has its own matrix product, so that rounding does not depend on the other images. In fp32 the
        product has at least LEAST_ROWS rows, unless the image has fewer: MKL rounds short products differently, and
        the published quantizer computes all vectors of an image in one product.
        """
        found: list[Tensor] = []
        for places in torch.split(chosen, (chosen // image_rows).bincount().tolist()):
            if not len(places):
                continue
            part = rows[places].double() if exact else rows[places]
            missing = 0 if exact else max(0, min(LEAST_ROWS, image_rows) - len(part))
            padded = torch.cat([part, part[:1].expand(missing, -1)]) if missing else part
            found.append(self.codebook.nearest(padded.t()[None, :, None])[0, 0, : len(part)])
        return torch.cat(found)


def minimum_by_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Returns the minimum of the values of each row, [rows]; value i of `values` [P] belongs to the row `row[i]`.

    For a row without values it returns infinity, or P - 1 if the values are integers.
    """
    highest = torch.inf if values.is_floating_point() else len(values) - 1
    return torch.full((rows,), highest, dtype=values.dtype).scatter_reduce_(0, row, values, "amin")


def group_neighbours(vectors: Tensor) -> Tensor:
    """Returns the indices of vectors fp32 [K,d], divided into groups of neighbours, as int64 [balls,BALL_ENTRIES].

    Every group is halved along its widest axis until each has BALL_ENTRIES members.
    """
    members = torch.arange(len(vectors))[None]
    while members.shape[1] > BALL_ENTRIES and members.shape[1] % (2 * BALL_ENTRIES) == 0:
        values = vectors[members]
        axis = (values.amax(1) - values.amin(1)).argmax(1)
        along = values.gather(2, axis[:, None, None].expand(-1, values.shape[1], 1))[:, :, 0]
        members = members.gather(1, along.argsort(1)).reshape(2 * len(members), -1)
    return members
