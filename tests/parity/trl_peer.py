"""TRL's trainers and our objectives on the same tiny causal model and batch, in float32.

TRL's loss is its trainer's `_compute_loss` (CPO and ORPO: `get_batch_loss_metrics`), with settings written to the
trainer. Our loss is the mean over pairs of the objective, on token log-probs computed from plain logits. If TRL deviates,
`Comparison.adapted` describes the change on our side that reproduces TRL's value. Nothing else differs.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from dpo_mm import objectives
from dpo_mm.objectives import MPO, LogProbs, mixture

VOCABULARY = 64
SEED = 3
"""With this seed chosen and rejected have different orders (for AOT), TRL's z for KTO is above 0, and log-ratios have
both signs."""
PAIRS = [
    {"prompt_ids": [5, 9, 11], "chosen_ids": [21, 22, 23, 24, 25], "rejected_ids": [31, 32, 33]},
    {"prompt_ids": [6, 7], "chosen_ids": [41, 42], "rejected_ids": [43, 44, 45, 46, 47, 48]},
    {"prompt_ids": [8, 9, 10, 12], "chosen_ids": [51, 13, 52, 14], "rejected_ids": [53, 15, 54, 16]},
    {"prompt_ids": [17, 18, 19], "chosen_ids": [60, 61, 62], "rejected_ids": [20, 63, 26, 27, 28]},
]
"""Four pairs with completions of 2 to 6 tokens. In some the chosen one is longer, in others the rejected one."""


@dataclass(frozen=True)
class Ours:
    """Log-probs on our side: of whole completions, (pairs,), and of their tokens, (pairs, length).

    Tuples are (chosen, rejected). A mask is 1 at a completion's tokens and 0 at padding.
    """

    policy: LogProbs
    reference: LogProbs
    tokens: tuple[Tensor, Tensor]
    reference_tokens: tuple[Tensor, Tensor]
    masks: tuple[Tensor, Tensor]
    collisions: tuple[Tensor, Tensor]
    prompt_and_chosen: Tensor
    """Log-probs of all tokens of the chosen sequences, prompts included, (tokens,)."""
    z: Tensor
    """TRL's reference point for KTO, a scalar."""


@dataclass(frozen=True)
class Comparison:
    """One objective with one setting, in our code and in TRL's."""

    objective: str
    peer: str
    ours: Callable[[Ours], Tensor]
    theirs: Callable[[Peer], Tensor]
    adapted: str = ""


@dataclass(frozen=True)
class Difference:
    """Differences between the two sides.

    The value's is absolute, or relative if TRL's value is above 1. The gradient's is the norm of the difference divided
    by the norm of TRL's gradient.
    """

    value: float
    gradient: float


