"""Diffusion-DPO (Wallace et al. 2023, 2311.12908) on points in the plane, with nothing but torch and matplotlib.

    python standalone_diffusion_dpo.py        # writes standalone-diffusion-dpo.png

A small diffusion model learns a ring of eight clusters. Of two samples of it, the one further to the right is chosen. DPO then
moves the model to the right, without a reward model and without sampling during training.
"""

import copy
import math
import sys

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import logsigmoid

BASE_STEPS, DPO_STEPS, POINTS = (int(text) for text in (sys.argv[1:] or ["3000", "300", "2000"]))
T, BETAS = 50, (200.0, 5.0)
ALPHA_BAR = torch.cos(torch.linspace(0.01, 0.99, T) * math.pi / 2) ** 2  # fraction of signal variance at each timestep


class Denoiser(nn.Module):
    """Predicts the noise in a noisy point x at timestep t."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x, t):
        phase = t[:, None] / T * math.pi
        return self.net(torch.cat([x, phase.sin(), phase.cos(), (2 * phase).sin(), (2 * phase).cos()], 1))


def error(model, x, t, noise):
    """Denoising error of each point: minus twice the log-prob that DPO needs, up to a constant."""
    a = ALPHA_BAR[t][:, None]
    return (model(a.sqrt() * x + (1 - a).sqrt() * noise, t) - noise).square().sum(1)


@torch.no_grad()
def sample(model, count):
    x = torch.randn(count, 2)
    for t in reversed(range(T)):  # DDIM: predict the clean point, then go to the next smaller noise level
        noise = model(x, torch.full((count,), t))
        clean = (x - (1 - ALPHA_BAR[t]).sqrt() * noise) / ALPHA_BAR[t].sqrt()
        before = ALPHA_BAR[t - 1] if t else torch.tensor(1.0)
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    return x


def train(model, steps, loss, rate):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(T, (256,)), torch.randn(256, 2)).backward()
        optimizer.step()


torch.manual_seed(0)
angle = torch.randint(8, (4096,)) * math.pi / 4
data = torch.stack([angle.cos(), angle.sin()], 1) * 1.5 + 0.08 * torch.randn(4096, 2)

reference = Denoiser()
train(
    reference, BASE_STEPS, lambda t, noise: error(reference, data[torch.randint(4096, (256,))], t, noise).mean(), 2e-3
)

first, second = sample(reference, POINTS), sample(reference, POINTS)
first_wins = (first[:, :1] > second[:, :1]).expand(-1, 2)
chosen, rejected = torch.where(first_wins, first, second), torch.where(first_wins, second, first)


def tuned(beta):
    """A copy of the reference after DPO. Both sides of a pair get the same timestep and the same noise."""
    policy = copy.deepcopy(reference)

    def loss(t, noise):
        pair = torch.randint(POINTS, (256,))
        with torch.no_grad():
            reference_w, reference_l = (error(reference, side[pair], t, noise) for side in (chosen, rejected))
        policy_w, policy_l = (error(policy, side[pair], t, noise) for side in (chosen, rejected))
        log_ratio_w, log_ratio_l = -(policy_w - reference_w) / 2, -(policy_l - reference_l) / 2
        return -logsigmoid(beta * (log_ratio_w - log_ratio_l)).mean()

    train(policy, DPO_STEPS, loss, 1e-4)
    return policy


panels = {"base": [(first, "C7")], "pairs: chosen blue, rejected red": [(rejected, "C3"), (chosen, "C0")]}
panels |= {f"tuned, beta {beta:g}": [(sample(tuned(beta), POINTS), "C0")] for beta in BETAS}
figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), sharex=True, sharey=True)
for axis, (title, clouds) in zip(axes, panels.items(), strict=True):
    for points, colour in clouds:
        axis.scatter(*points.T, s=3, color=colour, alpha=0.4, linewidths=0)
    axis.set(title=title, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    print(f"{title}: mean x {clouds[-1][0][:, 0].mean():+.2f}")
figure.tight_layout()
figure.savefig("standalone-diffusion-dpo.png", dpi=120)
