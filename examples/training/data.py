"""Pictures from scikit-image, from folders and from shards, as batches of uint8 tensors.

Augmentations work on uint8, so that a picture crosses the network in a quarter of the bytes of fp32.
"""

from __future__ import annotations

import glob
import io
import json
import signal
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "retina")
WINDOWS = 64  # into each photograph
SHUFFLED = 1000  # pictures in the buffer that mixes the pictures of shards


class DataError(Exception):
    """--data names nothing that can be read."""


@cache
def photograph(name: str, short_side: int) -> Tensor:
    """uint8 [3,H,W]: a photograph inside scikit-image, its short side as given."""
    from skimage import data

    loaded: Any = getattr(data, name)()
    picture = Image.fromarray(loaded[0] if isinstance(loaded, tuple) else loaded).convert("RGB")
    scale = short_side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    tensor: Tensor = v2.functional.pil_to_tensor(picture.resize(size))
    return tensor


class Photographs(Dataset[Any]):
    """The default data: `transform(picture, label)` of 384 windows into six photographs, labelled by photograph.

    The windows lie at random, always the same, their side 1.25 of `image_size`, half the photograph's short side.
    """

    def __init__(self, image_size: int, transform: Callable[[Tensor, int], Any]) -> None:
        self.side = round(1.25 * image_size)
        self.pictures = [photograph(name, 2 * self.side) for name in PHOTOGRAPHS]
        self.transform = transform
        generator = torch.Generator().manual_seed(0)
        self.places = torch.rand(WINDOWS * len(PHOTOGRAPHS), 2, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        label = index % len(self.pictures)
        picture = self.pictures[label]
        top, left = (
            round(place * (extent - self.side))
            for place, extent in zip(self.places[index], picture.shape[1:], strict=True)
        )
        return self.transform(picture[:, top : top + self.side, left : left + self.side], label)


def labelled(options: Namespace, transform: Callable[[Tensor, int], Any]) -> tuple[Dataset[Any], int]:
    """`transform(picture uint8 [3,H,W], label)` of every picture of --data, and how many labels there are.

    --data is one folder with a folder for each class, or WebDataset shards (`jpg`, `png` or `webp`, and `cls`);
    None is `Photographs`. Raises DataError.
    """
    if options.data is None:
        return Photographs(options.image_size, transform), len(PHOTOGRAPHS)
    if is_shards(options.data):
        return shards(options, partial(_labelled_sample, transform)), options.classes or 1000
    folder = Folder(options.data, transform)
    return folder, len(folder.classes)


class Folder(Dataset[Any]):
    """A folder with a folder for each class: `transform(picture, label)` of each picture."""

    def __init__(self, data: list[str], transform: Callable[..., Any]) -> None:
        if len(data) > 1:
            raise DataError(f"--data: one folder or several .tar, got {' '.join(data)}")
        try:
            found = datasets.ImageFolder(data[0])
        except OSError as error:
            raise DataError(f"--data: {error}".splitlines()[0]) from error
        self.root = Path(data[0])
        self.samples: list[tuple[str, int]] = found.samples
        self.classes: list[str] = found.classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return self.transform(_opened(path), label)


class PairedFolder(Folder):
    """A folder beside one of the same names with Q(x) in it: `transform(picture, Q(picture), label)`.

    `reconstructions/CLASS/NAME.png` belongs to `data/CLASS/NAME.*`, as `dat discretize data/CLASS/* --out
    reconstructions/CLASS` writes them. All must be there, and each of its picture's size: DataError.
    """

    def __init__(self, data: list[str], reconstructions: str, transform: Callable[..., Any]) -> None:
        super().__init__(data, transform)
        self.paired = [self._pair(Path(path), Path(reconstructions)) for path, _ in self.samples]

    def _pair(self, path: Path, reconstructions: Path) -> Path:
        pair = reconstructions / path.relative_to(self.root).with_suffix(".png")
        if not pair.is_file():
            raise DataError(f"--reconstructions: {pair} is not there (Q(x) of {path})")
        return pair

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        picture, q = _opened(path), _opened(self.paired[index])
        if picture.shape != q.shape:
            sizes = f"{picture.shape[2]}x{picture.shape[1]} and {q.shape[2]}x{q.shape[1]}"
            raise DataError(f"{path} and {self.paired[index]} differ in size: {sizes}")
        return self.transform(picture, q, label)


def same_crop(augment: Callable[..., Any], *pictures: Tensor) -> tuple[Tensor, ...]:
    """`augment` with the same random numbers on pictures of one size (x and Q(x))."""
    augmented = augment(*(tv_tensors.Image(picture) for picture in pictures))
    several = augmented if isinstance(augmented, tuple) else (augmented,)
    return tuple(picture.as_subclass(Tensor) for picture in several)


def two_views(augment: Callable[[Tensor], Tensor], picture: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """A sample of self-supervised learning: two augmentations of one picture."""
    return augment(picture), augment(picture)


def view_augmentation(image_size: int, *, jitter: float = 0.4, smallest: float = 0.2) -> v2.Transform:
    """Crop, flip, colours, grey, blur: SimCLR's augmentations, on uint8.

    `jitter` is the strength of brightness and contrast, `smallest` the share of the picture in the smallest crop.
    """
    blur = v2.GaussianBlur(max(3, image_size // 10 | 1), (0.1, 2.0))
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(smallest, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(jitter, jitter, jitter / 2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([blur], p=0.5),
        ]
    )


def is_shards(data: list[str]) -> bool:
    """Whether --data are WebDataset shards rather than a folder."""
    return all(name.endswith(".tar") for name in data)


def shards(options: Namespace, sample: Callable[[dict[str, Any]], Any]) -> IterableDataset[Any]:
    """`sample(...)` of the samples of WebDataset shards, endlessly: shards are drawn at random with replacement.

    So every process and every reader of it has pictures however few the shards are; an epoch is not known.
    Raises DataError for shards that are not there.
    """
    try:
        import webdataset
    except ImportError as error:
        raise DataError("shards need webdataset: pip install 'dat-service[examples]'") from error
    names = [name for pattern in options.data for name in webdataset.shardlists.expand_urls(pattern)]
    names = [found for name in names for found in (sorted(glob.glob(name)) if "*" in name else [name])]
    for name in names:
        if "://" not in name and not Path(name).is_file():
            raise DataError(f"--data: {name} is not there")
    stream = webdataset.WebDataset(
        names, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node, seed=options.seed
    )
    shuffled: IterableDataset[Any] = stream.shuffle(SHUFFLED).map(partial(_named, sample))
    return shuffled


def picture_of(sample: dict[str, Any]) -> Tensor:
    """uint8 [3,H,W] of a WebDataset sample. Raises DataError where there is none."""
    for suffix in ("jpg", "jpeg", "png", "webp"):
        if suffix in sample:
            return _opened(io.BytesIO(sample[suffix]))
    raise DataError(f"no jpg, png or webp, only {sorted(key for key in sample if not key.startswith('__'))}")


def boxes_of(sample: dict[str, Any], classes: int) -> tuple[Tensor, Tensor]:
    """Boxes [n,4] as x, y, width, height in pixels, and labels [n], of a sample's `json`; crowds are left out.

    `objects`: each with `bbox_xywh`, `category_id` (1..classes-1) and `iscrowd`.
    """
    objects = [o for o in json.loads(sample["json"])["objects"] if not o.get("iscrowd")]
    labels = torch.tensor([o["category_id"] for o in objects], dtype=torch.int64)
    if len(labels) and not (labels.min() > 0 and labels.max() < classes):
        raise DataError(
            f"category_id {labels.min()}..{labels.max()}, must be 1..{classes - 1} (--classes {classes})"
        )
    return torch.tensor([o["bbox_xywh"] for o in objects], dtype=torch.float32).reshape(-1, 4), labels


class StepSampler(Sampler[list[int]]):
    """The indices of steps `start` to `stop`; what step n reads depends on n and the seed alone.

    So a resumed training goes on where it was. An epoch is a permutation; processes take turns in it, and what
    does not fill a step of all of them is left out.
    """

    def __init__(
        self, length: int, batch_size: int, start: int, stop: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if length < batch_size * world:
            raise DataError(f"{length} pictures, a step takes {batch_size * world}: give a smaller --batch-size")
        self.length, self.batch_size = length, batch_size
        self.start, self.stop = start, stop
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        a_step = self.batch_size * self.world
        order, drawn = torch.empty(0), -1
        for step in range(self.start, self.stop):
            epoch, turn = divmod(step, self.length // a_step)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order, drawn = torch.randperm(self.length, generator=generator), epoch
            first = turn * a_step + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def batches(
    data: Dataset[Any],
    options: Namespace,
    start: int,
    stop: int,
    *,
    collate: Callable[..., Any] | None = None,
) -> Iterable[Any]:
    """The batches of steps `start` to `stop` (for shards: without end)."""
    if isinstance(data, IterableDataset):
        how: dict[str, Any] = {"batch_size": options.batch_size}
    else:
        length = len(data)  # type: ignore[arg-type]
        of = {"seed": options.seed, "rank": options.rank, "world": options.world}
        how = {"batch_sampler": StepSampler(length, options.batch_size, start, stop, **of)}
    return DataLoader(
        data,
        num_workers=options.workers,
        pin_memory=options.device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=_ignore_interrupts,
        **how,
    )


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C is the trainer's; it ends its readers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _opened(file: str | Path | io.BytesIO) -> Tensor:
    with Image.open(file) as picture:
        tensor: Tensor = v2.functional.pil_to_tensor(picture.convert("RGB"))
        return tensor


def _labelled_sample(transform: Callable[[Tensor, int], Any], sample: dict[str, Any]) -> Any:
    return transform(picture_of(sample), int(sample["cls"]))


def _named(function: Callable[[dict[str, Any]], Any], sample: dict[str, Any]) -> Any:
    """`function(sample)`; what is wrong with a sample is said with its name."""
    try:
        return function(sample)
    except (DataError, OSError, KeyError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{sample['__url__']}, sample {sample['__key__']}: {what}") from error
