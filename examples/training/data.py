"""Reads pictures of scikit-image, of folders and of shards, as batches of uint8 tensors.

Augmentations work on uint8, because a picture then crosses the network in a quarter of the bytes of fp32.
"""

from __future__ import annotations

import glob
import json
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from dat_client.dataset_format.folders import list_folder, pictures_of
from dat_client.dataset_format.naming import TAR_SUFFIXES, picture_field
from dat_client.dataset_format.pictures import decode

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "retina")
WINDOWS = 64  # of each photograph
SHUFFLED = 1000  # pictures in the buffer that shuffles shards


class DataError(Exception):
    """The data cannot be read or used; the message names the file or flag."""


@cache
def photograph(name: str, short_side: int) -> Tensor:
    """Returns a photograph inside scikit-image, uint8 [3,H,W], scaled to this short side."""
    from skimage import data

    loaded: Any = getattr(data, name)()
    picture = Image.fromarray(loaded[0] if isinstance(loaded, tuple) else loaded).convert("RGB")
    scale = short_side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    tensor: Tensor = v2.functional.pil_to_tensor(picture.resize(size))
    return tensor


class Photographs(Dataset[Any]):
    """The default data: `transform(picture, label)` of 384 windows of six photographs, labelled by photograph.

    The windows lie at random but fixed places. Their side is 1.25 `image_size`, half the photograph's short side.
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
    """Returns `transform(picture uint8 [3,H,W], label)` of every picture of --data, and the number of labels.

    --data is one folder with a folder for each class, or WebDataset shards (`jpg`, `png` or `webp`, and `cls`);
    None stands for `Photographs`. Raises DataError.
    """
    if options.data is None:
        return Photographs(options.image_size, transform), len(PHOTOGRAPHS)
    if is_shards(options.data):
        return shards(options, partial(_labelled_sample, transform)), options.classes or 1000
    folder = Folder(options.data, transform)
    return folder, len(folder.classes)


class Folder(Dataset[Any]):
    """A folder with a folder for each class: `transform(picture, label)` of each picture.

    Classes are numbered as torchvision's ImageFolder numbers them. The rules are those of `dat precompute`: what
    cannot be read is an error, and what is left out is named.
    """

    def __init__(self, data: list[str], transform: Callable[..., Any]) -> None:
        if len(data) > 1:
            raise DataError(f"--data: must be one folder or several .tar files, got {' '.join(data)}")
        self.root = Path(data[0])
        try:
            listing = list_folder(data[0])
            found = pictures_of(listing)
        except (OSError, ValueError) as error:  # LinkCycle and LoosePictures are ValueErrors
            raise DataError(f"--data: {error}") from error
        if found.problems:
            named = "; ".join(f"{name} ({reason})" for name, reason in list(found.problems.items())[:20])
            raise DataError(f"--data: {len(found.problems)} names of {self.root} cannot be read: {named}")
        if not found.classes:
            raise DataError(f"--data: {self.root} holds no class folders with pictures")
        for reason, count, names in (*listing.left_out.rows, *found.left_out.rows):
            print(f"--data: left out {count} of {self.root}, since {reason}: {', '.join(names)}", file=sys.stderr)
        numbers = {name: number for number, name in enumerate(found.classes)}
        self.samples = [(str(self.root / name), numbers[name.split("/")[0]]) for name in found.names]
        self.classes = list(found.classes)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return self.transform(_opened(path), label)


class PairedFolder(Folder):
    """A folder, paired with one of the same names that holds Q(x): `transform(picture, Q(picture), label)`.

    `reconstructions/CLASS/NAME.png` belongs to `data/CLASS/NAME.*`, as `dat discretize data --out
    reconstructions` writes them. Raises DataError if one is missing or has another size than its picture.
    """

    def __init__(self, data: list[str], reconstructions: str, transform: Callable[..., Any]) -> None:
        super().__init__(data, transform)
        self.paired = [self._pair(Path(path), Path(reconstructions)) for path, _ in self.samples]

    def _pair(self, path: Path, reconstructions: Path) -> Path:
        pair = reconstructions / path.relative_to(self.root).with_suffix(".png")
        if not pair.is_file():
            raise DataError(f"--reconstructions: {pair} is missing (Q(x) of {path})")
        return pair

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        picture, q = _opened(path), _opened(self.paired[index])
        if picture.shape != q.shape:
            sizes = f"{picture.shape[2]}x{picture.shape[1]} and {q.shape[2]}x{q.shape[1]}"
            raise DataError(f"{path} and {self.paired[index]} differ in size: {sizes}")
        return self.transform(picture, q, label)


def same_crop(augment: Callable[..., Any], *pictures: Tensor) -> tuple[Tensor, ...]:
    """Applies `augment` with the same random numbers to pictures of the same size, such as x and Q(x)."""
    augmented = augment(*(tv_tensors.Image(picture) for picture in pictures))
    results = augmented if isinstance(augmented, tuple) else (augmented,)
    return tuple(picture.as_subclass(Tensor) for picture in results)


def two_views(augment: Callable[[Tensor], Tensor], picture: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """Returns two augmentations of one picture, a sample of self-supervised learning."""
    return augment(picture), augment(picture)


def view_augmentation(image_size: int, *, jitter: float = 0.4, smallest: float = 0.2) -> v2.Transform:
    """Returns SimCLR's augmentations for uint8: crop, flip, colour jitter, greyscale and blur.

    `jitter` is the strength of brightness and contrast, `smallest` the smallest crop as a share of the picture.
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
    """Returns whether --data names WebDataset shards rather than a folder."""
    return all(name.lower().endswith(TAR_SUFFIXES) for name in data)


