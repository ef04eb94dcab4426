"""Robust recovery: keep of each layer what benign images can vouch for, by robust regression.

After Lu, Huang, Wang, "Purification of Contaminated Convolutional Neural Networks via Robust
Recovery: An Approach with Theoretical Guarantee in One-Hidden-Layer Case", IEEE JSTSP 19(3), 2025,
arXiv:2407.11031. Ours carries the method to deep networks. It walks the layers in the order data
flows, each met with the inputs of the already recovered network, and either regresses the
original network's outputs on those inputs (``outputs``), or, as the paper does, the weights on a
basis of those inputs (``weights``). A BatchNorm keeps its variance and affine part; what the
regression shifts goes into its running mean.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from purebench import DEFENSES, Defense, DefenseContext
from purebench.layers import WeightLayer, input_gram, weight_layers
from purebench.recovery.l1 import l1_regress
from purebench.recovery.refit import excited_basis, robust_ridge

from ._layerwise import Rows, shift, strongest_within


@DEFENSES.register("robust_recovery")
@dataclass(frozen=True)
class RobustRecovery(Defense):
    """target: what is regressed, "outputs" or "weights".

    loss: "huber" or "l2" for outputs; "l1" (also: "huber") or "l2" for weights.
    strengths: tried in turn, each above 0; a direction of the inputs whose variance is this many
        times the mean is kept by half (outputs), or just kept (weights).
    budget: benign accuracy that may be lost; the first strength within it is taken, else the last.
    folds: parts of the benign images that it is measured across, at least 2.
    influence: outputs matter as much as they move the logits.
    rows: of inputs that a layer is recovered from, at least 100.
    """

    paper: ClassVar[str] = "Lu, Huang, Wang 2024, arXiv:2407.11031"
    target: Literal["outputs", "weights"] = "outputs"
    loss: Literal["huber", "l1", "l2"] = "huber"
    strengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.015)
    budget: float = 0.01
    folds: int = 2
    influence: bool = True
    rows: int = 6000

    def __post_init__(self) -> None:
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"strengths must be above 0, got {self.strengths}")
        if not 0 <= self.budget < 1:
            raise ValueError(f"budget must be at least 0 and below 1, got {self.budget}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")
        if self.rows < 100:
            raise ValueError(f"rows must be at least 100, got {self.rows}")
        if self.target == "outputs" and self.loss == "l1":
            raise ValueError("loss l1 is for target weights; outputs take huber or l2")

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        seed = ctx.derive("influence")

        def repair(suspect: nn.Module, images: Tensor, strength: float) -> nn.Module:
            return self._recover(suspect, images, strength, seed, [])

        strength = self.strengths[0]
        if len(self.strengths) > 1:
            strength = strongest_within(model, ctx, repair, self.strengths, self.budget, self.folds)
        layers: list[dict[str, Any]] = []
        self._recover(model, ctx.benign.images, strength, seed, layers)
        whole = [facts["layer"] for facts in layers if facts["kept"] >= facts["inputs"]]
        ctx.notes.update(strength=strength, layers=layers, identity_layers=whole)
        return model

    def _recover(
        self,
        model: nn.Module,
        images: Tensor,
        strength: float,
        seed: int,
        facts: list[dict[str, Any]],
    ) -> nn.Module:
        """Recover ``model`` in place and tell, layer by layer, what was done."""
        original = copy.deepcopy(model)
        at = dict(original.named_modules())
        rng = torch.Generator().manual_seed(seed)
        for name, layer in weight_layers(model, images):
            old = layer.weight.detach().clone()
            if self.target == "outputs":
                kept = self._refit(model, layer, original, at[name], images, strength, rng)
            else:
                kept = self._project(model, layer, images, strength)
            facts.append(
                {
                    "layer": name,
                    "inputs": layer.weight[0].numel(),
                    "kept": round(kept, 3),
                    "relative_change": round(_change(old, layer.weight.detach()), 6),
                }
            )
        return model

    def _refit(
        self,
        model: nn.Module,
        layer: WeightLayer,
        original: nn.Module,
        was: nn.Module,
        images: Tensor,
        strength: float,
        rng: torch.Generator,
    ) -> float:
        rows = Rows(model, layer, images, self.rows)
        inputs, outputs = rows.inputs(model, layer), rows.outputs(original, was)
        weights = rows.influence(original, was, rng) if self.influence else None
        groups = len(inputs)
        each = outputs.shape[1] // groups
        offset, kept = torch.zeros_like(outputs[0]), []
        for group, X in enumerate(inputs):
            part = slice(group * each, (group + 1) * each)
            fit = robust_ridge(
                X,
                outputs[:, part],
                strength,
                weights=None if weights is None else weights[:, part],
                rounds=2 if self.loss == "huber" else 0,
            )
            with torch.no_grad():
                layer.weight[part] = fit.weight.T.view_as(layer.weight[part])
            offset[part] = fit.offset
            kept.append(fit.effective_rank)
        shift(model, layer, images, offset)
        return sum(kept) / groups

    def _project(
        self, model: nn.Module, layer: WeightLayer, images: Tensor, strength: float
    ) -> float:
        moments = input_gram(model, layer, images)
        each = len(layer.weight) // len(moments)
        kept = []
        for group, moment in enumerate(moments):
            part = slice(group * each, (group + 1) * each)
            basis = excited_basis(moment, strength)
            wanted = layer.weight[part].detach().flatten(1).T.to(basis)
            if self.loss == "l2":
                inside = basis.T @ wanted
            else:
                inside = l1_regress(basis, wanted, iterations=300, finish=False).coefficients
            with torch.no_grad():
                layer.weight[part] = (basis @ inside).T.view_as(layer.weight[part]).to(layer.weight)
            kept.append(basis.shape[1])
        return sum(kept) / len(moments)


def _change(old: Tensor, new: Tensor) -> float:
    """Relative change, in the Frobenius norm."""
    return float((new - old).norm() / old.norm().clamp_min(1e-30))
