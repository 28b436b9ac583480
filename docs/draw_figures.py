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
    ("cli, demos", "commands and pages"),
    ("recipe", "mine, train, compare in one file"),
    ("training   mining   evaluation   labels", "what a run does"),
    ("policies   judges   sources   doctor", "models, scores, datasets"),
    ("data", "rows and files"),
    ("objectives", "log-probs to losses, pure functions"),
    ("worlds   config   errors   progress   resumable   assets", "no imports from above"),
)
"""Packages and modules of dpo_mm from the top layer to the bottom one, and what a layer is."""


def optimal_policy(reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """The policy with the best reward minus beta * KL, probabilities."""
    weights = reference * np.exp(rewards / beta)
    return weights / weights.sum()


def preference_learning() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    margin = np.linspace(-4, 4, 400)
    left.plot(margin, np.log1p(np.exp(-margin)), color=BLUE, linewidth=2)
    left.plot([0], [np.log(2)], "o", color=RED, markersize=7)
    left.annotate("start: ln 2", (0, np.log(2)), (0.5, 1.5), color=RED, arrowprops={"arrowstyle": "-", "color": RED})
    left.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    left.set(title="Loss of a pair", xlabel="reward margin  β · Δ", ylabel="−log σ(β · Δ)", ylim=(0, 4.2))
    left.text(-3.8, 0.35, "rejected\npreferred", color=GREY, fontsize=9)
    left.text(2.4, 2.4, "chosen\npreferred", color=GREY, fontsize=9)
    place, width = np.arange(5), 0.27
    bars = (
        ("reference", REFERENCE, GREY),
        ("β = 2", optimal_policy(REFERENCE, REWARDS, 2.0), BLUE),
        ("β = 0.5", optimal_policy(REFERENCE, REWARDS, 0.5), GREEN),
    )
    for number, (label, values, colour) in enumerate(bars):
        right.bar(place + (number - 1) * width, values, width, label=label, color=colour)
    right.set(title="The optimal policy reweights the reference", ylabel="probability", xlabel="output and its reward")
    right.set_xticks(place, [f"{name}\n{reward:g}" for name, reward in zip("ABCDE", REWARDS, strict=True)])
    right.legend(frameon=False)
    save(figure, FOLDER / "concepts" / "preference-learning.svg")


def architecture() -> None:
    figure, axis = plt.subplots(figsize=(8, 5.6))
    for number, (names, meaning) in enumerate(LAYERS):
        bottom = len(LAYERS) - 1 - number
        box = FancyBboxPatch(
            (0, bottom + 0.1), 6.4, 0.7, boxstyle="round,pad=0.02", facecolor="#e8f0f8", edgecolor=BLUE
        )
        axis.add_patch(box)
        axis.text(3.2, bottom + 0.45, names, ha="center", va="center", fontsize=10, family="monospace")
        axis.text(6.65, bottom + 0.45, meaning, va="center", fontsize=9.5, color=GREY)
        if bottom:
            axis.annotate(
                "", (3.2, bottom - 0.15), (3.2, bottom + 0.06), arrowprops={"arrowstyle": "->", "color": BLUE}
            )
    axis.set(xlim=(-0.1, 9.9), ylim=(-0.1, len(LAYERS)))
    axis.axis("off")
    save(figure, FOLDER / "background" / "architecture.svg")


def save(figure: Any, path: Path) -> None:
    """Write an SVG that is the same each time."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    plt.close(figure)


def main() -> None:
    with plt.rc_context({"svg.hashsalt": "dpo-mm", "font.size": 10}):
        preference_learning()
        architecture()


if __name__ == "__main__":
    main()
