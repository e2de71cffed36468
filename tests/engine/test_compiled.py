"""The compiled passes against the same passes in torch, and against themselves with other rows beside."""

from __future__ import annotations

import copy
import itertools
import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from step35.api.sampling import SamplingParams
from step35.config.model import RopeScaling
from step35.config.presets import preset
from step35.engine import runner
from step35.engine.blocks import BLOCK_TOKENS
from step35.engine.compiled import program
from step35.engine.compiled.program import Program
from step35.engine.engine import Engine
from step35.engine.int8 import quantise
from step35.engine.request import Request
from step35.engine.runner import Runner
from step35.engine.scheduler import Rows
from step35.engine.speculative import DepthControl
from step35.model.init import initialise
from step35.model.step35 import Step35
from step35.runtime import compiled as library

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def tiny() -> Step35:
    model = Step35(preset("tiny").with_mtp(3)).eval()
    initialise(model, torch.Generator().manual_seed(0))
    return model


def engine(model: Step35, *, compiled: bool, **options: int) -> Engine:
    made = Engine(model, (), max_batch=8, max_context=256, **options)
    assert made.runner.program is not None
    if not compiled:
        made.runner.program = None
    return made


def start(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Request]:
    """Return requests that hold blocks for their whole prompts and some tokens more."""
    requests = engine.create(prompts, SamplingParams(max_tokens=8, speculate=len(engine.model.mtp)))
    for request in requests:
        assert engine.cache.reserve(request, request.length + 8)
    return requests


def rows(requests: Sequence[Request], begin: int, end: int | None = None) -> list[Rows]:
    return [Rows(r, begin, (end or r.length) - begin) for r in requests]


PROMPTS = [[(7 * i) % 24 + 4 for i in range(n)] for n in (30, 21, 9)]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def run_all(runner: Runner, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """Run everything once in two chunks, so that the second reads what the first has stored."""
    results = {}
    for name, part in (("first", rows(requests, 0, 7)), ("second", rows(requests, 7))):
        results[f"trunk {name}"] = runner.run(part)[0]
    scores = runner.logits(results["trunk second"])
    assert scores.best == scores.logits_NV.argmax(-1).tolist()
    results["logits"], results["likeliest"] = scores.logits_NV, torch.tensor(scores.best_logprobs)
    assert torch.allclose(scores.logits_NV.log_softmax(-1).amax(-1), results["likeliest"], rtol=1e-5, atol=1e-6)
    for k in range(len(runner.model.mtp)):
        results[f"module {k}"] = runner.module(k, rows(requests, k + 1))
    return results


@torch.inference_mode()
@pytest.mark.parametrize(
    ("weights", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-5), ("int8", 1e-5), ("bfloat16 cache", 4e-3)]
)
@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_compiled_passes_equal_those_in_torch(
    tiny: Step35, build_model: Callable[..., Step35], name: str, weights: str, tolerance: float
) -> None:
    """In fp32 on stored weights of any type, to fp32's rounding. In bf16, compiled passes round what they cache alone,
    and stay nearer to fp32 than passes in torch, which round everything: those differ by 5e-2 and more here.
    """
    model = copy.deepcopy(tiny) if name == "tiny" else build_model(seed=3)
    if weights == "int8":
        model = quantise(model)
    elif weights.startswith("bfloat16"):
        model = model.to(torch.bfloat16)
    results = []
    for compiled in (True, False):
        rounded_cache = compiled and weights == "bfloat16 cache"
        model.compute_dtype = torch.bfloat16 if rounded_cache else torch.float32
        made = engine(model, compiled=compiled)
        results.append(run_all(made.runner, start(made, PROMPTS)))
    for key, value in results[0].items():
        assert difference(value, results[1][key]) < tolerance, key


