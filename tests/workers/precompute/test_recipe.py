from __future__ import annotations

from typing import Any

import pytest

from dat_workers.errors import InvalidInput
from dat_workers.precompute.recipe import Recipe


def test_a_recipe_comes_back_from_its_file() -> None:
    recipe = Recipe("c", "f" * 64, outputs=("indices", "image"), keep=("cls",), classes=("ä", "b"), seed=7)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.id == recipe.id


def test_everything_that_decides_the_bytes_decides_the_id() -> None:
    ids = {Recipe("c").id, Recipe("d").id, Recipe("c", quality=90).id, Recipe("c", keep=()).id, Recipe("c", "f").id}
    assert len(ids) == 5
    assert Recipe("c").differences(Recipe("c", quality=90, seed=1)) == "quality: 95, now 90; seed: 0, now 1"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "codec": "c"}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words, or ours
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("wrong", "limit"),
    [
        ({"outputs": ("tokens",)}, "tokens"),
        ({"outputs": ("image",)}, "reconstruction, indices or both"),
        ({"outputs": ()}, "reconstruction, indices or both"),
        ({"outputs": ("indices", "indices")}, "each once"),
        ({"picture": "gif"}, "gif"),
        ({"quality": 0}, "1 to 100"),
        ({"resize": 0}, "1 to 8192"),
        ({"crop": 9000}, "1 to 8192"),
        ({"resize": 100, "crop": 101}, "at most the shorter side"),
        ({"augment": 2}, "a crop"),
        ({"augment": 2, "crop": 8, "resize": 9}, "no resize"),
        ({"augment": -1, "crop": 8}, "views"),
        ({"augment": 2000, "crop": 8}, "1 to 1000 views"),
        ({"variants": 2}, "the same"),
        ({"variants": 0, "replace_fraction": 0.5}, "views"),
        ({"replace_fraction": 1.5}, "0 to 1"),
        ({"replace_fraction": float("nan")}, "0 to 1"),
        ({"seed": -1}, "seed"),
    ],
)
def test_contradictory_settings_are_refused(wrong: dict[str, Any], limit: str) -> None:
    with pytest.raises(InvalidInput, match=limit):
        Recipe("c", **wrong)
