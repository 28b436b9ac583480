"""Couples of a liked and a disliked row, so that every batch has as many of one kind as of the other.

Couple k has liked row k and disliked row k, counted modulo their numbers. So an epoch uses every row of the larger kind once
and repeats those of the smaller kind. KTO's weights then need no correction for the numbers of both kinds (2402.01306,
section 4.2), and AOT can match the quantiles of both. Which rows form a couple does not change the loss of kto, bco_pair and
apo_zero, which are sums over sides. aot_unpaired sorts each kind over the batch of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_mm.training.pair_stream import lengths_of


class CoupledRows:
    """Couples of encoded one-sided rows, by number.

    Args:
        liked: encoded rows of liked images or responses.
        disliked: encoded rows of disliked ones.
    """

    def __init__(self, liked: Any, disliked: Any) -> None:
        self.liked, self.disliked = liked, disliked
        self.truncated_prompts = next(
            filter(None, (getattr(rows, "truncated_prompts", "") for rows in (liked, disliked))), ""
        )

    @property
    def rows(self) -> Any:
        """The liked rows, which tell whether rows are in memory or on disk."""
        return self.liked

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of the longer row of each couple, for text."""
        liked, disliked = lengths_of(self.liked), lengths_of(self.disliked)
        return [max(liked[n % len(liked)], disliked[n % len(disliked)]) for n in range(len(self))]

    def __len__(self) -> int:
        return max(len(self.liked), len(self.disliked))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a couple. Its noise depends on the ids of both rows, and is the same for both."""
        if number >= len(self):
            raise IndexError(number)
        liked, disliked = self.liked[number % len(self.liked)], self.disliked[number % len(self.disliked)]
        couple = {**liked, "id": f"{liked['id']} and {disliked['id']}"}
        if "prompt_ids" in liked:
            return {**couple, "disliked": disliked}
        renamed = {
            f"rejected_{name.removeprefix('chosen_')}": value for name, value in disliked.items() if name != "id"
        }
        return {**couple, **renamed}
