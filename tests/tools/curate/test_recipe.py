"""Recipes: what they take is told before, what came out is compared after."""

import json

import pytest

from tests.conftest import ROOT
from tests.tools.curate.series import body, write_series
from tools.curate.__main__ import main
from tools.curate.recipe import read_recipe

SOURCE = {"name": "a", "path": "in", "volumes": {"ct": 2}, "archive_gb": 120}


def test_the_papers_recipe_has_its_counts():
    recipe = read_recipe(str(ROOT / "examples" / "curate" / "paper.json"), "/archive")
    assert sum(sum(counts.values()) for counts in recipe.volumes.values()) == 4 * 1251 + 888 + 761 + 1287 + 1599 + 475


def test_a_recipe_is_planned_made_and_compared(tmp_path, capsys):
    write_series(tmp_path / "in" / "a", pixels=body(0))
    write_series(tmp_path / "in" / "b", pixels=body(1), patient="P2")
    write_series(tmp_path / "in" / "c", pixels=body(1), patient="P2")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"sources": [SOURCE]}))
    assert main(["plan", str(tmp_path / "set"), str(recipe), "--root", str(tmp_path), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "60" in said and "GB are free" in said  # half of 120 GB
    assert not (tmp_path / "set").exists()
    arguments = [str(tmp_path / "set"), "--recipe", str(recipe), "--root", str(tmp_path), "--workers", "1"]
    assert main(arguments) == 0
    assert "a ct: 3 of 2, 1 of them twins  <- differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"sources": []}, "source 0 needs"), ({"sources": [{**SOURCE, "volumes": {"pet": 1}}]}, "source 0 needs"),
        ({"sources": [SOURCE, SOURCE]}, "two sources are called a"),
        ({"sources": [SOURCE], "rules": {"min_slice": 1}}, "did you mean"),
        ({"sources": [SOURCE]}, "of the recipe does not exist"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_right(tmp_path, capsys, content, sentence):
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "set"), "--recipe", str(tmp_path / "recipe.json"), "--root", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
