"""Objectives of sorted log-ratios (alignment by optimal transport), which compare distributions instead of pairs.

Symbols: w is chosen and l is rejected, r = log p_policy - log p_reference is the log-ratio of one side, and
s(x) = 1 / (1 + e^-x). sort(x)_i is the i-th smallest value of x over the pairs.

Departure from the paper: with several processes, each process sorts its own pairs, and the quantiles are coarser than
those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dpo_mm.objectives.log_probs import LogProbs, check_beta, check_smoothing, log_ratios, smoothed_logsigmoid_loss


def aot(policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss on sorted margins of the policy against sorted margins of the reference (AOT, paired).

        sigmoid's loss of sort(log p_w - log p_l)_i - sort(log p_ref_w - log p_ref_l)_i

    The policy's margins should exceed the reference's at every quantile, not pair by pair.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each. It needs many pairs.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels assumed to be flipped, in [0, 0.5).

    Returns:
        Loss per quantile, (pairs,): the i-th value belongs to the i-th quantile, not to the i-th pair. It is ln 2 if
        policy and reference agree.

    Raises:
        ValueError: if beta or label_smoothing is out of range.

    Source: Melnyk et al. 2024 (2406.05882), paired form.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    policy_margins, reference_margins = (logps.chosen - logps.rejected for logps in (policy_logps, reference_logps))
    gaps = policy_margins.sort().values - reference_margins.sort().values
    return smoothed_logsigmoid_loss(beta * gaps, label_smoothing)


def aot_unpaired(
    policy_logps: LogProbs, reference_logps: LogProbs, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Logistic loss on sorted chosen log-ratios against sorted rejected ones (AOT, unpaired).

        sigmoid's loss of sort(r_w)_i - sort(r_l)_i

    The chosen log-ratios should exceed the rejected ones at every quantile. Chosen and rejected need not belong
    together.

    Args:
        policy_logps: log-probs of chosen and rejected under the policy, nats, (pairs,) each. It needs many pairs.
        reference_logps: the same under the reference.
        beta: inverse temperature, 1/nats, > 0.
        label_smoothing: fraction of labels assumed to be flipped, in [0, 0.5).

    Returns:
        Loss per quantile, (pairs,): the i-th value belongs to the i-th quantile, not to the i-th pair.

    Raises:
        ValueError: if beta or label_smoothing is out of range.

    Source: Melnyk et al. 2024 (2406.05882), unpaired form.
    """
    check_beta(beta)
    check_smoothing(label_smoothing)
    chosen, rejected = log_ratios(policy_logps, reference_logps)
    return smoothed_logsigmoid_loss(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


OPTIMAL_TRANSPORT: dict[str, Callable[..., Tensor]] = {"aot": aot, "aot_unpaired": aot_unpaired}
