"""The recipe: the settings that decide how every sample of a dataset is turned into an output sample."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from dat_client.dataset_format.manifest import FORMAT, check_settings, parsed_json
from dat_client.dataset_format.naming import number_of_views
from dat_client.errors import shown
from dat_workers.codecs.spec import CodecSpec
from dat_workers.errors import InvalidInput

STORED_FIELDS = ("reconstruction", "indices", "image")
PICTURE_FORMATS = ("jpg", "png", "webp")
MAX_VIEWS = 1000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a shard, apart from its source; `precompute.json` holds it.

    >>> Recipe("tiny-f8", outputs=("indices",)).views
    1
    >>> Recipe("tiny-f8", crop=224, augment=4, variants=2, replace_fraction=0.1).views
    8

    outputs: the members of STORED_FIELDS that each sample gets. picture, quality: format of the stored pictures.
    resize: length of the shorter side in pixels. crop: side of the centre crop in pixels. augment: number of random
    crops of `crop` pixels per sample, which replace the centre crop; 0 for none. variants: number of versions of
    each view, each with a different random replacement of `replace_fraction` of its tokens. keep: the source's
    fields that are copied, None for all but the picture. classes: the folder names whose positions became `cls`.
    threads: CPU threads of the engine, because their number decides the order of its additions. upright: True if
    pictures are turned by their EXIF orientation; False leaves the field out of the JSON. Raises InvalidInput for
    settings that are out of range or contradict each other.
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
    upright: bool = False

    def __post_init__(self) -> None:
        for output in self.outputs:
            if output not in STORED_FIELDS:
                raise InvalidInput("outputs", repr(output), f"any of {', '.join(STORED_FIELDS)}")
        if not set(self.outputs) & {"reconstruction", "indices"}:
            raise InvalidInput("outputs", list(self.outputs), "reconstruction, indices or both among them")
        if len(set(self.outputs)) < len(self.outputs):
            raise InvalidInput("outputs", list(self.outputs), "each once")
        if self.picture not in PICTURE_FORMATS:
            raise InvalidInput("format", repr(self.picture), f"one of {', '.join(PICTURE_FORMATS)}")
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
            numbers = f"{self.augment} and {self.variants}"
            raise InvalidInput("augment and variants", numbers, f"1 to {MAX_VIEWS} views a sample")
        for name in self.keep or ():
            if not name or "/" in name or name.startswith("."):
                limit = "the name of a field, such as cls or json; leave keep away to copy all but the picture"
                raise InvalidInput("keep", repr(name), limit)
        if not 0 <= self.seed < 2**63:
            raise InvalidInput("seed", self.seed, "0 to 2^63 - 1")

    @property
    def views(self) -> int:
        """The number of views that each sample has."""
        return number_of_views(self.augment, self.variants)

    @property
    def id(self) -> str:
        """Twelve hex digits that identify the settings; all shards of a folder have the same id."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        settings = asdict(self)
        if not self.upright:  # so that the ids of such recipes are those from before the field existed
            del settings["upright"]
        text = json.dumps({"format": FORMAT, **settings}, indent=1, ensure_ascii=False) + "\n"
        # Names of classes that are not UTF-8 hold lone surrogates, which UTF-8 cannot encode and JSON can escape.
        return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads a recipe from `text`, the content of a `precompute.json`.

        Raises ValueError if the text is not JSON, if its field "format" is not the number that this version
        writes, and if fields are missing or unknown.
        """
        settings = parsed_json(text)
        if not isinstance(settings, dict) or settings.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        settings.setdefault("upright", False)
        known = {field.name for field in fields(cls)}
        if set(settings) != known:
            raise ValueError(f"fields {sorted(set(settings) ^ known)} are missing or unknown")
        check_settings(settings)
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        return cls(**values)

    def check_tokens(self, spec: CodecSpec) -> None:
        """Raises InvalidInput if the recipe needs tokens and the codec has none."""
        if not spec.has_tokens and ("indices" in self.outputs or self.replace_fraction):
            raise InvalidInput("outputs", f"tokens of codec {spec.name}", "a codec that has a codebook")

    def differences(self, wanted: Recipe) -> str:
        """Returns, as text, the settings in which the `wanted` recipe differs from this one, with both values."""
        pairs = ((name, value, asdict(wanted)[name]) for name, value in asdict(self).items())
        return "; ".join(f"{name}: {shown(mine)}, now {shown(now)}" for name, mine, now in pairs if mine != now)

    def made_by(self, fingerprint: str, description: dict[str, str], threads: int) -> Recipe:
        """Returns a copy with the codec's fingerprint, the description of its engine and its threads filled in."""
        engine = " ".join(filter(None, (description["engine"], description.get("provider"))))
        device = description["device"].partition(":")[0]
        on_cpu = device == "cpu" and engine != "none"
        return replace(
            self, fingerprint=fingerprint, engine=engine, device=device, dtype=description["dtype"],
            tricks=description["tricks"], threads=threads if on_cpu else 0,
        )  # fmt: skip