class Peer:
    """TRL's trainers, with copies of one policy and one reference."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.25,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        self.reference = LlamaForCausalLM(config).eval()
        self.policy = copy.deepcopy(self.reference)
        with torch.no_grad():
            for weights in self.policy.parameters():
                weights += 0.04 * torch.randn_like(weights)
        self.folder = tempfile.TemporaryDirectory()
        self.tokenizer = tokenizer()

    def options(self) -> dict[str, Any]:
        return {
            "output_dir": self.folder.name,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }

    @functools.cached_property
    def dpo(self) -> Any:
        text = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["e f"] * 4})
        return DPOTrainer(
            model=copy.deepcopy(self.policy),
            ref_model=copy.deepcopy(self.reference),
            args=DPOConfig(use_weighting=True, **self.options()),
            processing_class=self.tokenizer,
            train_dataset=text,
        )

    @functools.cached_property
    def kto(self) -> Any:
        text = Dataset.from_dict({"prompt": ["a b"] * 4, "completion": ["c d"] * 4, "label": [True, False] * 2})
        return KTOTrainer(
            model=copy.deepcopy(self.policy),
            ref_model=copy.deepcopy(self.reference),
            args=KTOConfig(train_sampling_strategy="sequential", **self.options()),
            processing_class=self.tokenizer,
            train_dataset=text,
        )

    @functools.cached_property
    def cpo(self) -> Any:
        return self._without_reference(CPOTrainer, CPOConfig)

    @functools.cached_property
    def orpo(self) -> Any:
        return self._without_reference(ORPOTrainer, ORPOConfig)

    def _without_reference(self, trainer: Any, config: Any) -> Any:
        text = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["e f"] * 4})
        return trainer(
            model=copy.deepcopy(self.policy),
            args=config(max_length=64, remove_unused_columns=False, **self.options()),
            processing_class=self.tokenizer,
            train_dataset=text,
        )

    def ours(self, pairs: list[dict[str, list[int]]] = PAIRS) -> tuple[Ours, LlamaForCausalLM]:
        """Return our log-probs, and the model that their gradients belong to."""
        model = copy.deepcopy(self.policy)
        policy = _token_log_probs(model, pairs)
        with torch.no_grad():
            reference = _token_log_probs(self.reference, pairs)
        chosen = [pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs]
        prompt_and_chosen = [
            model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]] for ids in chosen
        ]
        ours = Ours(
            policy=_sequence_log_probs(policy),
            reference=_sequence_log_probs(reference),
            tokens=(policy[0].tokens, policy[1].tokens),
            reference_tokens=(reference[0].tokens, reference[1].tokens),
            masks=(policy[0].mask, policy[1].mask),
            collisions=(policy[0].collision, policy[1].collision),
            prompt_and_chosen=torch.cat(prompt_and_chosen),
            z=mismatched_z(self),
        )
        return ours, model


@dataclass(frozen=True)
class _Completions:
    tokens: Tensor
    mask: Tensor
    collision: Tensor


def _token_log_probs(model: Any, pairs: list[dict[str, list[int]]]) -> tuple[_Completions, _Completions]:
    """Token log-probs of chosen and rejected, from one forward pass per sequence, so without padding."""
    sides = []
    for key in ("chosen_ids", "rejected_ids"):
        rows = []
        for pair in pairs:
            ids, start = pair["prompt_ids"] + pair[key], len(pair["prompt_ids"])
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[start - 1 :]
            rows.append((scores[range(len(scores)), pair[key]], (2 * scores).logsumexp(-1)))
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = pad([torch.ones(len(row)) for row, _ in rows])
        sides.append(_Completions(pad([row for row, _ in rows]), mask, pad([collision for _, collision in rows])))
    return sides[0], sides[1]


def _sequence_log_probs(sides: tuple[_Completions, _Completions]) -> LogProbs:
    (w, l), (n_w, n_l) = ((s.tokens * s.mask).sum(1) for s in sides), (s.mask.sum(1) for s in sides)  # noqa: E741
    return LogProbs(w, l, n_w, n_l, is_likelihood=True)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


# TRL's side


def trl_dpo(
    loss: str | dict[str, float],
    *,
    beta: float = 0.3,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    pairs: list[dict[str, list[int]]] = PAIRS,
) -> Callable[[Peer], Tensor]:
    """The loss of DPOTrainer with these settings."""

    def theirs(peer: Peer) -> Tensor:
        trainer = peer.dpo
        weights = {loss: 1.0} if isinstance(loss, str) else loss
        trainer.loss_types, trainer.loss_weights = list(weights), list(weights.values())
        trainer.beta, trainer.label_smoothing, trainer.ld_alpha = beta, label_smoothing, ld_alpha
        trainer.f_divergence_type, trainer.f_alpha_divergence_coef = divergence, alpha
        trainer.use_weighting = use_weighting
        return trainer._compute_loss(trainer.model, trainer.data_collator(pairs), False)

    return theirs


def trl_kto(loss: str, *, chosen_weight: float = 1.0, rejected_weight: float = 1.0) -> Callable[[Peer], Tensor]:
    """The loss of KTOTrainer, where chosen and rejected are separate rows.

    For its KL term, each prompt gets the completion of the row before.
    """

    def theirs(peer: Peer) -> Tensor:
        trainer = peer.kto
        trainer.loss_type, trainer.beta, trainer.calculate_KL = loss, 0.3, loss == "kto"
        trainer.desirable_weight, trainer.undesirable_weight = chosen_weight, rejected_weight
        return trainer._compute_loss(trainer.model, trainer.data_collator(unpaired()), False)

    return theirs


def unpaired() -> list[dict[str, Any]]:
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[key], "label": key == "chosen_ids"}
        for pair in PAIRS
        for key in ("chosen_ids", "rejected_ids")
    ]
    return [row | {"KL_completion_ids": rows[n - 1]["completion_ids"]} for n, row in enumerate(rows)]


def trl_cpo(
    loss: str, *, beta: float = 0.3, label_smoothing: float = 0.0, nll_weight: float = 1.0
) -> Callable[[Peer], Tensor]:
    def theirs(peer: Peer) -> Tensor:
        trainer = peer.cpo
        trainer.loss_type, trainer.beta, trainer.label_smoothing = loss, beta, label_smoothing
        trainer.cpo_alpha, trainer.simpo_gamma = nll_weight, 1.375
        return trainer.get_batch_loss_metrics(trainer.model, padded())[0]

    return theirs


def trl_orpo(peer: Peer) -> Tensor:
    peer.orpo.beta = 0.1
    return peer.orpo.get_batch_loss_metrics(peer.orpo.model, padded())[0]


def padded() -> dict[str, Tensor]:
    """The batch in the format of TRL's older collator."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in PAIRS]
        labels = [[-100] * len(pair["prompt_ids"]) + pair[f"{side}_ids"] for pair in PAIRS]
        for name, values, fill in (
            ("input_ids", rows, 0),
            ("attention_mask", [[1] * len(row) for row in rows], 0),
            ("labels", labels, -100),
        ):
            tensors = [torch.tensor(row) for row in values]
            padded_rows = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
            batch[f"{side}_{name}"] = padded_rows
    return batch


