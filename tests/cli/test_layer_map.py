"""The map of the layers: kinds, lines for the terminal, and the drawing."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from step35.cli import layer_map
from step35.cli import main as cli
from step35.config.presets import flash, preset

SVG = "{http://www.w3.org/2000/svg}"


def test_kinds_of_flash_cover_each_layer_once() -> None:
    found = layer_map.kinds(flash())
    assert sorted(index for kind in found for index in kind.indices) == list(range(48))
    assert [kind.indices[0] for kind in found] == [0, 1, 3, 4, 43, 44, 45]
    assert [kind.mtp for kind in found] == [False] * 6 + [True]


def test_rows_say_all_that_differs() -> None:
    rows = {row["layers"][0]: row for row in layer_map.rows(flash())}
    assert (rows[0]["attention"], rows[0]["window"], rows[0]["ffn"]) == ("full", "all", "dense 11,264")
    assert rows[3]["heads"] == "96 q, 8 kv x 128"
    assert rows[3]["rope"] == "theta 10,000 on 128 of 128"
    assert rows[4]["rope"] == "theta 5,000,000 on 64 of 128, x2 llama3"
    assert rows[4]["ffn"] == "MoE 8 of 288 x 1,280 + shared 1,280"
    assert (rows[43]["clip"], rows[44]["clip"]) == ("7 routed", "7 routed, 16 shared")
    assert rows[45]["place"] == "MTP"


def test_the_strip_marks_each_layer() -> None:
    lines = dict(line.split(maxsplit=1) for line in layer_map.strip(flash())[:5])
    assert lines["attention"] == ("FSSS" * 12)[:45] + "SSS"
    assert lines["FFN"] == "ddd" + "m" * 42 + "ddd"
    assert lines["clip"] == "." * 43 + "!!..."
    assert lines["MTP"] == "." * 45 + "+++"
    assert sum(line.startswith("attention") for line in layer_map.strip(preset("scale-96"))) == 2


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert layer_map.ranges(numbers) == text


@pytest.mark.parametrize("name", ["tiny", "30b-a3b", "flash", "scale-96"])
def test_the_drawing_has_a_box_a_layer(name: str) -> None:
    config = preset(name)
    root = ElementTree.fromstring(layer_map.svg(config, "a <title> & more"))
    boxes = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "layer"]
    assert len(boxes) == config.total_layers
    assert len({(box.get("x"), box.get("y")) for box in boxes}) == config.total_layers
    assert sum(box.get("stroke-dasharray") is not None for box in boxes) == config.num_nextn_predict_layers
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    texts = list(root.iter(f"{SVG}text"))
    assert texts[0].text == "a <title> & more"
    assert all(0 < float(text.get("y", 0)) < height and 0 < float(text.get("x", 0)) < width for text in texts)


def test_the_command_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "map.svg"
    assert cli.main(["inspect", "tiny", "--layers", "--svg", str(path)]) == 0
    out = capsys.readouterr().out
    assert "attention FSSSFS" in out
    assert "kinds of layers" in out
    assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"
