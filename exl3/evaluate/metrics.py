"""How far a quant's predictions are from the original's. Formulas on logits; no model here."""

import math
from dataclasses import dataclass

import torch


@dataclass
class Scores:
    """Sums over positions of one model against the reference; all positions of all rows count."""

    kld_sum: float = 0.0  # nats
    agreed: int = 0  # positions with the same most likely token
    positions: int = 0
    nll_sum: float = 0.0  # nats, of the tokens that follow
    tokens: int = 0

    def add(self, reference: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Adds rows: both logits (rows, cols, vocab), ids (rows, cols)."""
        expected, got = log_softmax(reference), log_softmax(logits)
        self.kld_sum += kl_divergence(expected, got).double().sum().item()
        self.agreed += int((expected.argmax(-1) == got.argmax(-1)).sum())
        self.positions += ids.numel()
        self.nll_sum += next_token_nll(got, ids).double().sum().item()
        self.tokens += ids[:, 1:].numel()

    @property
    def kld(self) -> float:
        """Mean KL divergence D(reference || model) a position, in nats."""
        return self.kld_sum / self.positions

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of every token given those before it."""
        mean = self.nll_sum / self.tokens
        return math.inf if mean > 700 else math.exp(mean)  # NaN stays NaN

    @property
    def top1(self) -> float:
        """Share of positions where both models find the same token most likely."""
        return self.agreed / self.positions


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32."""
    return torch.log_softmax(logits.float(), -1)


def kl_divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """D(expected || got) of log-probabilities (..., vocab), in nats (...)."""
    return (expected.exp() * (expected - got)).sum(-1)


def next_token_nll(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """-log p(ids[:, 1:]), (rows, cols - 1), under log_probs (rows, cols, vocab)."""
    return -log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
