"""The formulas against plain float64, worked examples, and what must not matter."""

import math

import pytest
import torch

from exl3.errors import UserError
from exl3.evaluate import metrics
from exl3.evaluate.metrics import Scores, likeliest, row_kld, row_metrics, student_t, summarize

LENGTH, VOCAB = 50, 301


def some_row(seed=0, noise=0.3, length=LENGTH, vocab=VOCAB):
    """Logits, ids and the logits of a reference that is near."""
    random = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(1, length, vocab, generator=random) + 7
    logits = reference + noise * torch.randn(1, length, vocab, generator=random)
    return logits, torch.randint(vocab, (1, length), generator=random), reference


def plain(logits, ids, reference):
    """The same, as one would write it down, in float64."""
    q, p = (torch.log_softmax(x[0].double(), -1) for x in (logits, reference))
    return {
        "nll": torch.stack([-q[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1)]),
        "kld": (p.exp() * (p - q)).sum(-1),
        "kld_reversed": (q.exp() * (q - p)).sum(-1),
    }


@pytest.mark.parametrize("noise", [1, 0.1, 1e-2, 1e-3])
def test_as_in_float64(noise):
    row = some_row(noise=noise)
    found, expected = row_metrics(*row), plain(*row)
    for name, values in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=2e-7)
    # Rounding does not add up, and never makes a divergence negative.
    assert found["kld"].mean().item() == pytest.approx(expected["kld"].mean().item(), abs=2e-8)
    assert (found["kld"] > 0).all()


def test_of_chunks(monkeypatch):
    row = some_row()
    whole = row_metrics(*row)
    monkeypatch.setattr(metrics, "CHUNK", 7 * VOCAB)  # the last of 50 positions is alone
    for name, values in row_metrics(*row).items():
        assert torch.equal(values, whole[name])
    assert [*whole["agreement"].shape] == [5, LENGTH]


def test_two_tokens_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    reference = torch.stack([p, q, p]).log()[None]
    logits = torch.stack([q, q, q]).log()[None]
    found = row_metrics(logits, torch.tensor([[0, 1, 0]]), reference)
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    backward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert found["kld"].tolist() == pytest.approx([forward, 0, forward])
    assert found["kld_reversed"].tolist() == pytest.approx([backward, 0, backward])
    assert found["nll"].tolist() == pytest.approx([-math.log(0.1), -math.log(0.9)])
    # 0.5 and 0.5: the lower id comes first, which is the other model's order too.
    assert found["agreement"].all()


def test_a_shift_of_the_logits_changes_nothing():
    logits, ids, reference = some_row()
    found = row_metrics(logits + 64, ids, reference - 32)
    for name, values in row_metrics(logits, ids, reference).items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5)


def test_identical_models_differ_by_exactly_nothing():
    logits, ids, _ = some_row()
    found = row_metrics(logits, ids, logits)
    assert not found["kld"].any() and not found["kld_reversed"].any()
    assert found["agreement"].all()


def test_a_float16_reference():
    logits, ids, reference = some_row()
    half = row_metrics(logits, ids, reference.half())
    assert torch.equal(half["kld"], row_metrics(logits, ids, reference.half().float())["kld"])
    torch.testing.assert_close(half["kld"], plain(logits, ids, reference)["kld"], rtol=0.02, atol=0)


def test_tokens_that_both_models_exclude():
    logits, ids, reference = some_row()
    ids = ids.clamp_max(VOCAB - 3)
    expected = row_metrics(logits[..., :-2], ids, reference[..., :-2])
    logits[..., -2:] = -math.inf
    reference[..., -2:] = -math.inf
    found = row_metrics(logits, ids, reference)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_tokens_that_one_model_excludes():
    reference = torch.tensor([[[0.0, 0.0, -200.0], [0.0, 0.0, 0.0]]])
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]]])
    found = row_metrics(logits, torch.tensor([[0, 2]]), reference)
    # What float32 holds for impossible is no difference; what the reference expects is infinite.
    assert found["kld"].tolist() == [pytest.approx(0), math.inf]
    assert found["kld_reversed"].tolist() == pytest.approx([0, math.log(1.5)])
    assert found["nll"].tolist() == [math.inf]
    assert summarize([found]).ppl == math.inf


def test_what_is_not_a_number_stays_so():
    logits, ids, reference = some_row()
    logits[0, 3, 5] = math.nan
    found = row_metrics(logits, ids, reference)
    assert found["kld"].isnan().tolist() == [i == 3 for i in range(LENGTH)]
    summary = summarize([found])
    assert math.isnan(summary.ppl) and math.isnan(summary.divergence.mean)


