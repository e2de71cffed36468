"""`inspect`: presets and folders, tables and JSON, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from step35.cli import doctor
from step35.cli import main as cli
from step35.cli.shipped import SHIPPED
from step35.model.weights import load_model


def test_a_preset_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "flash", "--context", "1000", "2000"]) == 0
    shown = capsys.readouterr().out
    for figure in ("196,956,130,368", "10,931,407,936", "routed experts", " 1,000 ", " 2,000 "):
        assert figure in shown
    assert "32,768" not in shown


def test_a_checkpoint_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(SHIPPED), "--context", "64", "--weights", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    held = sum(tensor.numel() for tensor in load_model(SHIPPED).state_dict().values())
    assert found["total"] == held == sum(part["total"] for part in found["parts"])
    assert found["weight_bytes"] == 4 * held
    assert [c["context"] for c in found["costs"]] == [64]


def test_what_is_neither_preset_nor_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["inspect", "flsh"]) == 2
    assert "neither a preset" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "is not a checkpoint folder" in capsys.readouterr().err


def test_json_needs_no_torch() -> None:
    code = (
        "import sys; from step35.cli import main; main.main(['inspect', 'flash', '--json']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what `step35 inspect` prints for `words`."""
    assert cli.main(["inspect", *words]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["inspect", *words]) == 2
    return capsys.readouterr().err


def test_layouts_show_ours_and_the_reports(capsys: pytest.CaptureFixture[str]) -> None:
    table = shown(capsys, "--layouts")
    for words in (
        "S3F1+heads",
        "FFFF",
        "30b-a3b",
        "256k",
        "2.089",
        "2.07",
        "+0.9%",
        "2.530",
        "a fit, not the report's",
    ):
        assert words in table
    found = json.loads(shown(capsys, "--layouts", "--json"))["layouts"]
    assert len(found) == 12
    assert all(abs(entry[f"{phase}_deviation"]) < 0.03 for entry in found for phase in ("prefill", "decode"))
    assert {entry["decode_plain"] > entry["decode"] for entry in found} == {True}


def test_decoding_speed_on_named_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("flash", "--hardware", "h800", "--batch", "1", "32", "--context", "4096", "262144")
    table = shown(capsys, *words)
    for part in ("8 x h800", "3.35 TB/s", "no room", "weights", "claimed", "100-350", "bound above 350", "3.12 tokens"):
        assert part in table
    found = json.loads(shown(capsys, *words, "--json"))["speed"]
    assert [(row["batch"], row["context"]) for row in found["rows"]] == [
        (1, 4096),
        (1, 262144),
        (32, 4096),
        (32, 262144),
    ]
    assert [row["mtp"]["fits"] for row in found["rows"]] == [True, True, True, False]
    assert found["rows"][0]["mtp"]["sequence"] > found["rows"][0]["plain"]["sequence"]
    assert "batch 1 at 4,096 to 262,144" in found["claim"]["bound above 350, so the claim is a part of it"]


def test_only_flash_on_hopper_is_compared_to_the_claim(capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--batch", "1", "--context", "64")
    assert "claimed" not in shown(capsys, "flash", "--hardware", "b200", *short)
    assert "no MTP" in (other := shown(capsys, "30b-a3b", "--hardware", "h100", *short))
    assert "claimed" not in other


def test_this_machine_from_given_figures(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--flops", "1e12", "--bandwidth", "1e10", "--batch", "1", "--context", "64", "--json")
    found = json.loads(shown(capsys, "tiny", "--hardware", "cpu", *given))["speed"]
    assert (found["gpus"], found["hardware"]["bandwidth"]) == (1, 1e10)
    read = json.loads(shown(capsys, "tiny", "--context", "64", "--json"))["costs"][0]["read_bytes"]
    assert found["rows"][0]["plain"]["step_s"] == pytest.approx(read / 1e10)


def test_this_machine_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor, "PRODUCT_SECONDS", 1e-6)
    monkeypatch.setattr(doctor, "READ_BYTES", 2**20)
    found = json.loads(shown(capsys, "tiny", "--hardware", "cpu", "--batch", "1", "--json"))["speed"]
    assert 1e6 < found["hardware"]["flops"]["bfloat16"] < 1e18
    assert found["rows"][0]["plain"]["sequence"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("flash", "--hardware", "h10"), "Did you mean 'h100'?"),
        (("flash", "--gpus", "4"), "--gpus has no effect without --hardware"),
        (("flash", "--acceptance", "0.9", "--batch", "2"), "--acceptance, --batch has no effect"),
        (("flash", "--hardware", "h100", "--gpus", "2"), "give --gpus 5 or more"),
        (("flash", "--hardware", "h100", "--layouts"), "hardware would change nothing"),
        (("mini", "--hardware", "h100", "--acceptance", "0.9", "0.8"), "has 1 MTP modules"),
        (("flash", "--svg", "/no/such/folder/map.svg"), "cannot be written"),
        (("scale-2",), "the dial takes 4 to 96 trunk layers"),
    ],
)
def test_refusals(words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refusal(capsys, *words)


def test_the_scale_dial_names_its_laws(capsys: pytest.CaptureFixture[str]) -> None:
    table = shown(capsys, "scale-12")
    for words in ("1,125,352,256", "scale-12: the laws", "2203.15556", "2401.02954", "step35 train --preset scale-12"):
        assert words in table
    found = json.loads(shown(capsys, "scale-45", "--json"))
    assert found["trunk"] == 196_956_130_368
    assert found["training"]["tokens"] == 20 * found["active"]
    assert found["laws"]["tokens"]["source"]
    assert "extrapolate" in shown(capsys, "scale-45")


def test_the_dials_models_train_like_presets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(shown(capsys, "scale-4", "--json"))
    assert cli.main(["train", "--preset", "scale-4", "--dry-run", "--data", str(tmp_path)]) == 0
    moe_layers, experts = 3, 32
    assert f"{found['total'] - moe_layers * experts:,}" in capsys.readouterr().out  # router biases have no gradient
