"""KL with a positive control for each null, perplexity, repetition and behavior fractions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensteer.behaviors import BEHAVIORS, Span
from lensteer.errors import LensteerError
from lensteer.metrics import Fraction, behavior_fractions, kl_divergence, perplexity, repetition


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kl_of_two_coins_by_hand():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(p, q).item() == pytest.approx(by_hand, rel=1e-6)
    assert kl_divergence(q, p).item() != pytest.approx(by_hand, rel=0.05)  # it has a direction


def test_kl_agrees_with_torch_when_the_log_target_is_said():
    p, q = logits(7, 50, seed=1), logits(7, 50, seed=2)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    right = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), right)
    # The trap: log-probabilities taken for probabilities. Not merely a factor away; not a number at all.
    trap = torch.nn.functional.kl_div(log_q, log_p, reduction="none").sum(-1)
    assert trap.isnan().all()


def test_kl_is_zero_at_equality_only_and_its_gradient_too():
    p = logits(5, 40).double().requires_grad_()
    assert torch.equal(kl_divergence(p, p + 3.0), torch.zeros(5).double())  # logits have a free constant
    (flat,) = torch.autograd.grad(kl_divergence(p.detach(), p).sum(), p)
    assert flat.abs().max() < 1e-12  # first order vanishes: no linear attribution of KL(p‖p) exists
    (steep,) = torch.autograd.grad(kl_divergence(p.detach().roll(1, 0), p).sum(), p)
    assert steep.abs().max() > 1e-2


def test_kl_of_nearby_rows_keeps_its_digits():
    p = logits(1, 1000)
    step = torch.randn(1, 1000, generator=torch.Generator().manual_seed(3))
    prob = p.double().softmax(-1)
    for size in (1e-2, 1e-3):
        moved = p.double() + size * step
        variance = (prob * step.square()).sum() - (prob * step).sum().square()
        assert kl_divergence(p.double(), moved).item() == pytest.approx(0.5 * size**2 * variance.item(), rel=0.05)


def test_kl_broadcasts_and_survives_excluded_tokens():
    p, q = logits(1, 20), logits(6, 20, seed=1)
    assert torch.equal(kl_divergence(p, q), kl_divergence(p.expand(6, 20), q))
    masked = torch.tensor([0.0, 1.0, -torch.inf])
    open_ = torch.tensor([0.0, 1.0, 0.5])
    assert kl_divergence(masked, masked).item() == 0.0
    assert 0 < kl_divergence(masked, open_).item() < math.inf
    assert kl_divergence(open_, masked).item() == math.inf
    broken = torch.tensor([0.0, 1.0, torch.nan])
    assert kl_divergence(open_, broken).isnan()
    assert kl_divergence(broken, open_).isnan()


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    assert perplexity(torch.zeros(2, 9, 32), ids) == pytest.approx(32)


def test_perplexity_scores_each_token_under_the_position_before_it():
    ids = torch.tensor([[3, 1, 4, 1]])
    knowing = torch.full((1, 4, 8), -30.0)
    knowing[0, torch.arange(3), ids[0, 1:]] = 30.0
    assert perplexity(knowing, ids) == pytest.approx(1.0)
    assert perplexity(knowing.roll(1, 1), ids) > 1e10  # one position off
    padded = torch.tensor([[3, 1, 4, 7]])
    assert perplexity(knowing, padded) > 1e8
    assert perplexity(knowing, padded, torch.tensor([[True, True, True, False]])) == pytest.approx(1.0)
    with pytest.raises(LensteerError, match=r"\(1, 1\)"):
        perplexity(torch.zeros(1, 1, 8), torch.tensor([[3]]))


def test_repetition():
    assert repetition(range(50)) == 0.0
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([7] * 104) == pytest.approx(1 - 1 / 101)
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4]) == pytest.approx(1 / 6)
    assert repetition([1, 2, 1, 2], n=1) == 0.5
    with pytest.raises(LensteerError, match="length 0"):
        repetition([1], n=0)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_repetition_counts_what_a_slow_search_finds(ids: list[int], n: int):
    starts = range(len(ids) - n + 1)
    repeated = sum(any(ids[i : i + n] == ids[j : j + n] for j in range(i)) for i in starts)
    assert repetition(ids, n) == pytest.approx(repeated / len(starts) if starts else 0.0)


def test_fractions_keep_unread_sentences_in_the_denominator():
    spans = [
        Span("deduction", 5, 9, 0, 4),
        Span("backtracking", 9, 15, 4, 9),
        Span("deduction", 17, 19, 12, 14),
    ]
    fractions = behavior_fractions(spans, n_sentences=5, n_tokens=20)
    assert tuple(fractions) == BEHAVIORS
    assert fractions["deduction"] == Fraction(2 / 5, 6 / 20)
    assert fractions["backtracking"] == Fraction(1 / 5, 6 / 20)
    assert fractions["adding-knowledge"] == Fraction(0.0, 0.0)
    assert behavior_fractions([], 0, 0)["deduction"] == Fraction(0.0, 0.0)
    with pytest.raises(LensteerError, match="3 spans with 12 tokens do not fit 2 sentences"):
        behavior_fractions(spans, n_sentences=2, n_tokens=20)
