"""Draw docs/reference/objectives.png, the loss curves, from the objectives themselves.

python docs/draw_objectives.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from dpo_mm.objectives import OBJECTIVES, LogProbs, takes

OUT = Path(__file__).parent / "reference" / "objectives.png"
REWARD = torch.linspace(-4, 4, 401)
STYLES = ("-", "-", "-", "-", "-", "--", "--")
COLOURS = ("#1b6ca8", "#d1495b", "#2a9d6f", "#e09f3e", "#6a4c93", "#444444", "#8d6e63")

MARGIN: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("sigmoid", "sigmoid", {}),
    ("sigmoid, label_smoothing 0.1", "sigmoid", {"label_smoothing": 0.1}),
    ("robust, label_smoothing 0.1", "robust", {"label_smoothing": 0.1}),
    ("hinge", "hinge", {}),
    ("ipo", "ipo", {}),
    ("exo_pair, label_smoothing 0.01", "exo_pair", {"label_smoothing": 0.01}),
    ("discopop", "discopop", {}),
)
SIDES: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("kto, z 1", "kto", {}),
    ("bco_pair", "bco_pair", {}),
    ("nca_pair", "nca_pair", {}),
    ("sppo_hard", "sppo_hard", {}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("dpop, penalty 1", "dpop", {"penalty": 1.0}),
)


def loss(name: str, chosen: Tensor, rejected: Tensor, **settings: float) -> Tensor:
    """One objective at these rewards, beta 1, (n,); KTO's point of reference is 1, BCO's 0."""
    one = torch.ones_like(chosen)
    policy = LogProbs(chosen, rejected, one, one, is_likelihood=True)
    reference = LogProbs(0 * one, 0 * one, one, one, is_likelihood=True)
    points = {"z": torch.tensor(1.0), "reward_shift": torch.tensor(0.0)}
    batch = {key: value for key, value in points.items() if takes(name, key)}
    return OBJECTIVES[name](policy, reference, beta=1.0, **batch, **settings)


def slope(name: str, **settings: float) -> Tensor:
    """-d loss / d margin, (n,)."""
    margin = REWARD.clone().requires_grad_()
    loss(name, margin / 2, -margin / 2, **settings).sum().backward()
    assert margin.grad is not None
    return -margin.grad


def panel(axis: Any, title: str, across: str, curves: list[tuple[str, Tensor]], top: float, bottom: float) -> None:
    for (label, values), colour, style in zip(curves, COLOURS, STYLES, strict=True):
        axis.plot(REWARD, values, label=label, color=colour, linestyle=style, linewidth=1.8)
    axis.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.set(title=title, xlabel=across, ylim=(bottom, top), xlim=(-4, 4))
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure, ((first, second), (third, fourth)) = plt.subplots(2, 2, figsize=(12, 8), dpi=110)
    zero = torch.zeros_like(REWARD)
    margins = [(label, loss(name, REWARD / 2, -REWARD / 2, **s)) for label, name, s in MARGIN]
    panel(first, "Loss by margin", "beta * delta", margins, 5, -0.5)
    slopes = [(label, slope(name, **s)) for label, name, s in MARGIN]
    panel(second, "How hard a pair still pulls: -d loss / d margin", "beta * delta", slopes, 2, -1)
    chosen = [(label, loss(name, REWARD, zero, **s)) for label, name, s in SIDES]
    panel(third, "Loss by the chosen side's reward, the rejected one's at 0", "beta * r_w", chosen, 5, -0.5)
    rejected = [(label, loss(name, zero, REWARD, **s)) for label, name, s in SIDES]
    panel(fourth, "Loss by the rejected side's reward, the chosen one's at 0", "beta * r_l", rejected, 5, -0.5)
    for axis in (second, fourth):
        axis.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(OUT, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
