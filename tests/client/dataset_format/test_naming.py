from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.core import url_to_fs

from dat_client.dataset_format.naming import (
    expand,
    key_and_field,
    key_and_suffix,
    number_of_views,
    output_name,
    picture_field,
    source_name,
    view_prefix,
)


@pytest.mark.parametrize(
    ("member", "split"),
    [
        ("a.b/c.d/one.JPG", ("a.b/c.d/one", "jpg")),
        ("one.seg.png", ("one", "seg.png")),
        ("./two.cls", ("./two", "cls")),
        ("three", None),
        ("a/._one.png", None),  # macOS adds such files
        ("a/.two", None),
        ("__info__/one.jpg", None),
        ("__one__", None),
    ],
)
def test_members_are_split_at_the_first_dot_of_their_name(member: str, split: tuple[str, str] | None) -> None:
    assert key_and_field(member) == split


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("1.png", ("1", "png")),
        ("a.b/x.y.PNG", ("a.b/x_y", "png")),
        ("x..jpg", ("x_", "jpg")),
    ],
)
def test_keys_of_pictures_in_folders_have_no_dots(path: str, split: tuple[str, str]) -> None:
    assert key_and_suffix(path) == split
    key, suffix = split
    assert key_and_field(f"{key}.{suffix}") == split


def test_the_picture_is_the_only_one_or_the_only_one_without_a_dot() -> None:
    assert picture_field(["cls", "jpg", "seg.png"]) == "jpg"
    assert picture_field(["0001.webp", "json"]) == "0001.webp"
    with pytest.raises(ValueError, match=r"no picture .* cls, json$"):
        picture_field(["cls", "json"])
    with pytest.raises(ValueError, match=r"several pictures .* keys end at the first dot"):
        picture_field(["1.jpg", "2.jpg"])
    with pytest.raises(ValueError, match="several pictures"):
        picture_field(["jpg", "png"])


@pytest.mark.parametrize("name", ["a.tar", "a.TAR.GZ", "a.tgz", "b/c.tar.gz", "[2012] a.tar", "a", "b/a.bin"])
def test_a_source_is_found_by_the_name_of_its_output(name: str) -> None:
    output = output_name(name)
    assert output.endswith(".tar")
    assert source_name(output, f"s3://moved/since/{name}") == name


def test_views_are_numbered_only_where_there_are_several() -> None:
    assert [number_of_views(0, 1), number_of_views(0, 3), number_of_views(4, 2)] == [1, 3, 8]
    assert (view_prefix(0, 1), view_prefix(7, 8)) == ("", "7.")


def test_patterns_are_expanded_and_names_that_exist_stand_for_themselves(tmp_path: Path) -> None:
    for name in ("a1.tar", "a2.tar", "[b].tar", "{c,d}.tar"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[list[str]]:
        return [[Path(url).name for url in urls] for _, urls in expand(f"{tmp_path}/{pattern}", url_to_fs)]

    assert names("a{1..3}.tar") == [["a1.tar"], ["a2.tar"], ["a3.tar"]]
    assert names("a*.tar") == [["a1.tar", "a2.tar"]]
    assert names("no*.tar") == [[]]
    assert names("{a1,[b]}.tar") == [["a1.tar"], ["[b].tar"]]
    assert names("{c,d}.tar") == [["{c,d}.tar"]]
    with pytest.raises(ValueError, match=r"\{1"):
        names("a{1.tar")
