"""Side sets of a comparison: further prompts or questions on which the tuned model must not get worse."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_mm.config.setting_limits import Settings


@dataclass(frozen=True)
class SidePrompts(Settings):
    """Side set of a comparison of images."""

    prompts: str
    """Prompts, in the formats of the comparison's own."""
    judges: tuple[str, ...] = ()
    """Names of judges, or module:function. Empty: those of the comparison."""
    max_prompts: int | None = None
    """Largest number of prompts. null: that of the comparison."""


@dataclass(frozen=True)
class SideQuestions(Settings):
    """Side set of a comparison of responses."""

    questions: str
    """Questions, in the formats of the comparison's own."""
    judges: tuple[str, ...] = ()
    """Names of judges, or module:function. Empty: the comparison's first judge and its guardrail metrics."""
    max_questions: int | None = None
    """Largest number of questions. null: that of the comparison."""
