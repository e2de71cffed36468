"""The monitors of one run: observe every micro-batch, measure every update, raise alarms.

Nothing here changes a weight: with monitors on or off the losses are the same, bit for bit.
"""

# B rows  T tokens  E experts

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from step35.config.train import TrainConfig
from step35.model.context import Routing
from step35.model.step35 import Step35
from step35.train.monitors.alarms import Alarm, Alarms
from step35.train.monitors.attention import logit_bound
from step35.train.monitors.matrices import UpdateSample, by_class, expert_norms, norms
from step35.train.monitors.measure import Measure
from step35.train.monitors.observation import Observation
from step35.train.monitors.running import Running
from step35.train.muon import Muon

MEASURES = (
    Measure(
        "loss_z",
        "(loss - m) / s, m and s the running mean and standard deviation over `stability.window` steps before it, s at "
        "least 1% of m; 0 in the first 20 steps",
        "-3 to 4",
        "see loss_spike",
    ),
    Measure(
        "non_finite",
        "number of micro-batches whose loss, and of parameters whose gradient, is NaN or infinite",
        "0",
        "see non_finite",
    ),
    Measure(
        "non_finite_parameters", "number of parameters that hold NaN or infinity after the update", "0", "as above"
    ),
    Measure(
        "bias_spread",
        "max - min over experts of the router's selection bias, worst layer",
        "below 0.5: probabilities lie between 0 and 1",
        "lower `balance_rate`, let it fall to 0 (`final_balance_rate`)",
    ),
    Measure(
        "router_bias", "panel: the selection bias less its mean over the layer's experts", "within 0.25", "as above"
    ),
    Measure(
        "micro.KEY",
        "with `stability.per_micro_batch`: the loss and all expert and attention figures of each micro-batch, as lists",
        "alike",
        "one that differs names the data",
    ),
)


