"""The optimisations that make the codec fast on a GPU; each can be switched off, to measure its worth."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Tricks:
    """The optimisations that are on. None changes what Q is, only how often and in which order numbers are rounded.

    >>> Tricks.parse("all,-graphs", cuda=True).graphs
    False
    >>> str(Tricks.parse("sdpa,channels_last", cuda=False))
    'channels_last,sdpa'
    """

    channels_last: bool = False  # NHWC activations and weights, the order that tensor cores read
    fused_norm: bool = False  # GroupNorm and swish in one kernel of two passes (kernels.py)
    folded_upsample: bool = False  # nearest x2 folded into the 3x3 convolution after it: 9 taps become 4
    sdpa: bool = False  # attention by scaled_dot_product_attention; q, k and v from one product
    fused_codebook: bool = False  # nearest codebook entry without distances in memory (kernels.py)
    graphs: bool = False  # CUDA graphs at a few batch sizes, captured by warm_up
    overlap: bool = False  # pinned staging buffers; copies on streams of their own while the GPU computes

    @classmethod
    def parse(cls, text: str, *, cuda: bool) -> Tricks:
        """Reads a setting: names separated by commas, each added, or taken away if it begins with `-`.

        The first word may be `all`, `none` or `auto`, which is all on CUDA and none elsewhere: a CPU keeps the
        published order of operations and so the published tokens. `graphs` and `overlap` need CUDA and are left out
        elsewhere. Raises ValueError for any other word.
        """
        names = [field.name for field in fields(cls)]
        everything, nothing = cls(**dict.fromkeys(names, True)), cls()
        bases = {"all": everything, "none": nothing, "auto": everything if cuda else nothing}
        first, *rest = words = [word.strip() for word in text.split(",")]
        tricks = bases.get(first)
        if tricks is None:
            # "-graphs" alone takes away from `auto`; "graphs" alone adds to `none`
            tricks, rest = bases["auto" if first.startswith("-") else "none"], words
        for word in rest:
            name = word.removeprefix("-")
            if name not in names:
                raise ValueError(
                    f"tricks is {text!r}: {word!r} does not exist; begin with all, none or auto, then add any "
                    f"of {', '.join(names)}, with - before those to leave out"
                )
            tricks = replace(tricks, **{name: not word.startswith("-")})
        return tricks if cuda else replace(tricks, graphs=False, overlap=False)

    def __str__(self) -> str:
        """Returns the setting that `parse` reads back."""
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return "all" if len(on) == len(fields(self)) else ",".join(on) or "none"