# Our side


def plain(
    name: str,
    *,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    data: dict[str, Tensor] | None = None,
    **settings: float,
) -> Callable[[Ours], Tensor]:
    """The mean over pairs of an objective of the table OBJECTIVES."""
    if "beta" in objectives.keyword_settings(name):
        settings.setdefault("beta", 0.3)
    loss = mixture({name: 1.0}, settings, divergence=divergence, divergence_alpha=alpha)
    return lambda ours: loss(ours.policy, ours.reference, data or {}).mean()


def token_mean_sft(ours: Ours) -> Tensor:
    """TRL's SFT term, which is the mean over all tokens of the batch."""
    return -(ours.tokens[0] * ours.masks[0]).sum() / ours.masks[0].sum()


def mpo(ours: Ours) -> Tensor:
    loss = mixture({name: weight for name, weight in MPO.items() if name != "sft"}, {"beta": 0.3})
    data = {"reward_shift": torch.tensor(0.0)}
    return loss(ours.policy, ours.reference, data).mean() + MPO["sft"] * token_mean_sft(ours)


def ld_dpo(ld_alpha: float) -> Callable[[Ours], Tensor]:
    """The sigmoid loss on length-desensitised log-probs of policy and reference (LD-DPO)."""

    def loss(ours: Ours) -> Tensor:
        sides = [
            objectives.shared_length(*tokens, *ours.masks, ld_alpha=ld_alpha)
            for tokens in (ours.tokens, ours.reference_tokens)
        ]
        terms = ours.policy.num_tokens_chosen, ours.policy.num_tokens_rejected
        policy, reference = (LogProbs(*side, *terms, is_likelihood=True) for side in sides)
        return objectives.sigmoid(policy, reference, beta=0.3).mean()

    return loss


def wpo(name: str, **settings: float) -> Callable[[Ours], Tensor]:
    """The loss of each pair times the weights of chosen and rejected (WPO)."""

    def loss(ours: Ours) -> Tensor:
        sides = zip(ours.tokens, ours.masks, ours.collisions, strict=True)
        chosen, rejected = (objectives.on_policy_weight(*side) for side in sides)
        losses = mixture({name: 1.0}, {"beta": 0.3, **settings})(ours.policy, ours.reference, {})
        return (losses * chosen * rejected).mean()

    return loss


def kto(ours: Ours, **weights: float) -> Tensor:
    return objectives.kto(ours.policy, ours.reference, beta=0.3, z=ours.z, **weights).mean() / 2


def mismatched_z(peer: Peer) -> Tensor:
    """TRL's reference point for KTO: the mean reward of completions paired with the next row's prompt, at least 0."""
    rows = [{"prompt_ids": row["prompt_ids"], "chosen_ids": row["KL_completion_ids"]} for row in unpaired()]
    both = [row | {"rejected_ids": row["chosen_ids"]} for row in rows]
    with torch.no_grad():
        ratio = (
            _sequence_log_probs(_token_log_probs(peer.policy, both)).chosen
            - _sequence_log_probs(_token_log_probs(peer.reference, both)).chosen
        )
    return (0.3 * ratio.mean()).clamp(min=0)


def orpo(ours: Ours) -> Tensor:
    term = objectives.orpo(ours.policy, ratio_weight=0.1) - objectives.sft(ours.policy)
    return term.mean() - ours.prompt_and_chosen.mean()


def cpo(ours: Ours, *, label_smoothing: float = 0.0) -> Tensor:
    term = objectives.cpo(ours.policy, beta=0.3, nll_weight=0.0, label_smoothing=label_smoothing)
    return term.mean() + token_mean_sft(ours)


TOKEN_MEAN = "SFT term as a mean over the batch's tokens, not a mean per pair"
ZERO = {"reward_shift": torch.tensor(0.0)}
THEIR_DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


