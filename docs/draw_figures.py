"""Draw the figures of the concept pages and of the architecture, as SVG.

python docs/draw_figures.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parent
BLUE, RED, GREEN, GREY = "#1b6ca8", "#d1495b", "#2a9d6f", "#777777"
REFERENCE = np.array([0.35, 0.30, 0.20, 0.10, 0.05])
REWARDS = np.array([0.0, 1.0, 2.0, 1.0, 3.0])
LAYERS = (
    ("cli   pages   demos", "commands and pages"),
    ("recipe", "mine, train and compare in one file"),
    ("training   mining   evaluation   labels", "a run, pairs, reports, votes"),
    ("policies   judges   sources   doctor", "models, scores, datasets, checks"),
    ("data", "rows and files"),
    ("objectives", "log-probs to losses, pure functions"),
    (
        "worlds  config  files  models  process  printing",
        "synthetic tasks, settings, helpers without imports from above",
    ),
)
"""Packages and modules of dpo_mm from the top layer to the bottom one, and what a layer is."""


def optimal_policy(reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """The policy with the best reward minus beta * KL, probabilities."""
    weights = reference * np.exp(rewards / beta)
    return weights / weights.sum()


def loss_of_a_pair() -> None:
    figure, axis = plt.subplots(figsize=(5, 3.8))
    margin = np.linspace(-4, 4, 400)
    axis.plot(margin, np.log1p(np.exp(-margin)), color=BLUE, linewidth=2)
    axis.plot([0], [np.log(2)], "o", color=RED, markersize=7)
    axis.annotate("start: ln 2", (0, np.log(2)), (0.5, 1.5), color=RED, arrowprops={"arrowstyle": "-", "color": RED})
    axis.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axis.set(title="Loss of a pair", xlabel="reward margin  β · Δ", ylabel="−log σ(β · Δ)", ylim=(0, 4.2))
    axis.text(-2, 0.2, "rejected preferred", color=GREY, ha="center")
    axis.text(2.2, 2.4, "chosen preferred", color=GREY, ha="center")
    save(figure, FOLDER / "concepts" / "preference-loss.svg")


def reweighted_reference() -> None:
    figure, axis = plt.subplots(figsize=(5, 3.8))
    place, width = np.arange(len(REFERENCE)), 0.27
    bars = (
        ("reference", REFERENCE, GREY),
        ("β = 2", optimal_policy(REFERENCE, REWARDS, 2.0), BLUE),
        ("β = 0.5", optimal_policy(REFERENCE, REWARDS, 0.5), GREEN),
    )
    for number, (label, values, colour) in enumerate(bars):
        axis.bar(place + (number - 1) * width, values, width, label=label, color=colour)
    axis.set(title="The optimal policy reweights the reference", ylabel="probability", xlabel="output and its reward")
    axis.set_xticks(place, [f"{name}\n{reward:g}" for name, reward in zip("ABCDE", REWARDS, strict=True)])
    axis.legend(frameon=False)
    save(figure, FOLDER / "concepts" / "preference-policy.svg")


def architecture() -> None:
    figure, axis = plt.subplots(figsize=(6, 6.2))
    for number, (names, meaning) in enumerate(LAYERS):
        bottom = len(LAYERS) - 1 - number
        box = FancyBboxPatch((0, bottom + 0.1), 6, 0.72, boxstyle="round,pad=0.02", facecolor="#e8f0f8", edgecolor=BLUE)
        axis.add_patch(box)
        axis.text(3, bottom + 0.6, names, ha="center", va="center", fontsize=11, weight="bold")
        axis.text(3, bottom + 0.29, meaning, ha="center", va="center", fontsize=10, color="#555555")
        if bottom:
            axis.annotate("", (3, bottom - 0.18), (3, bottom + 0.09), arrowprops={"arrowstyle": "->", "color": BLUE})
    axis.set(xlim=(-0.1, 6.1), ylim=(0, len(LAYERS)))
    axis.axis("off")
    save(figure, FOLDER / "background" / "architecture.svg")


def save(figure: Any, path: Path) -> None:
    """Write an SVG that is the same each time."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text(
        "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
    )
    plt.close(figure)


def main() -> None:
    with plt.rc_context({"svg.hashsalt": "dpo-mm", "font.size": 10}):
        loss_of_a_pair()
        reweighted_reference()
        architecture()


if __name__ == "__main__":
    main()