@torch.inference_mode()
def test_the_last_positions_of_262144_with_the_release_s_rope_scaling(build_model: Callable[..., Step35]) -> None:
    far = 262_144
    model = build_model(seed=3, max_position_embeddings=far, rope_scaling=RopeScaling(), theta_full=5e6)
    results = []
    for compiled in (True, False):
        made = Engine(model, (), max_batch=1, max_context=far)
        made.runner.program = made.runner.program if compiled else None
        [request] = made.create([[5] * (far - 8)], SamplingParams(max_tokens=7))
        request.full = array("i", range(far // BLOCK_TOKENS))
        request.window = array("i", [block % 4 for block in range(far // BLOCK_TOKENS)])  # a window spans two or three
        results.append([made.runner.run(rows([request], begin, begin + 5))[0] for begin in (far - 20, far - 15)])
    for compiled_ND, torch_ND in zip(*results, strict=True):
        assert difference(compiled_ND, torch_ND) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_with_any_rows_beside_it(tiny: Step35, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny).to(dtype)
    prompts = [list(range(9, 25)) for _ in range(7)]
    together, alone = engine(model, compiled=True), engine(model, compiled=True)
    requests = start(together, prompts)
    h_ND = together.runner.run(rows(requests, 0))[0]
    logits_NV = together.runner.logits(h_ND).logits_NV
    [single] = start(alone, prompts[:1])
    for position in range(16):
        h_1D = alone.runner.run(rows([single], position, position + 1))[0]
        for n in range(7):
            assert torch.equal(h_ND[16 * n + position], h_1D[0])
        assert torch.equal(alone.runner.logits(h_1D).logits_NV[0], logits_NV[position])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_rows_that_read_keys_together_are_the_same_bits_as_rows_alone(
    tiny: Step35, build_model: Callable[..., Step35], name: str, dtype: torch.dtype
) -> None:
    """Across the ends of chunks of 128 keys; windows (64 and 8) begin in another chunk than those of rows before."""
    model = (copy.deepcopy(tiny) if name == "tiny" else build_model(seed=3, max_position_embeddings=512)).to(dtype)
    prompts = [[(11 * i + n) % 24 + 4 for i in range(300 - n)] for n in range(2)]
    results = []
    for step in (1, 2, 5, 32):
        made = Engine(model, (), max_batch=8, max_context=512)
        requests = start(made, prompts)
        results.append(run_in_steps(made.runner, requests, [*range(0, 130, 2), *range(130, 290, step), 290]))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    if dtype == torch.float32:  # in bf16, what the cache rounds may change an expert
        made = Engine(model, (), max_batch=8, max_context=512)
        made.runner.program = None
        assert difference(results[0], run_in_steps(made.runner, start(made, prompts), [0, 290])) < 1e-5


def run_in_steps(runner: Runner, requests: Sequence[Request], ends: Sequence[int]) -> torch.Tensor:
    """Return the trunk's output (requests, positions, D), run from each end to the next."""
    parts = [
        runner.run(rows(requests, begin, end))[0].view(len(requests), end - begin, -1)
        for begin, end in itertools.pairwise(ends)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("quantised", [False, True])
def test_speculation_changes_no_bit_in_bfloat16(tiny: Step35, quantised: bool) -> None:
    model = copy.deepcopy(tiny).to(torch.bfloat16)
    model = quantise(model) if quantised else model
    outputs = []
    for speculate in range(4):
        made = engine(model, compiled=True)
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, speculate=speculate)
        outputs.append(made.generate(made.create(PROMPTS, params)))
    for others in outputs[1:]:
        assert [(c.token_ids, c.raw_logprobs) for c in others] == [(c.token_ids, c.raw_logprobs) for c in outputs[0]]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_modules_that_lag_leave_the_trunk_compiled(tiny: Step35, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """With adaptive depth, modules that are left out fall behind by more rows than run compiled at a time."""
    monkeypatch.setattr(runner, "FEW_ROWS", 8)
    monkeypatch.setattr(DepthControl, "choose", lambda self, requests, most: min(depth, most))
    outputs = []
    for speculate in (0, 3):
        made = Engine(tiny, (), max_batch=8, max_context=256, adaptive_depth=True)
        params = SamplingParams(max_tokens=100, temperature=0.0, speculate=speculate)
        requests = made.create(PROMPTS[2:], params)
        with monkeypatch.context() as patched:
            for pass_number, _ in enumerate(made.run(requests)):
                if not pass_number:  # the prompt has run, in torch
                    patched.setattr(Runner, "_run", None)
        outputs.append([(c.token_ids, c.raw_logprobs) for c in (r.completion() for r in requests)])
    assert outputs[0] == outputs[1]


def test_int8_drafts_in_torch_are_those_of_the_compiled_passes(tiny: Step35) -> None:
    model, outputs = quantise(copy.deepcopy(tiny)), []
    for compiled in (True, False):
        made = engine(model, compiled=compiled)
        [request] = made.create(PROMPTS[:1], SamplingParams(max_tokens=8, temperature=0.0, speculate=3))
        made.add(request)
        while not request.decoding:
            made.step()
        assert made.cache.reserve(request, request.length + 4)
        with torch.inference_mode():
            made.runner.run([Rows(request, request.computed, 1, depth=3)])
        outputs.append((request.tokens, request.drafts))
    assert outputs[0] == outputs[1]


def test_two_threads_give_the_bits_of_one(tiny: Step35) -> None:
    threads, outputs = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        made = engine(tiny, compiled=True)
        outputs.append(made.generate(made.create(PROMPTS, SamplingParams(max_tokens=12, speculate=3, temperature=0.0))))
    torch.set_num_threads(threads)
    assert outputs[0] == outputs[1] == outputs[2]


def test_new_weights_reach_the_compiled_passes(build_model: Callable[..., Step35]) -> None:
    for change in (lambda m: m, quantise):
        made, fresh = (engine(change(build_model(seed)), compiled=True) for seed in (1, 2))
        made.update_weights(build_model(2).state_dict(), version=1)
        params = SamplingParams(max_tokens=8, temperature=0.0)
        tokens = [e.generate(e.create([[5, 6, 7]], params))[0].token_ids for e in (made, fresh)]
        assert tokens[0] == tokens[1]


def test_int8_rounds_each_row_to_a_254th_of_its_largest_value(tiny: Step35) -> None:
    model = quantise(copy.deepcopy(tiny))
    for block, plain in zip(model.layers, tiny.layers, strict=True):
        pairs = [(block.attention.qkv_proj.weight, block.attention.qkv_proj.scales, plain.attention.qkv_proj.weight)]
        if plain.moe:
            pairs.append((block.moe.experts.down_proj, block.moe.experts.down_scales, plain.moe.experts.down_proj))
        for integers, scales, weight in pairs:
            error = (integers * scales[..., None] - weight).abs().amax(-1)
            assert bool((error <= weight.abs().amax(-1) / 254 * 1.001).all())
    state = model.state_dict()
    assert sum(t.nbytes for t in state.values()) < 0.5 * sum(t.nbytes for t in tiny.state_dict().values())


def test_without_a_compiler_decoding_runs_in_torch(
    tiny: Step35, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    monkeypatch.setattr(program, "load_library", library.load_library.__wrapped__)
    with caplog.at_level(logging.WARNING):
        made = Engine(tiny, (), max_batch=1, max_context=64)
    assert made.runner.program is None
    assert "no C++ compiler" in caplog.text
    assert made.generate(made.create([[5, 6]], SamplingParams(max_tokens=3)))


def test_a_build_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "FLAGS", ("-no-such-flag",))
    with caplog.at_level(logging.WARNING):
        assert library.load_library.__wrapped__(program.SOURCE, "decoding") is None
    assert "no-such-flag" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_build_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = library.find_compiler()
    assert compiler is not None
    built = library.build(compiler, program.SOURCE)
    stamp = built.stat().st_mtime_ns
    assert library.build(compiler, program.SOURCE) == built
    assert built.stat().st_mtime_ns == stamp
    assert built.parent == tmp_path / "step35"


def test_a_model_that_has_blown_up_still_gives_tokens(build_model: Callable[..., Step35]) -> None:
    model = build_model(seed=5)
    with torch.no_grad():
        model.layers[2].ffn_norm.weight[3] = float("nan")
    made = engine(model, compiled=True)
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=6, temperature=temperature, speculate=3)
        [completion] = made.generate(made.create([[5, 6, 7]], params))
        assert all(0 <= token < model.config.vocab_size for token in completion.token_ids)


def test_models_that_do_not_fit_run_in_torch(tiny: Step35) -> None:
    made = engine(copy.deepcopy(tiny), compiled=False)
    assert program.fits(made.model, made.cache)
    assert not program.fits(made.model.to(torch.float16), made.cache)
    assert Program.create(made.model, made.cache, made.model.config.vocab_size) is None


@torch.inference_mode()
def test_rows_far_away_run_in_torch_beside_compiled_ones(tiny: Step35, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `FAR` only few rows run compiled; each request still gets its own rows back."""
    monkeypatch.setattr(runner, "FEW_ROWS", 16)
    monkeypatch.setattr(runner, "FAR", 12)
    made = engine(tiny, compiled=True)
    assert made.runner.few_rows == 16
    requests = start(made, PROMPTS)
    parts = [Rows(requests[0], 0, 10), Rows(requests[1], 0, 20), Rows(requests[2], 0, 9)]
    ordered = made.runner.in_order(parts)
    assert [r.count for r in ordered] == [9, 10, 20]
    h_ND = made.runner.run(ordered)[0]
    expected = engine(tiny, compiled=False)
    for rows_of_one, h in zip(ordered, h_ND.split([r.count for r in ordered]), strict=True):
        [alone] = start(expected, [rows_of_one.request.prompt])
        assert difference(h, expected.runner.run([Rows(alone, 0, rows_of_one.count)])[0]) < 1e-5
