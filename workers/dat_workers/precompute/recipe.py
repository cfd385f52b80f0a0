"""What is made of every sample: the settings that a folder of shards was written with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from dat_workers.errors import InvalidInput

FORMAT = 1
OUTPUTS = ("reconstruction", "indices", "image")
PICTURES = ("jpg", "png", "webp")
MAX_VIEWS = 1000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a shard, apart from its source; `precompute.json` holds it.

    >>> Recipe("tiny-f8", outputs=("indices",)).views
    1
    >>> Recipe("tiny-f8", crop=224, augment=4, variants=2, replace_fraction=0.1).views
    8

    resize: the shorter side, crop: the side of the centre crop, in pixels. augment: random crops of `crop` a
    sample, 0 for none. variants: how often `replace_fraction` of a view's tokens are swapped for others. keep: the
    fields that are copied, None for all but the picture. classes: names of the folders that became `cls`.
    threads: of an engine on the CPU, for their number decides the order of its additions.
    Raises InvalidInput for what does not go together.
    """

    codec: str
    fingerprint: str = ""
    engine: str = ""
    device: str = ""
    dtype: str = ""
    tricks: str = ""
    threads: int = 0
    outputs: tuple[str, ...] = ("reconstruction",)
    picture: str = "jpg"
    quality: int = 95
    resize: int | None = None
    crop: int | None = None
    augment: int = 0
    replace_fraction: float = 0.0
    variants: int = 1
    seed: int = 0
    keep: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    pictures_a_shard: int | None = None

    def __post_init__(self) -> None:
        for output in self.outputs:
            if output not in OUTPUTS:
                raise InvalidInput("outputs", repr(output), f"of {', '.join(OUTPUTS)}")
        if not set(self.outputs) & {"reconstruction", "indices"}:
            raise InvalidInput("outputs", list(self.outputs), "reconstruction, indices or both among them")
        if len(set(self.outputs)) < len(self.outputs):
            raise InvalidInput("outputs", list(self.outputs), "each once")
        if self.picture not in PICTURES:
            raise InvalidInput("format", repr(self.picture), f"of {', '.join(PICTURES)}")
        if not 1 <= self.quality <= 100:
            raise InvalidInput("quality", self.quality, "1 to 100")
        for name in ("resize", "crop"):
            side = getattr(self, name)
            if side is not None and not 1 <= side <= 8192:
                raise InvalidInput(name, side, "1 to 8192 pixels")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise InvalidInput("crop", self.crop, f"at most the shorter side, resize = {self.resize}")
        if self.augment and (self.crop is None or self.resize is not None):
            raise InvalidInput("augment", self.augment, "a crop, the side of each view, and no resize")
        if not 0 <= self.replace_fraction <= 1:
            raise InvalidInput("replace_fraction", self.replace_fraction, "0 to 1")
        if self.variants > 1 and not self.replace_fraction:
            raise InvalidInput("variants", self.variants, "1 where replace_fraction is 0: they would be the same")
        if self.augment < 0 or self.variants < 1 or self.views > MAX_VIEWS:
            many = f"{self.augment} and {self.variants}"
            raise InvalidInput("augment and variants", many, f"1 to {MAX_VIEWS} views a sample")
        if not 0 <= self.seed < 2**63:
            raise InvalidInput("seed", self.seed, "0 to 2^63 - 1")

    @property
    def views(self) -> int:
        """Views of a sample."""
        return max(1, self.augment) * self.variants

    @property
    def id(self) -> str:
        """Twelve hex digits of what it says: shards of one folder have the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def prefix(self, view: int) -> str:
        """What stands before the field names of a view; nothing where there is one."""
        return f"{view}." if self.views > 1 else ""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises ValueError for what is no such file."""
        said = json.loads(text)
        if not isinstance(said, dict) or said.pop("format", None) != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        known = {field.name for field in fields(cls)}
        if set(said) != known:
            raise ValueError(f"fields {sorted(set(said) ^ known)} are missing or unknown")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in said.items()}
        return cls(**values)

    def differences(self, other: Recipe) -> str:
        """What `other` says otherwise, in words."""
        pairs = ((name, value, asdict(other)[name]) for name, value in asdict(self).items())
        return "; ".join(f"{name}: {short(mine)}, now {short(now)}" for name, mine, now in pairs if mine != now)

    def made_by(self, fingerprint: str, said: dict[str, str], threads: int) -> Recipe:
        """The same with what the codec says of itself (`Discretizer.describe`)."""
        engine = " ".join(filter(None, (said["engine"], said.get("provider"))))
        device = said["device"].partition(":")[0]
        on_cpu = device == "cpu" and engine != "none"
        return replace(
            self, fingerprint=fingerprint, engine=engine, device=device, dtype=said["dtype"], tricks=said["tricks"],
            threads=threads if on_cpu else 0,
        )  # fmt: skip


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
