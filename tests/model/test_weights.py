"""Checkpoints in the released layout: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from step35.config.model import ModelConfig
from step35.errors import CheckpointError, ConfigError
from step35.model.layout import released_parts
from step35.model.step35 import Step35
from step35.model.weights import INDEX, load_model, save_model

Make = Callable[..., Step35]
SINGLE = "model-00001-of-00001.safetensors"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_equal_states(ours: Step35, theirs: Step35) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(make_model: Make) -> Step35:
    return make_model()


@pytest.fixture
def folder(model: Step35, tmp_path: Path) -> Path:
    """One file and its index."""
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_fp32_round_trip_is_exact(model: Step35, folder: Path) -> None:
    loaded = load_model(folder)
    assert_equal_states(loaded, model)
    assert loaded.config.model_copy(update={"other_keys": {}}) == model.config
    assert not loaded.training
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SINGLE, INDEX]


def test_released_names_hold_the_rows_of_our_packed_tensors(model: Step35, folder: Path) -> None:
    tensors = read_tensors(folder)
    attention = model.layers[1].attention.qkv_proj.weight
    for name, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        assert torch.equal(tensors[f"model.layers.1.self_attn.{name}_proj.weight"], attention[rows])
    moe = model.layers[1].moe
    assert torch.equal(tensors["model.layers.1.moe.gate_proj.weight"], moe.experts.gate_up_proj[:, :16])
    assert torch.equal(tensors["model.layers.1.moe.up_proj.weight"], moe.experts.gate_up_proj[:, 16:])
    assert torch.equal(tensors["model.layers.1.share_expert.up_proj.weight"], moe.shared.gate_up_proj.weight[24:])
    assert torch.equal(tensors["model.layers.1.moe.router_bias"], moe.router.bias)
    assert torch.equal(tensors["model.layers.6.transformer.shared_head.output.weight"], model.mtp[1].head.weight)
    assert torch.equal(tensors["model.layers.6.eh_proj.weight"], model.mtp[1].joint_proj.weight)


@pytest.mark.parametrize(("name", "dtype"), [("tiny-a", "float32"), ("tiny-b", "bfloat16")])
def test_a_foreign_checkpoint_is_written_back_tensor_for_tensor(
    name: str, dtype: str, golden: Path, tmp_path: Path
) -> None:
    save_model(load_model(golden / name), tmp_path, dtype=dtype)
    expected, ours = read_tensors(golden / name), read_tensors(tmp_path)
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_a_foreign_config_is_written_back_key_for_key(name: str, golden: Path, tmp_path: Path) -> None:
    before = json.loads((golden / name / "config.json").read_text())
    save_model(load_model(golden / name), tmp_path, dtype=before["torch_dtype"])
    after = json.loads((tmp_path / "config.json").read_text())
    assert {key: after.get(key) for key in before} == before


def test_unknown_config_keys_are_written_back_unchanged(folder: Path, tmp_path: Path) -> None:
    unknown = {"max_seq_len": 4096, "a_key_of_tomorrow": {"nested": [1, None, "x"]}}
    change_config(folder, **unknown)
    save_model(load_model(folder), tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written[key] for key in unknown} == unknown


def test_bf16_rounds_everything_but_the_router(model: Step35, tmp_path: Path) -> None:
    save_model(model, tmp_path, dtype="bfloat16")
    written, loaded = read_tensors(tmp_path), load_model(tmp_path, dtype="bfloat16")
    kept = [name for name, tensor in written.items() if tensor.dtype == torch.float32]
    endings = ("moe.gate.weight", "moe.router_bias")
    assert sorted(kept) == sorted(f"model.layers.{i}.{end}" for i in (1, 2, 3, 4) for end in endings)
    for name, tensor in model.state_dict().items():
        expected = tensor if "router." in name else tensor.bfloat16()
        assert loaded.state_dict()[name].dtype == expected.dtype, name
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_bf16_checkpoint_loads_as_fp32_by_default(model: Step35, tmp_path: Path) -> None:
    save_model(model, tmp_path, dtype="bfloat16")
    loaded = load_model(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16().float())


def test_shards_keep_to_their_size_and_the_index_finds_every_tensor(model: Step35, tmp_path: Path) -> None:
    save_model(model, tmp_path, shard_bytes=30_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 5
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    sizes = []
    for file in files:
        tensors = load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert max(sizes) <= 30_000
    assert all(one + next_one > 30_000 for one, next_one in pairwise(sizes))  # none is opened before it must be
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"].keys() == read_tensors(tmp_path).keys()
    assert_equal_states(load_model(tmp_path), model)


def test_files_say_that_they_are_pytorch(folder: Path) -> None:
    with safe_open(folder / SINGLE, framework="pt") as file:  # other loaders refuse files without it
        assert file.metadata() == {"format": "pt"}


def test_a_single_file_needs_no_index(model: Step35, folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SINGLE).rename(folder / "model.safetensors")
    assert_equal_states(load_model(folder), model)


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint folder.*config\.json"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_model(folder)


def test_an_absent_shard_is_named(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=SINGLE):
        load_model(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.9])
def test_a_truncated_file_is_named_with_its_size(folder: Path, share: float) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"{SINGLE} cannot be read.*{int(len(content) * share)} bytes"):
        load_model(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_missing_unexpected_and_misshapen_tensors_are_named_at_once(folder: Path, indexed: bool) -> None:
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    tensors["model.layers.9.extra.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(97, 31)
    save_file(tensors, folder / SINGLE)
    if indexed:
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE)}))
    else:
        (folder / INDEX).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "missing: model.layers.2.self_attn.k_proj.weight" in message
    assert "unexpected: model.layers.9.extra.weight" in message
    assert "misshapen: lm_head.weight is [97, 31], config.json asks [97, 32]" in message


def test_a_long_list_of_problems_is_cut(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(97, 32)}, folder / SINGLE)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load_model(folder)


def test_a_tensor_that_only_the_index_has_is_missing(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        load_model(folder)


def test_heads_that_do_not_divide_are_refused_with_key_value_and_remedy(folder: Path) -> None:
    change_config(folder, num_attention_heads=5)
    with pytest.raises(ConfigError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "num_attention_heads=5" in message
    assert "num_attention_groups=2" in message
    assert "choose groups from [1, 5]" in message


def test_an_unknown_dtype_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dtype='float8'.*float32, bfloat16, float16"):
        load_model(folder, dtype="float8")


def test_a_config_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        load_model(folder)


def test_weights_are_published_by_rename(
    model: Step35, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A write that dies half-way must leave the file under its final name as it was.
    before = (folder / SINGLE).read_bytes()

    def dies(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr("step35.model.weights.save_file", dies)
    with pytest.raises(RuntimeError, match="killed"):
        save_model(model, folder)
    assert (folder / SINGLE).read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_the_saved_config_reads_back(model: Step35, folder: Path) -> None:
    assert ModelConfig.read(folder).model_copy(update={"other_keys": {}}) == model.config


def test_every_truncated_and_absent_file_is_named_at_once(model: Step35, tmp_path: Path) -> None:
    save_model(model, tmp_path, shard_bytes=30_000)
    first, second, third = sorted(tmp_path.glob("*.safetensors"))[:3]
    first.write_bytes(first.read_bytes()[:100])
    third.write_bytes(third.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert f"truncated or damaged: {first.name}" in message
    assert f"absent: {second.name}" in message
    assert f"truncated or damaged: {third.name}" in message
    assert "missing" not in message


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_mtp_modules_may_be_left_out(modules: int, model: Step35, folder: Path) -> None:
    loaded = load_model(folder, mtp=modules)
    assert loaded.config.num_nextn_predict_layers == len(loaded.mtp) == modules
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_checkpoint_without_its_mtp_tensors_loads_as_trunk(model: Step35, folder: Path) -> None:
    kept = {name: t for name, t in load_file(folder / SINGLE).items() if not name.startswith("model.layers.5.")}
    save_file(kept, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.5\.eh_proj"):
        load_model(folder)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(load_model(folder, mtp=0)(tokens).logits, model.eval()(tokens).logits)


def test_more_modules_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mtp=3 is not in 0\.\.2"):
        load_model(folder, mtp=3)


def test_a_truncated_file_without_index_is_the_only_problem_named(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert "truncated or damaged" in str(caught.value)
    assert "missing" not in str(caught.value)


def test_numbers_that_are_no_floats_are_refused(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"] * 100).to(torch.int8)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as I8; only F64, F32, BF16, F16"):
        load_model(folder)


def test_what_a_dtype_cannot_hold_is_refused(model: Step35, tmp_path: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has 1e\+05, beyond float16's 65504"):
        save_model(model, tmp_path, dtype="float16")
    with torch.no_grad():
        model.layers[1].moe.experts.down_proj[0, 0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="infinite or not a number"):
        save_model(model, tmp_path, dtype="float8")


def test_only_mtp_tensors_missing_names_the_remedy(folder: Path) -> None:
    save_file({n: t for n, t in load_file(folder / SINGLE).items() if ".6." not in n}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"load with mtp=0 \(--mtp 0\)"):
        load_model(folder)


LOAD_AND_WATCH = """
import sys, threading
from step35.model.weights import load_model

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.0005):
        seen.append(anonymous())

load_model(sys.argv[1], dtype=sys.argv[3])  # what code and buffers take
seen, done, before = [], threading.Event(), anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[2], dtype=sys.argv[3])
done.set()
thread.join()
print(max(seen) - before)
"""
"""Prints the most memory that a load took, file pages (which the system drops at will) not counted."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float32"), ("float32", "bfloat16"), ("float8", "bfloat16")])
def test_loading_needs_the_model_and_one_tensor(
    stored: str, dtype: str, make_model: Make, folder: Path, tmp_path: Path
) -> None:
    big = make_model(hidden_size=512, vocab_size=8192, moe_num_experts=32, moe_intermediate_size=256, mtp=1)
    save_model(big, tmp_path / "big", dtype=stored, shard_bytes=2**24)
    size = sum(p.numel() for p in big.parameters()) * getattr(torch, dtype).itemsize
    largest = 4 * max(math.prod(part.shape) for _, part in released_parts(big.config))
    arguments = [str(folder), str(tmp_path / "big"), dtype]
    run = subprocess.run([sys.executable, "-c", LOAD_AND_WATCH, *arguments], capture_output=True, check=True)
    assert size > 4 * largest
    assert 0.9 * size < int(run.stdout) < size + largest
