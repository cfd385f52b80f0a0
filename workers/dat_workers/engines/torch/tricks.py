"""What makes the codec fast on a GPU, each to be switched off by itself so that its worth can be measured."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Tricks:
    """One bool a trick; no trick changes what Q is, only how often and in which order numbers are rounded.

    >>> Tricks.parse("all,-graphs", cuda=True).graphs
    False
    >>> str(Tricks.parse("sdpa,channels_last", cuda=False))
    'channels_last,sdpa'
    """

    channels_last: bool = False  # NHWC activations and weights, the order tensor cores read
    fused_norm: bool = False  # GroupNorm and swish in one kernel of two passes (fast/kernels.py)
    folded_upsample: bool = False  # nearest x2 folded into the 3x3 convolution behind it: 9 taps become 4
    sdpa: bool = False  # attention through scaled_dot_product_attention, q, k and v from one product
    fused_codebook: bool = False  # nearest codebook entry without distances in memory (fast/kernels.py)
    graphs: bool = False  # CUDA graphs at a few batch sizes, captured by warm_up
    overlap: bool = False  # pinned staging; copies on side streams while the GPU computes

    @classmethod
    def parse(cls, text: str, *, cuda: bool) -> Tricks:
        """From one setting: names with commas between, each added, or taken away with `-`.

        The first word may be `all`, `none` or `auto`, which is all on CUDA and none elsewhere: a CPU keeps the
        published order of operations and so the published tokens. `graphs` and `overlap` are nothing without
        CUDA and are left out there. Raises ValueError for a word that is none of these.
        """
        names = [field.name for field in fields(cls)]
        everything, nothing = cls(**dict.fromkeys(names, True)), cls()
        bases = {"all": everything, "none": nothing, "auto": everything if cuda else nothing}
        first, *rest = words = [word.strip() for word in text.split(",")]
        tricks = bases.get(first)
        if tricks is None:
            # "-graphs" alone takes from `auto`; "graphs" alone adds to nothing
            tricks, rest = bases["auto" if first.startswith("-") else "none"], words
        for word in rest:
            name = word.removeprefix("-")
            if name not in names:
                raise ValueError(
                    f"tricks is {text!r}: {word!r} is no trick; all, none or auto first, then any of "
                    f"{', '.join(names)}, with - before those to leave out"
                )
            tricks = replace(tricks, **{name: not word.startswith("-")})
        return tricks if cuda else replace(tricks, graphs=False, overlap=False)

    def __str__(self) -> str:
        """The setting that `parse` reads back."""
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return "all" if len(on) == len(fields(self)) else ",".join(on) or "none"