def comparisons() -> list[Comparison]:
    """All comparisons: every objective that we and TRL both implement."""
    table = [
        Comparison(name, f"DPOTrainer {name}", plain(name), trl_dpo(name))
        for name in ("sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero")
    ]
    table += [
        Comparison(name, f"DPOTrainer {name}", plain(name), trl_dpo(name))
        for name in ("apo_down", "discopop", "sigmoid_norm")
    ]
    table += [
        Comparison(
            f"{name}, label_smoothing {e:g}",
            f"DPOTrainer {name}",
            plain(name, label_smoothing=e),
            trl_dpo(name, label_smoothing=e),
        )
        for name, e in (("robust", 0.1), ("exo_pair", 1e-3), ("exo_pair", 0.1), ("aot", 0.1), ("aot_unpaired", 0.1))
    ]
    table += [
        Comparison(
            "bco_pair, reward_shift 0",
            "DPOTrainer bco_pair",
            plain("bco_pair", data=ZERO),
            trl_dpo("bco_pair"),
            "no running mean",
        ),
        Comparison("sft", "DPOTrainer sft", token_mean_sft, trl_dpo("sft"), TOKEN_MEAN),
        Comparison(
            "MPO", "DPOTrainer sigmoid + bco_pair + sft", mpo, trl_dpo(dict(MPO)), f"no running mean; {TOKEN_MEAN}"
        ),
    ]
    table += [
        Comparison(
            f"{name}, {ours}{f' {alpha:g}' if ours == 'alpha' else ''}",
            f"DPOTrainer {name}, {theirs}",
            plain(name, divergence=ours, alpha=alpha, **extra),
            trl_dpo(name, divergence=theirs, alpha=alpha, label_smoothing=extra.get("label_smoothing", 0.0)),
        )
        for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
        for ours, theirs in THEIR_DIVERGENCES.items()
        for alpha in ((0.5, 2.0) if ours == "alpha" else (0.5,))
        for extra in ({"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {},)
    ]
    table += [
        Comparison(f"LD-DPO, ld_alpha {a:g}", "DPOTrainer ld_alpha", ld_dpo(a), trl_dpo("sigmoid", ld_alpha=a))
        for a in (0.0, 0.5, 1.0)
    ]
    table += [
        Comparison("WPO sigmoid", "DPOTrainer use_weighting", wpo("sigmoid"), trl_dpo("sigmoid", use_weighting=True)),
        Comparison("WPO ipo", "DPOTrainer use_weighting", wpo("ipo"), trl_dpo("ipo", use_weighting=True)),
    ]
    table += [
        Comparison(
            "kto",
            "KTOTrainer kto",
            kto,
            trl_kto("kto"),
            "half of the pair's sum; z of mismatched completions",
        ),
        Comparison(
            "kto, weights 1.5 and 0.7",
            "KTOTrainer kto",
            functools.partial(kto, chosen_weight=1.5, rejected_weight=0.7),
            trl_kto("kto", chosen_weight=1.5, rejected_weight=0.7),
            "half of the pair's sum; z of mismatched completions",
        ),
        Comparison(
            "apo_zero",
            "KTOTrainer apo_zero_unpaired",
            lambda ours: plain("apo_zero")(ours) / 2,
            trl_kto("apo_zero_unpaired"),
            "half of the pair's sum",
        ),
        Comparison("orpo", "ORPOTrainer", orpo, trl_orpo, f"likelihood of the prompt too; {TOKEN_MEAN}"),
        Comparison("cpo", "CPOTrainer sigmoid", cpo, trl_cpo("sigmoid"), TOKEN_MEAN),
        Comparison(
            "cpo, label_smoothing 0.1",
            "CPOTrainer sigmoid",
            functools.partial(cpo, label_smoothing=0.1),
            trl_cpo("sigmoid", label_smoothing=0.1),
            TOKEN_MEAN,
        ),
        Comparison("simpo", "CPOTrainer simpo", plain("simpo", beta=2.5), trl_cpo("simpo", beta=2.5, nll_weight=0.0)),
        Comparison(
            "simpo, label_smoothing 0.1",
            "CPOTrainer simpo",
            plain("simpo", beta=2.5, label_smoothing=0.1),
            trl_cpo("simpo", beta=2.5, label_smoothing=0.1, nll_weight=0.0),
        ),
    ]
    return table


def compare(peer: Peer, comparison: Comparison) -> Difference:
    """Compare both values, and both gradients with respect to all weights."""
    ours, model = peer.ours()
    loss = comparison.ours(ours)
    model.zero_grad()
    loss.backward()
    theirs = comparison.theirs(peer)
    trainer = {"DPO": "dpo", "KTO": "kto", "CPO": "cpo", "ORPO": "orpo"}[comparison.peer.split("Trainer")[0]]
    their_model = getattr(peer, trainer).model
    their_model.zero_grad()
    theirs.backward()
    gradient, their_gradient = (_gradient(m) for m in (model, their_model))
    return Difference(
        value=abs(loss.item() - theirs.item()) / max(1.0, abs(theirs.item())),
        gradient=((gradient - their_gradient).norm() / their_gradient.norm()).item(),
    )


def _gradient(model: Any) -> Tensor:
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for _, p in sorted(model.named_parameters())]
    return torch.cat([g.flatten() for g in gradients])
