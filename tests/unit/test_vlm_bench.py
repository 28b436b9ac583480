"""The FLOP formula of the step benchmark equals torch's count."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.vlm_shapes import SHAPES, largest_speedups, ratios, rows_of, step_flops
from tests.bench.vlm_step import VARIANTS


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_flop_formula_equals_torchs_count(name: str) -> None:
    shape, tokens, completion = SHAPES[name], 64, 8
    rows = rows_of(shape, tokens, completion, 1)
    expected = step_flops(shape, tokens, completion, attention=False)  # of a CPU's kernels torch counts none of it
    for variant in ("plain", "prefix", "reference kept", "vision kept"):
        step = VARIANTS[variant](shape, rows, tokens)
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        assert counter.get_total_flops() == pytest.approx(expected[variant], rel=0.01)


def test_shared_prefix_gains_most_for_short_responses() -> None:
    gains = [largest_speedups(SHAPES["llava"], 1024, completion)["prefix"] for completion in (32, 256)]
    assert 2.1 > gains[0] > gains[1] > 1.5
    assert ratios(SHAPES["qwen2_5_vl"], 576) == pytest.approx((0.96, 0.112), rel=0.1)
