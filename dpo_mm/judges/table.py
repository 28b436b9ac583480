"""Table of the judges that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "neutral"]


@dataclass(frozen=True)
class Judge:
    """An entry of JUDGES.

    Attributes:
        metric: name of the metric in reports.
        function: path of the judge's function, `module:function`.
        better: direction in which the score improves.
        explain: path of a function (response, ground truth) -> Explanation, or None.
        correct: path of a function (response, ground truth) -> response in which only the faults are corrected, or None.
        needs_model: True if `function` takes a JudgeName and returns a LazyJudge.
        pairwise: True if the judge is a Prefer, not a Score.
        uses_prompt: False if the score does not depend on the prompt.
        takes_questions: True if it scores responses to questions: (responses, questions) -> list[Ratio]. If it is pairwise, it takes
            two lists of responses and counts for the first. A row with a total of 0 has no score.
        takes_sources: True if it scores edits: (images, prompts, images to edit) -> one number per image.
        by_rule: True if no part of it is learned, although it has files (`needs_model`).
        check_prompts: path of a function (prompts) that raises ValueError for one that the judge cannot score, or None.
    """

    metric: str
    function: str
    better: Better = "higher"
    explain: str | None = None
    correct: str | None = None
    needs_model: bool = False
    pairwise: bool = False
    uses_prompt: bool = True
    takes_questions: bool = False
    takes_sources: bool = False
    check_prompts: str | None = None
    by_rule: bool = False


_TEXT, _CAPTION = "dpo_mm.judges.text", "dpo_mm.judges.captions"
_CLIP, _VQA, _TIFA = "dpo_mm.judges.clip", "dpo_mm.judges.vqa", "dpo_mm.judges.soft_tifa"
_POPE, _MODEL = "dpo_mm.judges.pope", "dpo_mm.judges.model_judge"
_DRAWINGS, _DRAWN = "dpo_mm.judges.drawing_judge", "dpo_mm.worlds.drawing_prompts:check_prompts"
_UNIFIED = "dpo_mm.judges.unified_reward"
_PUBLISHED = "dpo_mm.judges.benchmarks"
_PAGE = f"{_PUBLISHED}.omnidocbench_page.judges"
_EDIT, _EDITED = "dpo_mm.judges.edit_judge", "dpo_mm.worlds.shape_edits:check_prompts"
JUDGES: dict[str, Judge] = {
    "faithfulness": Judge("fully correct rate", "dpo_mm.judges.scene:faithfulness", check_prompts="dpo_mm.worlds.shapes:check_prompts"),
    "drawings_faithfulness": Judge("fully correct rate", f"{_DRAWINGS}:drawings_faithfulness", check_prompts=_DRAWN),
    "drawings_agreement": Judge("agreement with the prompt", f"{_DRAWINGS}:drawings_agreement", check_prompts=_DRAWN),
    "edit_followed": Judge("edits followed, rate", f"{_EDIT}:edit_followed", takes_sources=True, check_prompts=_EDITED),
    "edit_preserved": Judge("rest preserved, rate", f"{_EDIT}:edit_preserved", takes_sources=True, check_prompts=_EDITED),
    "aesthetic": Judge("aesthetic score", "dpo_mm.judges.aesthetic:aesthetic", uses_prompt=False),
    "clip_score": Judge("CLIPScore, 2.5 max(cos, 0)", f"{_CLIP}:clip_score", needs_model=True),
    "laion_aesthetic": Judge("LAION aesthetic v2, 1 to 10", f"{_CLIP}:laion_aesthetic", needs_model=True, uses_prompt=False),
    "hps_v2": Judge("HPS v2, cos", f"{_CLIP}:hps_v2", needs_model=True),
    "hps_v2.1": Judge("HPS v2.1, cos", f"{_CLIP}:hps_v21", needs_model=True),
    "hps_v3": Judge("HPSv3, mu", "dpo_mm.judges.hps_v3:hps_v3", needs_model=True),
    "pick_score": Judge("PickScore v1, exp(s) cos", f"{_CLIP}:pick_score", needs_model=True),
    "vqa_score": Judge("VQAScore, P(Yes)", f"{_VQA}:vqa_score", needs_model=True),
    "vlm_prefers": Judge("VLM preference (both orders)", f"{_VQA}:vlm_prefers", needs_model=True, pairwise=True),
    "unified_reward": Judge("UnifiedReward, mean of 3 scores", f"{_UNIFIED}:unified_reward", needs_model=True),
    "unified_reward_final": Judge("UnifiedReward Final Score", f"{_UNIFIED}:unified_reward_final", needs_model=True),
    "unified_reward_prefers": Judge("UnifiedReward preference (both orders)", f"{_UNIFIED}:unified_reward_prefers", needs_model=True, pairwise=True),
    "soft_tifa_gm": Judge("Soft-TIFA GM", f"{_TIFA}:soft_tifa_gm", needs_model=True),
    "soft_tifa_am": Judge("Soft-TIFA AM", f"{_TIFA}:soft_tifa_am", needs_model=True),
    "degeneration": Judge("degeneration rate", f"{_TEXT}:degeneration", "lower", f"{_TEXT}:explain_repetition", f"{_TEXT}:correct_repetition"),
    "trailing_repetition": Judge("trailing repetition rate", f"{_TEXT}:trailing_repetition", "lower", f"{_TEXT}:explain_repetition", f"{_TEXT}:correct_repetition"),
    "repetition": Judge("excess repetition (rep-10)", f"{_TEXT}:repetition", "lower", f"{_TEXT}:explain_repetition", f"{_TEXT}:correct_repetition"),
    "cer": Judge("character error rate", f"{_TEXT}:cer", "lower"),
    "wer": Judge("word error rate", f"{_TEXT}:wer", "lower"),
    "anls": Judge("ANLS", f"{_TEXT}:anls"),
    "levenshtein_bleu": Judge("Levenshtein ratio and BLEU-4, mean", "dpo_mm.judges.transcription_quality:levenshtein_bleu"),
    "valid_json": Judge("valid JSON rate", f"{_TEXT}:valid_json"),
    "truncated": Judge("truncation rate", f"{_TEXT}:truncated", "lower"),
    "num_tokens": Judge("tokens per response", f"{_TEXT}:num_tokens", "lower"),
    "num_words": Judge("words per response", f"{_TEXT}:num_words", "neutral"),
    "chair_i": Judge("CHAIR_i", f"{_CAPTION}:chair_i", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "chair_s": Judge("CHAIR_s", f"{_CAPTION}:chair_s", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "hallucination_f1_error": Judge("hallucination F1 error", f"{_CAPTION}:hallucination_f1_error", "lower", f"{_CAPTION}:explain", f"{_CAPTION}:correct"),
    "recall": Judge("object recall", f"{_CAPTION}:recall"),
    "pope_accuracy": Judge("POPE accuracy", f"{_POPE}:accuracy"),
    "pope_precision": Judge("POPE precision", f"{_POPE}:precision"),
    "pope_recall": Judge("POPE recall", f"{_POPE}:recall"),
    "pope_f1": Judge("POPE F1", f"{_POPE}:f1"),
    "yes_ratio": Judge("yes ratio", f"{_POPE}:yes_ratio", "neutral"),
    "ocrbench": Judge("OCRBench score, rate", f"{_PUBLISHED}.ocrbench:ocrbench"),
    "geneval": Judge("GenEval correct rate", f"{_PUBLISHED}.geneval:geneval", needs_model=True, by_rule=True),
    "amber_chair": Judge("AMBER CHAIR", f"{_PUBLISHED}.amber:amber_chair", "lower", needs_model=True),
    "amber_cover": Judge("AMBER Cover", f"{_PUBLISHED}.amber:amber_cover", needs_model=True),
    "amber_hal": Judge("AMBER Hal", f"{_PUBLISHED}.amber:amber_hal", "lower", needs_model=True),
    "amber_cog": Judge("AMBER Cog", f"{_PUBLISHED}.amber:amber_cog", "lower", needs_model=True),
    "amber_chair_words": Judge("AMBER CHAIR, word lists", f"{_PUBLISHED}.amber:amber_chair", "lower", needs_model=True, by_rule=True),
    "amber_cover_words": Judge("AMBER Cover, word lists", f"{_PUBLISHED}.amber:amber_cover", needs_model=True, by_rule=True),
    "amber_hal_words": Judge("AMBER Hal, word lists", f"{_PUBLISHED}.amber:amber_hal", "lower", needs_model=True, by_rule=True),
    "amber_cog_words": Judge("AMBER Cog, word lists", f"{_PUBLISHED}.amber:amber_cog", "lower", needs_model=True, by_rule=True),
    "olmocr_tests": Judge("olmOCR-bench tests passed", f"{_PUBLISHED}.olmocr_tests:olmocr_tests", explain=f"{_PUBLISHED}.olmocr_tests:explain_tests"),
    "olmocr_baseline": Judge("olmOCR-bench baseline tests passed", f"{_PUBLISHED}.olmocr_tests:olmocr_baseline", explain=f"{_PUBLISHED}.olmocr_tests:explain_tests"),
    "olmocr_math": Judge("olmOCR-bench equations", f"{_PUBLISHED}.olmocr_equations:olmocr_math", needs_model=True, by_rule=True),
    "olmocr_latex": Judge("olmOCR-bench equations with equal LaTeX", f"{_PUBLISHED}.olmocr_equations:olmocr_latex"),
    "omnidocbench_text": Judge("OmniDocBench text edit distance", f"{_PUBLISHED}.omnidocbench:omnidocbench_text", "lower"),
    "omnidocbench_teds": Judge("OmniDocBench TEDS", f"{_PUBLISHED}.omnidocbench:omnidocbench_teds"),
    "omnidocbench_teds_s": Judge("OmniDocBench TEDS-S", f"{_PUBLISHED}.omnidocbench:omnidocbench_teds_structure"),
    "omnidocbench_page_text": Judge("OmniDocBench text edit distance of pages", f"{_PAGE}:page_text", "lower"),
    "omnidocbench_page_order": Judge("OmniDocBench reading order edit distance", f"{_PAGE}:page_order", "lower"),
    "omnidocbench_page_formulas": Judge("OmniDocBench formula edit distance of pages", f"{_PAGE}:page_formulas", "lower"),
    "omnidocbench_page_teds": Judge("OmniDocBench TEDS of pages", f"{_PAGE}:page_teds"),
    "omnidocbench_page_teds_s": Judge("OmniDocBench TEDS-S of pages", f"{_PAGE}:page_teds_structure"),
    "teds": Judge("TEDS", f"{_PUBLISHED}.teds:teds"),
    "teds_s": Judge("TEDS-S", f"{_PUBLISHED}.teds:teds_structure"),
    "rubric_score": Judge("rubric score, 0 to 10", f"{_MODEL}:rubric_score", needs_model=True, takes_questions=True),
    "rubric_score_text": Judge("rubric score, 0 to 10", f"{_MODEL}:rubric_score", needs_model=True, takes_questions=True),
    "rubric_prefers": Judge("rubric preference (both orders)", f"{_MODEL}:rubric_prefers", needs_model=True, pairwise=True, takes_questions=True),
    "rubric_prefers_text": Judge("rubric preference (both orders)", f"{_MODEL}:rubric_prefers", needs_model=True, pairwise=True, takes_questions=True),
}  # fmt: skip
