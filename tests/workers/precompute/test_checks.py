"""What is wrong with the arguments of a job, found before the codec is loaded; and what it leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dat_client.dataset_format.tar_samples import Sample
from dat_client.webdataset import load
from dat_workers.codecs.spec import CodecError
from dat_workers.engines.config import EngineConfig
from dat_workers.errors import InvalidInput
from dat_workers.precompute import JobProgress, OtherRecipe, SampleFailed, checks, job, precompute
from dat_workers.sources.find import find
from tests.workers.precompute.shards import (
    contents,
    encoded,
    picture,
    read_tar,
    sample_files,
    write_shards,
    write_tar,
)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[JobProgress]:
    """What a job reports; the workers of this test fail the job, because nothing may be loaded."""

    def load_nothing(*_: object) -> None:
        raise AssertionError("the codec is loaded")

    monkeypatch.setattr(job, "LocalWorkers", load_nothing)
    monkeypatch.setattr(job, "RayWorkers", load_nothing)
    return []


def run(source: Path | str, dst: Path | str, **options: Any) -> Any:
    options = {"codec": "identity", "engine_config": EngineConfig(threads=1), **options}
    return precompute(str(source), str(dst), **options)


WRONG = [
    ({"keep": ["clss"]}, InvalidInput, "none of the first 15 samples has a field 'clss'; .* are cls, png"),
    ({"keep": ["cls", "json"]}, InvalidInput, "a field 'json'; their fields are cls, png"),
    ({"keep": ["CLS"]}, InvalidInput, "a field 'CLS'"),
    ({"keep": ["../x"]}, InvalidInput, "keep: '../x' is not usable"),
    ({"keep": ["a/b"]}, InvalidInput, "keep: 'a/b' is not usable"),
    ({"keep": ["cls", ""]}, InvalidInput, "keep: '' is not usable"),
    ({"keep": "cls"}, InvalidInput, "keep: 'cls' is not usable; expected a list of names"),
    ({"outputs": "indices"}, InvalidInput, "outputs: 'indices' is not usable; expected a list of names"),
    ({"codec": "no-such"}, CodecError, "unknown codec 'no-such'"),
    ({"codec": "../tiny"}, CodecError, "codec name '../tiny' is not allowed"),
    ({"codec": "vqgan-imagenet-f16-16384"}, CodecError, "is not installed; run: dat codecs pull"),
    ({"outputs": ["indices"]}, InvalidInput, "a codec that has a codebook"),
    ({"codec": "tiny-f8", "engine_config": EngineConfig(device="gpu")}, ValueError, "device is 'gpu'"),
    ({"codec": "tiny-f8", "engine_config": EngineConfig("cpu", dtype="fp16")}, ValueError, "dtype is 'fp16'"),
    ({"codec": "tiny-f8", "engine_config": EngineConfig("torch", "cpu", "tf32")}, ValueError, "which needs CUDA"),
    ({"crop": 0}, InvalidInput, "crop: 0 is not usable"),
    ({"workers": 0}, InvalidInput, "workers: 0"),
    ({"pictures_a_shard": 0, "source": "photos"}, InvalidInput, "pictures_a_shard: 0"),
    ({"gpus": 1}, InvalidInput, "gpus: 1 is not usable; expected 0 or more, and only with ray"),
    ({"gpus": math.nan, "ray": True}, InvalidInput, "gpus: nan"),
    ({"source": "nowhere"}, FileNotFoundError, "nowhere: no such shard or folder"),
    ({"dst": "src/within"}, InvalidInput, "a folder that is not within the source"),
    ({"source": "photos", "keep": ["json"]}, InvalidInput, "none of the pictures has a field 'json'.*are cls, png"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_arguments_are_checked_before_the_codec_is_loaded(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str, reports: list[JobProgress]
) -> None:
    write_shards(tmp_path / "src")
    (tmp_path / "photos" / "a").mkdir(parents=True)
    picture(0).save(tmp_path / "photos" / "a" / "1.png")
    before = contents(tmp_path), sorted(tmp_path.rglob("*"))
    source = tmp_path / options.get("source", "src")
    dst = tmp_path / options.get("dst", "dst")
    with pytest.raises(kind, match=message):
        run(source, dst, report=reports.append, **{k: v for k, v in options.items() if k not in ("source", "dst")})
    assert reports == []  # "loading" is never reported
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_a_damaged_recipe_of_dst_is_found_before_the_codec_is_loaded(
    tmp_path: Path, reports: list[JobProgress]
) -> None:
    source, dst = write_shards(tmp_path / "src", 1), tmp_path / "dst"
    dst.mkdir()
    (dst / "precompute.json").write_bytes(b"\x89PNG")
    with pytest.raises(OtherRecipe, match=r"precompute.json was not written by this version"):
        run(source, dst, report=reports.append)
    assert reports == []
    assert contents(dst).keys() == {"precompute.json"}


def test_a_field_that_some_samples_lack_is_counted(tmp_path: Path) -> None:
    files = [file for i in range(6) for file in sample_files(i)]
    files = [(name, content) for name, content in files if name not in ("0001.cls", "0004.cls")]
    write_tar(tmp_path / "src" / "a.tar", [*files, ("0005.json", b"{}")])
    write_tar(tmp_path / "src" / "b.tar", [("x.png", encoded(picture(1))), ("bad.png", b"")])
    summary = run(tmp_path / "src", tmp_path / "dst", keep=["cls", "json"], skip=True)
    assert (summary.samples, summary.lacking) == (7, (("cls", 3), ("json", 6)))
    entry = json.loads((tmp_path / "dst" / "manifest" / "a.tar.json").read_text())
    assert entry["lacking"] == {"cls": 2, "json": 5}
    assert run(tmp_path / "src", tmp_path / "dst", keep=["cls", "json"], skip=True).lacking == summary.lacking
    assert [name for name in read_tar(tmp_path / "dst" / "a.tar") if "0001" in name] == ["0001.jpg"]


def test_kept_fields_are_looked_for_in_the_first_samples_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "src" / "a.tar", [])
    write_tar(tmp_path / "src" / "b.tar", [(f"{i:03}.txt", b"") for i in range(120)] + [("999.late", b"")])
    with pytest.raises(InvalidInput, match="the first 100 samples has a field 'late'; their fields are txt"):
        run(tmp_path / "src", tmp_path / "dst", keep=["late"])


def test_little_is_read_to_look_for_kept_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find(str(write_tar(tmp_path / "a.tar", [(f"{i}.cls", b"0" * 1000) for i in range(50)])))
    read: list[str] = []
    fields = Sample.nbytes.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Sample, "nbytes", property(lambda self: (read.append(self.key), fields(self))[1]))
    checks.check_kept_fields(source, ["cls"])
    assert len(read) == 1
    monkeypatch.setattr(checks, "FIRST_BYTES", 3500)
    with pytest.raises(InvalidInput, match="none of the first 4 samples has a field 'txt'; their fields are cls"):
        checks.check_kept_fields(source, ["txt"])


def test_the_same_key_in_two_shards_of_a_folder(tmp_path: Path, reports: list[JobProgress]) -> None:
    for i, name in enumerate(("a/1.jpg", "a/2.jpg", "a/2.png", "b/1.png")):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))  # PNG, whatever the suffix: x can be compared
    message = r"sample a/2: the key was there before, of a/2.jpg: rename one"
    with pytest.raises(SampleFailed, match=message):
        run(tmp_path / "src", tmp_path / "dst", pictures_a_shard=2, report=reports.append)
    assert reports == []
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("pictures_a_shard", [1, 2, 10])
def test_of_the_same_key_the_first_is_made_and_is_the_original(tmp_path: Path, pictures_a_shard: int) -> None:
    names = ("a/1.jpg", "a/2.jpg", "a/2.png", "a/2.webp", "b/1.png", "b/2.x.png", "b/2_x.png")
    for i, name in enumerate(names):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))
    dst = tmp_path / "dst"
    summary = run(tmp_path / "src", dst, picture="png", pictures_a_shard=pictures_a_shard, skip=True)
    assert (summary.samples, summary.skipped) == (4, 3)
    assert [key for _, key, _ in summary.skipped_first] == ["a/2", "a/2", "b/2_x"]
    expected = [picture(i).size[::-1] for i in (0, 1, 4, 5)]
    items = list(load(dst, source=tmp_path / "src"))
    assert [tuple(x.shape[1:]) for x, _, _ in items] == expected
    assert all((x == x_hat).all() for x, x_hat, _ in items)
    assert run(tmp_path / "src", dst, picture="png", pictures_a_shard=pictures_a_shard, skip=True).images == 0
    (tmp_path / "src" / "a" / "2.jpg").rename(tmp_path / "src" / "a" / "3.jpg")
    again = run(tmp_path / "src", dst, picture="png", pictures_a_shard=pictures_a_shard, skip=True)
    assert (again.samples, again.skipped) == (5, 2)  # a/2.png is the first of its key now
    assert all((x == x_hat).all() for x, x_hat, _ in load(dst, source=tmp_path / "src"))


ODD_TARS = {
    "a key twice": [*sample_files(0), *sample_files(1), *sample_files(0), *sample_files(2)],
    "a name twice": [*sample_files(0), *sample_files(1), sample_files(1)[0], *sample_files(2)],
    "the first unusable": [("0000.png", b""), *sample_files(1), *sample_files(0), *sample_files(2)],
    "no picture": [*sample_files(0), ("0001.cls", b"1"), *sample_files(2)],
    "files in turn": [*(sample_files(i)[j] for j in (0, 1) for i in (0, 1)), *sample_files(2)],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_TARS)
@pytest.mark.parametrize("cut", [0, 1200])
def test_what_was_skipped_is_passed_over_in_the_source(tmp_path: Path, name: str, cut: int) -> None:
    path = write_tar(tmp_path / "src" / "a.tar", ODD_TARS[name])
    if cut:  # the end of the last sample is lost
        path.write_bytes(path.read_bytes().rstrip(b"\0")[:-cut])
    summary = run(path, tmp_path / "dst", picture="png", skip=True)
    items = list(load(tmp_path / "dst", source=path, label=None))
    assert summary.skipped > 0
    assert len(items) == summary.samples > 0
    assert all((x == x_hat).all() for x, x_hat in items)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "src" / b"cafe\xe9".decode("utf-8", "surrogateescape")
    folder.mkdir(parents=True)
    name = b"\xff.png".decode("utf-8", "surrogateescape")
    for other in (name, "2.png"):
        (folder / other).write_bytes(encoded(picture(3)))
    (folder / "3.png").write_bytes(b"no picture")
    summary = run(tmp_path / "src", tmp_path / "dst", picture="png", crop=32, augment=2, skip=True)
    assert (summary.samples, summary.skipped) == (2, 1)
    data = load(tmp_path / "dst", source=tmp_path / "src", view="all")
    assert [label for _, _, label in data] == [0] * 4
    assert all((x == x_hat).all() for x, x_hat, _ in data)
    assert run(tmp_path / "src", tmp_path / "dst", picture="png", crop=32, augment=2, skip=True).shards_kept == 1


def test_damaged_manifest_entries_are_made_again_and_reported(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src"), tmp_path / "dst"
    run(source, dst)
    before = contents(dst)
    (dst / "manifest" / "train-000001.tar.json").write_bytes(b"\xff\xfe")
    (dst / "train-000002.tar").unlink()
    summary = run(source, dst)
    assert contents(dst) == before
    assert [name for name, _ in summary.remade] == ["train-000001.tar", "train-000002.tar"]
    assert summary.remade[0][1].startswith("its manifest entry cannot be read: ")
    assert summary.remade[1][1] == "it is not there, but its manifest entry is"
    assert run(source, dst).remade == ()


def test_what_cannot_be_read_only_now_is_listed_though_its_shard_was_made_before(tmp_path: Path) -> None:
    source, dst = tmp_path / "src", tmp_path / "dst"
    for i, name in enumerate(("a/0.png", "b/1.png")):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_bytes(encoded(picture(i)))
    assert run(source, dst, pictures_a_shard=1, skip=True).skipped == 0
    (source / "b" / "1.png").rename(source / "a" / "1.png")  # class b is empty now
    summary = run(source, dst, pictures_a_shard=1, skip=True)
    assert (summary.samples, summary.skipped_first) == (
        2,
        (("000000.tar", "b/", "a class folder without pictures"),),
    )
    assert summary.remade[0][1] == "its manifest entry does not list all that cannot be read in its source now"
    assert run(source, dst, pictures_a_shard=1, skip=True).shards_kept == 2


def test_shards_that_fewer_pictures_do_not_fill_are_removed(tmp_path: Path) -> None:
    source, dst = tmp_path / "src", tmp_path / "dst"
    for i in range(5):
        (source / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (source / f"c{i % 2}" / f"{i}.png").write_bytes(encoded(picture(i)))
    run(source, dst, picture="png", pictures_a_shard=2)
    (source / "c0" / "0.png").unlink()
    summary = run(source, dst, picture="png", pictures_a_shard=2)
    assert (summary.samples, summary.removed, summary.others) == (4, ("000002.tar",), 0)
    run(source, tmp_path / "new", picture="png", pictures_a_shard=2)
    assert contents(dst) == contents(tmp_path / "new")
    assert [label for _, _, label in load(dst, source=source)] == [0, 0, 1, 1]  # each picture once
    assert run(source, dst, picture="png", pictures_a_shard=2).removed == ()


def test_manifests_of_unusable_pictures_do_not_differ_from_run_to_run(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "0.png").write_bytes(encoded(picture(0)))
    (tmp_path / "src" / "1.png").write_bytes(b"no picture")
    for dst in ("one", "two"):
        assert run(tmp_path / "src", tmp_path / dst, skip=True).skipped == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (entry,) = (tmp_path / "one" / "manifest").iterdir()
    assert "its first bytes are those of none of these formats" in entry.read_text()