def test_agreement_is_of_the_same_tokens_in_the_same_order():
    reference = torch.arange(8.0).flip(0)[None, None].repeat(1, 4, 1)
    logits = reference.clone()
    logits[0, 1, [0, 1]] = logits[0, 1, [1, 0]]  # the first two change places
    logits[0, 2, [3, 4]] = logits[0, 2, [4, 3]]
    logits[0, 3, 7] = 3.5  # takes the fifth place
    agreement = row_metrics(logits, torch.zeros(1, 4, dtype=torch.int64), reference)["agreement"]
    assert agreement.T.int().tolist() == [[1] * 5, [0] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_the_lower_of_equally_likely_tokens_comes_first():
    logits = torch.zeros(3, 1000)
    logits[1] = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    logits[2, [30, 900, 20, 500]] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    ids = likeliest(logits)
    assert ids[0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(ids[1], logits[1].argsort(descending=True)[:5])
    assert ids[2].tolist() == [900, 20, 30, 500, 0]


def test_without_a_reference():
    logits, ids, _ = some_row()
    alone = row_metrics(logits, ids)
    assert alone.keys() == {"nll"}
    summary = summarize([alone, row_metrics(*some_row(1))])
    assert summary.rows == 2 and summary.reference_rows == 1
    assert summary.divergence.mean == pytest.approx(plain(*some_row(1))["kld"].mean().item())
    nll = torch.cat([plain(*some_row(seed))["nll"] for seed in (0, 1)])
    assert summary.ppl == pytest.approx(nll.mean().exp().item())
    assert summarize([alone]).divergence is None


def test_summary_against_plain_formulas():
    rows = [some_row(seed) for seed in range(6)]
    summary = summarize([row_metrics(*row) for row in rows])
    found = [plain(*row) for row in rows]
    kld = torch.cat([f["kld"] for f in found])
    means = torch.stack([f["kld"].mean() for f in found])
    told = summary.divergence
    assert told.mean == pytest.approx(kld.mean().item())
    assert told.ci95 == pytest.approx(2.5706 * means.std().item() / math.sqrt(6), rel=1e-3)
    assert told.median == pytest.approx(kld.quantile(0.5).item())
    assert told.p90 == pytest.approx(kld.quantile(0.9).item())
    assert told.p99 == pytest.approx(kld.quantile(0.99).item())
    assert told.reversed == pytest.approx(torch.cat([f["kld_reversed"] for f in found]).mean())
    assert 1 > told.agreement[0] > told.agreement[4] > 0
    nll = torch.stack([f["nll"].mean() for f in found])
    assert summary.ppl == pytest.approx(nll.mean().exp().item())
    error = summary.ppl * nll.std().item() / math.sqrt(6)
    assert summary.ppl_error == pytest.approx(error)


def test_rows_of_other_lengths_count_by_their_tokens():
    rows = [some_row(0, length=20), some_row(1, length=60)]
    kld = torch.cat([plain(*row)["kld"] for row in rows])
    assert summarize([row_metrics(*r) for r in rows]).divergence.mean == pytest.approx(kld.mean())


def test_of_a_single_row_the_tokens_are_the_sample():
    row = some_row()
    kld = plain(*row)["kld"]
    expected = 2.0096 * kld.std().item() / math.sqrt(LENGTH)
    assert summarize([row_metrics(*row)]).divergence.ci95 == pytest.approx(expected, rel=1e-4)


def test_correlated_tokens_do_not_make_errors_small():
    rows = [{"nll": torch.full((1000,), float(level))} for level in (1, 2, 3)]
    assert summarize(rows).ppl_error == pytest.approx(math.exp(2) / math.sqrt(3))


def test_students_t():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 10: 2.2281, 30: 2.0423, 249: 1.9695}
    for freedom, expected in table.items():
        assert student_t(freedom) == pytest.approx(expected, rel=1.2e-3)
    assert math.isnan(student_t(0))


def test_what_does_not_belong_together_is_refused():
    logits, ids, reference = some_row()
    with pytest.raises(UserError, match="predicts 300 tokens, the model 301"):
        row_metrics(logits, ids, reference[..., :-1])
    with pytest.raises(UserError, match="a row of 49 tokens, not of 50"):
        row_metrics(logits, ids, reference[:, :-1])
    with pytest.raises(UserError, match="the token 400, but the model knows only 301"):
        row_metrics(logits, ids.index_fill(1, torch.tensor(3), 400))


def test_scores_are_the_same_numbers():
    rows = [some_row(seed) for seed in range(3)]
    logits, ids, reference = (torch.cat(part) for part in zip(*rows, strict=True))
    scores = Scores()
    scores.add(reference, logits, ids)
    summary = summarize([row_metrics(*row) for row in rows])
    assert scores.kld == pytest.approx(summary.divergence.mean)
    assert scores.perplexity == pytest.approx(summary.ppl)
    assert scores.top1 == pytest.approx(summary.divergence.agreement[0])


@pytest.mark.parametrize("shape", [(1, LENGTH, VOCAB + 1), (1, LENGTH - 1, VOCAB)])
def test_kld_alone_refuses_a_reference_of_another_model_or_row(shape):
    logits, *_ = some_row()
    with pytest.raises(UserError, match="vocabulary" if shape[1] == LENGTH else "dataset"):
        row_kld(logits, torch.zeros(shape))