class Monitor:
    """Figures of the step at hand, and what is remembered from step to step."""

    def __init__(
        self, model: Step35, config: TrainConfig, trained: Mapping[str, Tensor], muon: Muon | None = None
    ) -> None:
        """`trained` are the weights that the optimisers update."""
        self.model, self.config, self.muon = model, config.stability, muon
        self.trained = {name: tensor.detach() for name, tensor in trained.items()}
        experts = model.config.moe_num_experts
        self.groups = config.ep_groups if experts and experts % config.ep_groups == 0 else 1
        top_k = model.config.moe_top_k
        self.worst_cv = math.sqrt(experts / top_k - 1) if experts > top_k else 1.0
        """load_cv of a layer that sends every token to the same experts."""
        self.alarms = Alarms(config.stability)
        self.loss, self.grad_norm = Running(config.stability.window), Running(config.stability.window)
        self.start()

    def start(self) -> None:
        """Forget the step before."""
        self.micro: list[Observation] = []
        self.losses: list[float] = []
        self.step_sums = Observation(self.model.config.moe_num_experts)
        self.gradient_norms: dict[str, float] = {}
        self.parameter_norms: dict[str, float] = {}
        self.update_rms: dict[str, float] = {}
        self.places: dict[str, str] = {}

    def observe(self, segments_BT: Tensor) -> Observation | None:
        """Return what the next micro-batch's layers are to show themselves to; None when monitors are off."""
        if not self.config.monitors:
            return None
        real_N = segments_BT.flatten() >= 0
        self.micro.append(Observation(self.model.config.moe_num_experts, None if bool(real_N.all()) else real_N))
        return self.micro[-1]

    def micro_batch(self, loss: float, routing: Sequence[Routing]) -> None:
        """Take in the loss of a micro-batch and its routers' records without padding."""
        self.losses.append(loss)
        if self.config.monitors:
            self.micro[-1].routed(routing)
            self.step_sums.add(self.micro[-1])

    def before_update(self, loss: float, grad_norm: float, gradient_norms: Mapping[str, float]) -> dict[str, Any]:
        """Return the figures of the accumulated step."""
        self.gradient_norms = dict(gradient_norms)
        bad = [f"micro-batch {i}" for i, value in enumerate(self.losses) if not math.isfinite(value)]
        bad += [f"gradient of {name}" for name, value in gradient_norms.items() if not math.isfinite(value)]
        self.places["non_finite"] = ", ".join(bad[:4])
        figures: dict[str, Any] = {
            "grad_norm": grad_norm,
            "loss_z": self.loss.z_score(loss),
            "grad_norm_ratio": self.grad_norm.ratio(grad_norm),
            "non_finite": len(bad),
        }
        if self.config.monitors:
            found, where = self.step_sums.metrics(self.groups)
            figures |= found | self._bias_spread()
            self.places |= where
            if "load_cv_max" in found:
                figures["load_imbalance"] = found["load_cv_max"] / self.worst_cv
                self.places["load_imbalance"] = where["load_cv_max"]
            if self.config.per_micro_batch:
                figures |= self._per_micro_batch()
        self.loss.add(loss)
        self.grad_norm.add(grad_norm)
        return figures

    def sample(self) -> UpdateSample | None:
        """Return a sample of the parameters to hold against those after the update."""
        return UpdateSample(self.trained) if self.config.monitors else None

    def after_update(self, sample: UpdateSample | None, lr: float) -> dict[str, Any]:
        """Return the figures of the update that was made."""
        total, self.parameter_norms = norms(self.trained)
        bad = [name for name, value in self.parameter_norms.items() if not math.isfinite(value)]
        self.places["non_finite_parameters"] = ", ".join(bad[:4])
        figures: dict[str, Any] = {
            "param_norm": total.item(),
            "non_finite_parameters": len(bad),
        }
        self.update_rms = sample.rms(lr) if sample else {}
        if self.update_rms:
            worst = max(self.update_rms, key=self.update_rms.__getitem__)
            figures["update_rms"] = self.update_rms[worst]
            self.places["update_rms"] = worst.removeprefix("update_rms.")
        largest = self.muon.largest_rms() if self.muon and self.config.monitors else None
        if largest:
            figures["muon_rms"], owner = largest
            self.places["muon_rms"] = next(
                (name for name, p in self.trained.items() if p.data_ptr() == owner.data_ptr()), ""
            )
        return figures

    def judge(self, figures: Mapping[str, Any], step: int, *, after_update: bool) -> tuple[list[Alarm], list[Alarm]]:
        """Return the alarms that hold, and those of them that are new; see `Alarms.judge`."""
        return self.alarms.judge(figures, self.places, step, after_update=after_update)

    def details(self) -> dict[str, Any]:
        """Return what is logged now and then: figures by matrix class, layer x expert panels, the logit bound."""
        found: dict[str, Any] = by_class(self.gradient_norms, "grad_norm")
        if not self.config.monitors:
            return found
        ratios, panels = expert_norms(self.model)
        found |= by_class(self.parameter_norms, "param_norm") | self.update_rms
        found |= {"attention_logit_bound": logit_bound(dict(self.model.named_parameters()))}
        found |= ratios | self.step_sums.panels(self.groups) | panels
        biases = self._biases()
        if biases:
            found["router_bias"] = [(bias_E - bias_E.mean()).tolist() for bias_E in biases]
        return found

    def _biases(self) -> list[Tensor]:
        return [self.model.router(i).bias for i in self.model.config.moe_layers_enum]

    def _bias_spread(self) -> dict[str, float]:
        biases = self._biases()
        if not biases:
            return {}
        spread_L = torch.stack([bias_E.max() - bias_E.min() for bias_E in biases]).tolist()
        worst = max(range(len(spread_L)), key=spread_L.__getitem__)
        self.places["bias_spread"] = f"layer {self.model.config.moe_layers_enum[worst]}"
        return {"bias_spread": spread_L[worst]}

    def _per_micro_batch(self) -> dict[str, list[float]]:
        records = [observation.metrics(self.groups)[0] for observation in self.micro]
        lists = {f"micro.{key}": [record[key] for record in records] for key in records[0]}
        return {"micro.loss": self.losses, **lists}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to raise the same alarms."""
        return {
            "loss": self.loss.state_dict(),
            "grad_norm": self.grad_norm.state_dict(),
            "alarms": self.alarms.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.loss.load_state_dict(state["loss"])
        self.grad_norm.load_state_dict(state["grad_norm"])
        self.alarms.load_state_dict(state["alarms"])
