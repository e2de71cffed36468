"""Alarms: rules over the monitors' figures, with causes and remedies, raised once for each cause (section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from step35.config.stability import AlarmConfig, StabilityConfig

CLEAR = 0.8
"""An alarm is over when the value is back inside this share of its limit: a value on the limit must not flicker."""


@dataclass(frozen=True)
class Rule:
    """When an alarm holds: `metric` beyond the limit."""

    name: str
    metric: str
    side: Literal["above", "below"]
    after_update: bool
    cause: str
    remedy: str


def _rule(name: str, metric: str, cause: str, remedy: str, side: Literal["above", "below"] = "above",
          after_update: bool = False) -> Rule:  # fmt: skip
    return Rule(name, metric, side, after_update, cause, remedy)


RULES = (
    _rule(
        "non_finite", "non_finite",
        "The loss or a gradient is NaN or infinite: a broken batch, an overflow, or a weight that is broken already.",
        "Set stability.non_finite.action = skip for single batches; lower lr if it comes back.",
    ),
    _rule(
        "non_finite", "non_finite_parameters",
        "The update left a parameter NaN or infinite.",
        "Set stability.non_finite.action = rollback; use optim.iteration_dtype = float16 or float32.",
        after_update=True,
    ),
    _rule(
        "loss_spike", "loss_z",
        "The loss is far above its recent mean: an odd batch, or weights that an earlier update damaged.",
        "Look at the rows of this step; action = skip drops such batches, rollback undoes the damage; lower lr.",
    ),
    _rule(
        "gradient_spike", "grad_norm_ratio",
        "The gradient is far longer than of late: an odd batch, or the onset of divergence.",
        "grad_norm.CLASS names the part. action = skip drops such batches; lower lr or lengthen warm-up.",
    ),
    _rule(
        "expert_blow_up", "expert_output_max_ratio",
        "One expert's output grows away from the others: a frequent bi-gram has an expert of its own, whose gate and "
        "up projection align. The loss does not show it.",
        "Clip activations in that layer (swiglu_limits); clipping weights (step35 clip) only delays it.",
    ),
    _rule(
        "expert_collapse", "expert_rms_min_ratio",
        "An expert's activations die away while it is still routed to: no explicit scale between shared and routed "
        "experts, or a balance loss that is too tight on micro-batches.",
        "Set moe_router_scaling_factor above 1, lower ep_weight, balance by the loss-free bias.",
        side="below",
    ),
    _rule(
        "dead_experts", "dead_share",
        "Experts get no tokens.",
        "Raise balance_rate; check that the router is not frozen at a bad start; use larger batches.",
    ),
    _rule(
        "load_imbalance", "load_imbalance",
        "A layer sends most tokens to few experts.",
        "Raise balance_rate or ep_weight; look for repetitive data.",
    ),
    _rule(
        "attention_logits", "attention_logit_max",
        "Attention logits are so large that the softmax saturates.",
        "Lower lr; look at the QK-norm weights (attention_logit_bound).",
    ),
    _rule(
        "bias_drift", "bias_spread",
        "The selection bias outweighs the router's probabilities, which lie between 0 and 1.",
        "Lower balance_rate (or let it fall: final_balance_rate); the router itself must learn to balance: ep_weight.",
    ),
    _rule(
        "muon_outlier", "muon_rms",
        "A matrix has larger singular values than orthogonalisation leaves: an outlier of Polar Express.",
        "Use optim.iteration_dtype = float16 (bfloat16 produces such outliers); action = rollback undoes it.",
        after_update=True,
    ),
    _rule(
        "update_rms", "update_rms",
        "An update is larger than its optimiser can make it.",
        "Look for a parameter that was changed from outside; action = rollback undoes it.",
        after_update=True,
    ),
)  # fmt: skip

BAD_DATA = _rule(
    "bad_data", "",
    "Rows cannot be read, or hold tokens that the vocabulary has not.",
    "Make the data again; stability.bad_data.action = skip leaves such rows out.",
)  # fmt: skip


@dataclass(frozen=True)
class Alarm:
    """One alarm as events.jsonl has it."""

    alarm: str
    step: int
    value: float
    limit: float
    where: str
    cause: str
    remedy: str
    action: str

    def record(self) -> dict[str, Any]:
        """Return the event's fields."""
        return asdict(self)

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return (
            f"step {self.step}: {self.alarm}: {self.value:.4g}, limit {self.limit:g}{where}. {self.cause} {self.remedy}"
        )


class Alarms:
    """The rules' memory: which alarms stand, and for how long a value has been beyond its limit."""

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self.raised: dict[str, bool] = {}
        self.beyond: dict[str, int] = {}

    def judge(
        self, figures: Mapping[str, float], places: Mapping[str, str], step: int, *, after_update: bool
    ) -> tuple[list[Alarm], list[Alarm]]:
        """Return the alarms that hold now, and those of them that did not stand before (these are to be told)."""
        holding, new = [], []
        for rule in RULES:
            config: AlarmConfig = getattr(self.config, rule.name)
            if rule.after_update != after_update or config.action == "off" or rule.metric not in figures:
                continue
            value = figures[rule.metric]
            if self._holds(rule, config, value):
                where = places.get(rule.metric, "")
                alarm = Alarm(rule.name, step, value, config.limit, where, rule.cause, rule.remedy, config.action)
                holding.append(alarm)
                if not self.raised.get(rule.metric):
                    new.append(alarm)
                self.raised[rule.metric] = True
            elif _inside(rule, value, config.limit):
                self.raised[rule.metric] = False
        return holding, new

    def _holds(self, rule: Rule, config: AlarmConfig, value: float) -> bool:
        beyond = value > config.limit if rule.side == "above" else value < config.limit
        beyond = beyond and math.isfinite(value)  # what is not finite is non_finite's to tell
        self.beyond[rule.metric] = self.beyond.get(rule.metric, 0) + 1 if beyond else 0
        return self.beyond[rule.metric] >= config.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain values."""
        return {"raised": dict(self.raised), "beyond": dict(self.beyond)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved memory."""
        self.raised, self.beyond = dict(state["raised"]), dict(state["beyond"])


def severest(alarms: Sequence[Alarm]) -> Alarm | None:
    """Return the alarm whose action goes furthest; None when none of them acts."""
    order = ("skip", "rollback", "stop")
    acting = [alarm for alarm in alarms if alarm.action in order]
    return max(acting, key=lambda alarm: order.index(alarm.action), default=None)


def _inside(rule: Rule, value: float, limit: float) -> bool:
    return value <= CLEAR * limit if rule.side == "above" else value >= limit / CLEAR
