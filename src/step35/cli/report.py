"""Build `report.html`: one page about a run that opens offline, on light and dark screens and on paper.

It reads what the stages left in the run directory and can be built after any of them: what is missing says
"not run yet". Charts need matplotlib (extra `report`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step35.cli import charts, page
from step35.cli.charts import series
from step35.errors import DataError
from step35.runtime.disk import read_record, write_text
from step35.runtime.metrics import read_metrics

ORDER = ("train", "sft", "rl")
EXPERT_PANELS = (
    ("expert_output", "expert output norm"),
    ("expert_rms", "expert activation RMS"),
    ("expert_down_norm", "expert down-projection norm"),
)
"""The demo's stages; those of a recipe are numbered."""


class Findings:
    """All that a run directory holds; what cannot be read is named in `problems`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.problems: list[str] = []
        self.summary = self._json("summary.json")
        self.evaluation = self._json("eval.json")
        self.prepare = self._json("data/prepare.json")
        self.env = self._json("env.json")
        below = sorted((file.parent.name for file in run.glob("*/metrics.jsonl")), key=_place)
        self.metrics = {stage: self._metrics(stage) for stage in below}
        if own := self._metrics("."):  # a run of one stage keeps its metrics at the top
            self.metrics = {"rl" if _rewarded(own) else "train": own, **self.metrics}
        self.trained = [stage for stage, records in self.metrics.items() if not _rewarded(records)]
        self.reinforced = [stage for stage in self.metrics if stage not in self.trained]
        self.results = {stage: self._json(f"{stage}/done.json") for stage in below}
        self.settings = {
            name: found for name in ("", *below) if (found := self._json(f"{name}/config.json".strip("/")))
        }

    def _json(self, name: str) -> dict[str, Any]:
        path = self.run / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.problems.append(f"{path} cannot be read: {error}")
            return {}
        return value if isinstance(value, dict) else {"": value}

    def _metrics(self, stage: str) -> list[dict[str, Any]]:
        try:
            return read_metrics(self.run / stage / "metrics.jsonl")
        except (DataError, OSError) as error:
            self.problems.append(str(error))
            return []


def _place(stage: str) -> tuple[int, str]:
    number = stage.partition("-")[0]
    return (ORDER.index(stage) if stage in ORDER else int(number) if number.isdigit() else len(ORDER)), stage


def _rewarded(records: list[dict[str, Any]]) -> bool:
    return any("reward" in record for record in records)


def build_report(run: Path) -> Path:
    """Write `run/report.html` and return its path. Raises `Step35Error` without matplotlib."""
    findings = Findings(run)
    body = [page.note(problem) for problem in findings.problems]
    drawn = {title: _panel(panel, findings) for title, panel in PANELS}
    of_recipe = "stages" in read_record(run / "config.json")  # its stages differ: what it has none of is left out
    body += [page.section(title, content) for title, content in drawn.items() if content or not of_recipe]
    path = run / "report.html"
    write_text(path, page.document(f"step35 run {run.absolute().name}", body))
    return path


def _panel(panel: Callable[[Findings], str], findings: Findings) -> str:
    try:
        return panel(findings)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        # A file of an older or a foreign run may have another shape; the other panels still matter.
        return page.note(f"cannot be shown: {type(error).__name__}: {error}")


def _summary(findings: Findings) -> str:
    labels = {
        "val_loss": "validation loss", "unigram_loss": "unigram loss", "bigram_loss": "bigram loss",
        "acc_sft": "accuracy after SFT", "acc_rl": "accuracy after RL", "spec_speedup": "speculative speed",
        "spec_equal": "speculative = plain", "seconds": "seconds in all", "seed": "seed",
    }  # fmt: skip
    found = findings.summary
    return page.tiles((label, page.number(found[key])) for key, label in labels.items() if found.get(key) is not None)


def _loss(findings: Findings) -> str:
    drawings = []
    for stage in findings.trained:
        records = findings.metrics[stage]
        curves = {"loss": series(records, "loss"), "val_loss": series(records, "val_loss")}
        curves |= _by_depth(records)
        names = ("unigram_loss", "bigram_loss") if stage == findings.trained[0] else ()
        levels = {name: level for name in names if isinstance(level := findings.summary.get(name), int | float)}
        drawings += _lines(f"{stage}: loss", curves, levels)
    return page.charts(drawings)


def _optimisation(findings: Findings) -> str:
    keys = {"lr": "learning rate", "grad_norm": "gradient norm", "clip_share": "clipped share"}
    return page.charts(_each(findings, findings.trained, keys))


def _experts(findings: Findings) -> str:
    drawings = []
    for stage in findings.trained:
        records = findings.metrics[stage]
        loads = [record for record in records if record.get("expert_load")]
        if loads:
            title = f"{stage}: expert load at step {loads[-1].get('step')}"
            load = loads[-1]["expert_load"]
            drawings.append(charts.svg(charts.heat_map(title, load, xlabel="expert", ylabel="MoE layer")))
        keys = {"load_cv": "load CV", "dead_experts": "dead experts", "balance_loss": "balance loss"}
        drawings += _each(findings, [stage], keys)
    return page.charts(drawings)


def _expert_health(findings: Findings) -> str:
    drawings = []
    for stage in findings.trained:
        for key, label in EXPERT_PANELS:
            records = [record for record in findings.metrics[stage] if record.get(key)]
            if records:
                steps = [record.get("step", 0) for record in records]
                layers = list(zip(*(record[key] for record in records), strict=True))
                drawings.append(
                    charts.svg(charts.spread(f"{stage}: {label}", steps, layers, ylabel="min, median, max"))
                )
    return page.charts(drawings)


def _rl(findings: Findings) -> str:
    keys = {
        "reward": "reward", "entropy": "entropy", "accept_tokens accept_trajectories": "accepted share",
        "grad_norm": "gradient norm", "ratio_mean ratio_min ratio_max": "train / rollout probability ratio",
        "kl": "KL", "truncation_rate": "truncation rate", "value_loss": "value loss",
        "response_tokens": "response tokens", "tool_errors": "tool errors", "lr": "learning rate",
    }  # fmt: skip
    drawings = _each(findings, findings.reinforced, keys)
    for stage in findings.reinforced:
        drawings += _lines(f"{stage}: loss of the MTP modules", _by_depth(findings.metrics[stage]), {})
    return page.charts(drawings)


def _accuracy(findings: Findings) -> str:
    rows = [
        (
            row.get("model"),
            row.get("mode"),
            row.get("n"),
            row.get("correct"),
            row.get("accuracy"),
            f"{page.number(row.get('low'))} – {page.number(row.get('high'))}",
        )
        for row in findings.evaluation.get("accuracy") or []
    ]
    return page.table(("model", "mode", "problems", "correct", "accuracy", "95% interval"), rows)


def _speculation(findings: Findings) -> str:
    found = findings.evaluation.get("accept_by_depth") or findings.summary.get("accept_by_depth") or {}
    groups = found if isinstance(found, dict) else {"model": found}
    groups = {name: values for name, values in groups.items() if values}
    if not groups:
        return ""
    figure = charts.bars("accepted drafts", groups, xlabel="MTP depth", ylabel="share accepted")
    return page.charts([charts.svg(figure)])


def _stages(findings: Findings) -> str:
    """Show what each stage took and reached, and the probes that a recipe put to the model before and after."""
    rows, drawings = [], []
    for stage, result in findings.results.items():
        if not result:
            continue
        accepted = [", ".join(map(page.number, result.get(f"acceptance_{name}", []))) for name in ("before", "after")]
        packing = [result.get("packing", {}).get(key) for key in ("filled", "cut")]
        figures = [result.get(key) for key in ("steps", "tokens", "seconds", "val_loss")]
        rows.append((stage, *figures, *packing, *accepted))
        for name in ("before", "after"):
            if found := result.get(f"needles_{name}"):
                title = f"{stage}: needles found {name}, by depth (rows: {', '.join(str(r['context']) for r in found)})"
                table = [[math.nan if part is None else part for part in r["by_depth"]] for r in found]
                figure = charts.heat_map(title, table, xlabel="depth, eighths", ylabel="context", limits=(0.0, 1.0))
                drawings.append(charts.svg(figure))
    columns = ("stage", "steps", "tokens", "seconds", "validation loss", "rows filled", "documents cut")
    return page.table((*columns, "acceptance before", "acceptance after"), rows) + page.charts(drawings)


def _speed(findings: Findings) -> str:
    measured = page.table(("measure", "value"), (findings.evaluation.get("speed") or {}).items())
    return measured + page.charts(_each(findings, list(findings.metrics), {"tokens_per_s": "tokens/s"}))


def _transcripts(findings: Findings) -> str:
    return "".join(
        page.fold(
            f"{sample.get('model', '')}: {sample.get('question', '')}",
            page.text(str(sample.get("text", ""))) + page.note(f"expected: {sample.get('answer', '')}"),
            mark="good" if sample.get("correct") else "bad",
        )
        for sample in findings.evaluation.get("transcripts") or []
    )


def _prepare(findings: Findings) -> str:
    return page.fold("prepare.json", page.structure(findings.prepare)) if findings.prepare else ""


def _settings(findings: Findings) -> str:
    env = page.structure(findings.env) if findings.env else ""
    folds = (page.fold(f"{name}/config.json".strip("/"), page.text(v)) for name, v in findings.settings.items())
    return env + "".join(folds)


def _by_depth(records: list[dict[str, Any]]) -> dict[str, charts.Series]:
    """Return the curve of each MTP module's loss."""
    depths = max((len(r["mtp_loss"]) for r in records if isinstance(r.get("mtp_loss"), list)), default=0)
    return {f"mtp_loss {depth + 1}": series(records, "mtp_loss", depth) for depth in range(depths)}


def _each(findings: Findings, stages: list[str], keys: dict[str, str]) -> list[str]:
    """Draw one chart for each stage and entry of `keys`: names of metrics, and what they are called."""
    drawings = []
    for stage in stages:
        for names, label in keys.items():
            curves = {name: series(findings.metrics[stage], name) for name in names.split()}
            drawings += _lines(f"{stage}: {label}", curves, {})
    return drawings


def _lines(title: str, curves: dict[str, charts.Series], levels: dict[str, float]) -> list[str]:
    found = {name: curve for name, curve in curves.items() if curve[0]}
    return [charts.svg(charts.lines(title, found, levels=levels))] if found else []


PANELS: tuple[tuple[str, Callable[[Findings], str]], ...] = (
    ("Summary", _summary),
    ("Stages", _stages),
    ("Loss", _loss),
    ("Optimisation", _optimisation),
    ("Expert load", _experts),
    ("Expert health", _expert_health),
    ("Reinforcement learning", _rl),
    ("Accuracy", _accuracy),
    ("Acceptance by MTP depth", _speculation),
    ("Speed", _speed),
    ("Sample transcripts", _transcripts),
    ("Data", _prepare),
    ("Environment and settings", _settings),
)
