"""The optimisations that make the codec fast on a GPU; each can be switched off to measure its effect."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Tricks:
    """Says which optimisations are on. They change only how often and in which order Q's numbers are rounded.

    >>> Tricks.parse("all,-graphs", cuda=True).graphs
    False
    >>> str(Tricks.parse("sdpa,channels_last", cuda=False))
    'channels_last,sdpa'
    """

    channels_last: bool = False  # NHWC activations and weights, the order that tensor cores read
    fused_norm: bool = False  # a bias, GroupNorm and swish in one kernel of two passes (kernels.py)
    folded_upsample: bool = False  # nearest x2 folded into the 3x3 convolution after it: 9 taps become 4
    sdpa: bool = False  # attention by scaled_dot_product_attention; q, k and v from one product
    fused_codebook: bool = False  # nearest codebook entry without distances in memory (kernels.py)
    graphs: bool = False  # CUDA graphs at a few batch sizes, captured by warm_up
    overlap: bool = False  # pinned staging buffers; copies on streams of their own while the GPU computes

    @classmethod
    def parse(cls, text: str, *, cuda: bool) -> Tricks:
        """Parses a setting: names separated by commas; a name is switched on, or off if it begins with `-`.

        The first word may be `all`, `none` or `auto`. `auto` means all on CUDA and none on a CPU, which keeps the
        published order of operations there, and with it the published tokens. `graphs` and `overlap` need CUDA and
        are always off on a CPU. Raises ValueError for an unknown word.
        """
        names = [field.name for field in fields(cls)]
        everything, nothing = cls(**dict.fromkeys(names, True)), cls()
        bases = {"all": everything, "none": nothing, "auto": everything if cuda else nothing}
        first, *rest = words = [word.strip() for word in text.split(",")]
        tricks = bases.get(first)
        if tricks is None:
            # Without a first word, a setting that begins with "-" starts from `auto`, any other from `none`.
            tricks, rest = bases["auto" if first.startswith("-") else "none"], words
        for word in rest:
            name = word.removeprefix("-")
            if name not in names:
                raise ValueError(
                    f"tricks is {text!r}, but {word!r} does not exist; begin with all, none or auto, then add any "
                    f"of {', '.join(names)}, with - before a name to switch it off"
                )
            tricks = replace(tricks, **{name: not word.startswith("-")})
        return tricks if cuda else replace(tricks, graphs=False, overlap=False)

    def __str__(self) -> str:
        """Returns the setting that `parse` reads back."""
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return "all" if len(on) == len(fields(self)) else ",".join(on) or "none"
