"""Settings of the commands that generate responses."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_mm.config.setting_limits import Settings
from dpo_mm.config.side_set_configs import SideQuestions


@dataclass(frozen=True)
class CompareResponsesConfig(Settings):
    """Settings of a comparison of responses: the base and the tuned model, same held-out questions."""

    model: str
    """Folder or hub id of the base model, or the name of a bundled one."""
    output_dir: str
    """Folder for the responses, their scores and the report."""
    questions: str
    """Name of a synthetic dataset (pages-held-out, scenes-held-out, sums-held-out), Parquet or JSON lines with images,
    prompt and ground_truth, or a file of a published benchmark. They must not be in the training data."""
    adapter: str | None = None
    """Folder or hub id of a LoRA in PEFT's format, or folder of a fully tuned model. null: compare the base with itself."""
    base_adapter: str | None = None
    """Adapter of the base. Use it to compare a second stage of training with the first. null: the base is the model."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub. null: the default branch."""
    max_questions: int | None = None
    """Largest number of questions. null: all of a file, 400 of a synthetic dataset."""
    part: str | None = None
    """k/n: compare on the k-th of n random parts of the questions, which have no question in common. Take another part for each
    decision. null: all questions."""
    judges: tuple[str, ...] = ("degeneration", "cer", "num_tokens")
    """Names of judges of responses, or module:function. The first one is the primary metric, unless it is learned and
    built the training pairs."""
    guards: tuple[str, ...] = ()
    """Guardrail metrics: judges from the list above that must not get significantly worse."""
    rubric: str | None = None
    """What judges that are a model grade by, for questions without a column `rubric`. null: the judge's own rubric."""
    side_sets: tuple[SideQuestions, ...] = ()
    """Further questions that must not get significantly worse by a judge: names of files or synthetic datasets, or questions,
    judges and max_questions of each."""
    max_new_tokens: int = 512
    """Largest number of tokens per response. Longer responses are truncated."""
    temperature: float = 0.0
    """Sampling temperature. 0: greedy decoding."""
    batch_size: int = 16
    """Responses that are generated at once, or requests to the server at once. Decrease it if memory runs out."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of the models. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    min_pixels: int | None = None
    """Smallest number of pixels of an image. Smaller ones are enlarged by processors that have this limit. null: the model's."""
    max_pixels: int | None = None
    """Largest number of pixels of an image. Larger ones are reduced by processors that have this limit, such as Qwen's, where
    28 x 28 or 32 x 32 pixels are a token. Train, mine and compare with the same value. null: the model's."""
    quantize: str | None = None
    """nf4 | int8 | fp8. Quantises the linear layers of the language model, as in training. It needs the extra `quantized`."""
    seed: int = 0
    """Seed of sampled responses."""
    server: str | None = None
    """Address of an OpenAI-compatible server that responds instead of a model in this process, such as
    http://127.0.0.1:8000/v1. Its key comes from the environment: DPO_MM_API_KEY or OPENAI_API_KEY."""
    served: str | None = None
    """Name under which the server offers the base model."""
    served_tuned: str | None = None
    """Name under which the server offers the tuned model. `adapter` then only names its folder, for the judges that built its
    training pairs and for its model card."""
    server_timeout: float = 600.0
    """Seconds that the server may be silent in one request."""
    overwrite: bool = False
    """Remove an earlier report in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""


@dataclass(frozen=True)
class MineResponsesConfig(Settings):
    """Settings for building pairs from a model's own failures: its worst response against a better one."""

    model: str
    """Folder or hub id of the model that responds, or the name of a bundled one."""
    questions: str
    """Name of a synthetic dataset (pages-train, scenes-train, sums-train), Parquet or JSON lines with images, prompt
    and ground_truth, or a file of a published benchmark."""
    output_dir: str
    """Folder for the pairs. They are in pairs.parquet."""
    judges: tuple[str, ...] | str
    """The judge that finds failures. Exactly one."""
    adapter: str | None = None
    """Folder or hub id of a LoRA, or folder of a tuned model, to respond with. null: the base model."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub. null: the default branch."""
    rubric: str | None = None
    """What a judge that is a model grades by, for questions without a column `rubric`. null: the judge's own rubric."""
    chosen: str = "ground_truth"
    """ground_truth | best | corrected. best: the model's best response, by the judge and then by `tie_break`. corrected: the
    rejected response, in which only the mistakes that the judge flagged are corrected."""
    tie_break: str = "recall"
    """Judge that decides between responses with equal scores if chosen is best."""
    responses_per_question: int = 1
    """Number of responses per question: one greedy, the others sampled. best needs at least 2."""
    temperature: float = 1.0
    """Sampling temperature of the sampled responses."""
    min_score_gap: float = 0.0
    """Chosen and rejected must differ by more than this in the judge's score."""
    max_new_tokens: int = 512
    """Largest number of tokens per response. Longer responses are truncated."""
    max_questions: int | None = None
    """Largest number of questions. null: all of a file, 400 of a synthetic dataset."""
    batch_size: int = 16
    """Responses that are generated at once, or requests to the server at once. Decrease it if memory runs out."""
    precision: str = "auto"
    """auto | fp32 | bf16 | fp16. Precision of the model. auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    min_pixels: int | None = None
    """Smallest number of pixels of an image. Smaller ones are enlarged by processors that have this limit. null: the model's."""
    max_pixels: int | None = None
    """Largest number of pixels of an image. Larger ones are reduced by processors that have this limit, such as Qwen's, where
    28 x 28 or 32 x 32 pixels are a token. Train, mine and compare with the same value. null: the model's."""
    quantize: str | None = None
    """nf4 | int8 | fp8. Quantises the linear layers of the language model, as in training. It needs the extra `quantized`."""
    seed: int = 0
    """Seed of the sampled responses."""
    shard_size: int = 128
    """Questions per shard. An interrupted run resumes after the last complete shard."""
    server: str | None = None
    """Address of an OpenAI-compatible server that responds instead of a model in this process, such as
    http://127.0.0.1:8000/v1. Its key comes from the environment: DPO_MM_API_KEY or OPENAI_API_KEY."""
    served: str | None = None
    """Name under which the server offers the model."""
    server_timeout: float = 600.0
    """Seconds that the server may be silent in one request."""
    overwrite: bool = False
    """Remove an earlier result in output_dir first. Only files that dpo-mm wrote and that are unchanged are removed."""

    @property
    def judge(self) -> str:
        """Name of the one judge.

        Raises:
            ValueError: if `judges` names several or none.
        """
        names = self.judges.split(",") if isinstance(self.judges, str) else list(self.judges)
        if len(names) != 1:
            raise ValueError(f"judges {', '.join(names)!r}: responses are mined with exactly one judge")
        return names[0]