def shards(options: Namespace, sample: Callable[[dict[str, Any]], Any]) -> IterableDataset[Any]:
    """Returns an endless stream of `sample(...)` of WebDataset samples; shards are drawn with replacement.

    This way, every process and each of its readers has pictures however few shards there are. The length of an
    epoch is unknown. Raises DataError for shards that do not exist.
    """
    try:
        import webdataset
    except ImportError as error:
        raise DataError("shards need webdataset: pip install 'dat-service[examples]'") from error
    names = [name for pattern in options.data for name in webdataset.shardlists.expand_urls(pattern)]
    names = [found for name in names for found in (sorted(glob.glob(name)) if "*" in name else [name])]
    for name in names:
        if "://" not in name and not Path(name).is_file():
            raise DataError(f"--data: {name} does not exist")
    stream = webdataset.WebDataset(
        names, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node, seed=options.seed
    )
    shuffled: IterableDataset[Any] = stream.shuffle(SHUFFLED).map(partial(_named, sample))
    return shuffled


def picture_of(sample: dict[str, Any]) -> Tensor:
    """Returns the picture of a WebDataset sample, uint8 [3,H,W]. Raises DataError if there is none."""
    try:
        return _decoded(sample[picture_field([key for key in sample if not key.startswith("__")])])
    except ValueError as error:
        raise DataError(str(error)) from error


def boxes_of(sample: dict[str, Any], classes: int) -> tuple[Tensor, Tensor]:
    """Returns boxes [n,4] (x, y, width, height in pixels) and labels [n] of a sample's `json`, without crowds.

    Its `objects` have `bbox_xywh`, `category_id` (1..classes-1) and `iscrowd`. Raises DataError for other labels.
    """
    objects = [o for o in json.loads(sample["json"])["objects"] if not o.get("iscrowd")]
    labels = torch.tensor([o["category_id"] for o in objects], dtype=torch.int64)
    if len(labels) and not (labels.min() > 0 and labels.max() < classes):
        raise DataError(
            f"category_id {labels.min()}..{labels.max()}, must be 1..{classes - 1} (--classes {classes})"
        )
    return torch.tensor([o["bbox_xywh"] for o in objects], dtype=torch.float32).reshape(-1, 4), labels


class StepSampler(Sampler[list[int]]):
    """Yields the indices of steps `start` to `stop`; those of step n depend only on n and the seed.

    A resumed training therefore continues with the same samples. An epoch is a permutation, of which the processes
    take turns; a remainder that does not fill a step of all of them is left out.
    """

    def __init__(
        self, length: int, batch_size: int, start: int, stop: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if length < batch_size * world:
            raise DataError(f"a step takes {batch_size * world} of {length} pictures: give a smaller --batch-size")
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
    """Returns the batches of steps `start` to `stop`; those of shards have no end."""
    if isinstance(data, IterableDataset):
        sampling: dict[str, Any] = {"batch_size": options.batch_size}
    else:
        length = len(data)  # type: ignore[arg-type]
        place = {"seed": options.seed, "rank": options.rank, "world": options.world}
        sampling = {"batch_sampler": StepSampler(length, options.batch_size, start, stop, **place)}
    return DataLoader(
        data,
        num_workers=options.workers,
        pin_memory=options.device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=_ignore_interrupts,
        **sampling,
    )


def _ignore_interrupts(_: int) -> None:
    """Leaves Ctrl-C to the trainer, which ends its readers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _opened(file: str | Path) -> Tensor:
    return _decoded(Path(file).read_bytes())


def _decoded(content: bytes) -> Tensor:
    tensor: Tensor = v2.functional.pil_to_tensor(decode(content))
    return tensor


def _labelled_sample(transform: Callable[[Tensor, int], Any], sample: dict[str, Any]) -> Any:
    return transform(picture_of(sample), int(sample["cls"]))


def _named(function: Callable[[dict[str, Any]], Any], sample: dict[str, Any]) -> Any:
    """Returns `function(sample)`; adds the shard and the key of the sample to its errors."""
    try:
        return function(sample)
    except (DataError, OSError, KeyError, ValueError) as error:
        problem = f"the sample has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{sample['__url__']}, sample {sample['__key__']}: {problem}") from error
