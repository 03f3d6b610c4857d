"""Feedback by rows and columns: the recursion, its objective, and one layer with it."""

import pytest
import torch

import exl3
from exl3 import parallel
from exl3.format.trellis import LENGTH, TILE, matrix_to_tiles, pack
from exl3.ops import decode_trellis
from exl3.quant import linear, two_sided
from exl3.quant.hessian import Hessian, block_ldl, damped
from exl3.quant.ldlq import ldlq, round_plain
from exl3.quant.scale import search_scale, widened_scale
from exl3.quant.two_sided import two_sided_ldlq


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated_hessian(features, seed):
    mix = torch.randn(features, features, generator=generator(seed))
    mix *= torch.logspace(0, -1, features)[:, None]
    hessian = Hessian(features)
    hessian.add(torch.randn(2 * features, features, generator=generator(seed + 1)) @ mix)
    return hessian.mean()


def factors(rows, columns):
    """Damped Hessians of both sides, float64, and their factors, float32."""
    hessians = [
        next(damped(correlated_hessian(n, seed)))[1] for n, seed in ((rows, 1), (columns, 3))
    ]
    return hessians, [block_ldl(h).float() for h in hessians]


def objective(error, hessian_in, hessian_out):
    """tr(H_out E^T H_in E)"""
    error = error.double()
    return float(((hessian_in.double() @ error) * (error @ hessian_out.double())).sum())


def decoded(states, bits, codebook="mcg"):
    return decode_trellis(pack(states, bits), codebook).float()


def straightforward(weight, factor_in, factor_out, bits):
    """The recursion as it is written, tile by tile; returns the errors."""
    error, fed_back = torch.zeros_like(weight), torch.zeros_like(weight)
    for a in reversed(range(0, weight.shape[0], TILE)):
        for c in reversed(range(0, weight.shape[1], TILE)):
            b, d = a + TILE, c + TILE
            across = error[a:b, d:] @ factor_out[d:, c:d]
            down = factor_in[b:, a:b].T @ fed_back[b:, c:d]
            left = weight[a:b, c:d] + across + down
            target = left.clone()
            round_plain(left, bits, "mcg")  # leaves target - value
            error[a:b, c:d] = weight[a:b, c:d] - (target - left)
            fed_back[a:b, c:d] = error[a:b, c:d] + across
    return error


def test_recursion_is_the_straightforward_one():
    weight = torch.randn(128, 256, generator=generator())
    _, both = factors(128, 256)
    error = weight.clone()
    states = two_sided_ldlq(error, *both, 2, "mcg")
    wanted = straightforward(weight, *both, 2)
    assert torch.allclose(error, weight - decoded(states, 2), atol=1e-5)
    # Sums in another order may turn a near tie, and all tiles before it follow; none here.
    assert torch.allclose(error, wanted, atol=1e-4)


def test_targets_follow_their_formula():
    """All targets at once: what rounding left of them is L_in^T E L_out."""
    weight = torch.randn(384, 256, generator=generator(5))
    _, both = factors(384, 256)
    error = weight.clone()
    states = two_sided_ldlq(error, *both, 3, "mul1")
    left = (both[0].double().T @ error.double() @ both[1].double()).float()
    again = round_plain(decoded(states, 3, "mul1") + left, 3, "mul1")
    assert states.shape == (24, 16, LENGTH)
    assert (again == states).float().mean() > 0.99  # but for near ties


@pytest.mark.parametrize("bits", [1, 3])
def test_two_sides_beat_one_on_their_objective(bits):
    weight = torch.randn(256, 384, generator=generator())
    hessians, both = factors(256, 384)
    two, one = weight.clone(), weight.clone()
    two_sided_ldlq(two, *both, bits, "mcg")
    ldlq(one, both[0], bits, "mcg")
    assert objective(two, *hessians) < 0.65 * objective(one, *hessians)


def test_independent_outputs_give_the_one_sided_result():
    weight = torch.randn(256, 384, generator=generator())
    _, (factor_in, _) = factors(256, 384)
    two, one = weight.clone(), weight.clone()
    states = two_sided_ldlq(two, factor_in, torch.eye(384), 2, "mcg")
    assert (states == ldlq(one, factor_in, 2, "mcg")).float().mean() > 0.99  # but for near ties


@pytest.mark.parametrize("size", [(128, 128), (512, 128), (128, 640)])
def test_narrow_and_low_matrices(size):
    """Turns without a full square, and squares that are far from each other in one direction."""
    weight = torch.randn(*size, generator=generator(7))
    _, both = factors(*size)
    error = weight.T.contiguous().T  # columns stand together in memory
    states = two_sided_ldlq(error, *both, 2, "mcg")
    assert torch.allclose(error, weight - decoded(states, 2), atol=1e-5)
    assert torch.allclose(error, straightforward(weight, *both, 2), atol=1e-4)


def test_independent_blocks_of_outputs_are_a_block_diagonal_factor(monkeypatch):
    """Also where they are more than are taken together."""
    monkeypatch.setattr(two_sided, "TOGETHER", 2)
    weight = torch.randn(384, 640, generator=generator(8))
    _, (factor_in, _) = factors(384, 640)
    one, other = factors(128, 128)[1]
    blocks = torch.stack([one, other, torch.eye(128), one, other])
    errors = [weight.clone() for _ in range(2)]
    states = [
        two_sided_ldlq(error, factor_in, factor, 2, "mcg")
        for error, factor in zip(errors, (blocks, torch.block_diag(*blocks)), strict=True)
    ]
    assert (states[0] == states[1]).float().mean() > 0.99  # but for near ties
    assert torch.allclose(errors[0], weight - decoded(states[0], 2), atol=1e-5)


def test_the_computed_scale_is_near_the_best():
    weight = torch.randn(256, 256, generator=generator())
    hessians, both = factors(256, 256)
    tiles = matrix_to_tiles(weight).flatten(0, 1)[::4]
    plain, error = search_scale(tiles, torch.full((64,), 1 / 64), 2, "mcg")

    def at(scale):
        lost = weight * scale
        two_sided_ldlq(lost, *both, 2, "mcg")
        return objective(lost, *hessians) / scale**2

    found = widened_scale(plain, error, *both)
    assert found < plain
    assert at(found) < at(plain)
    assert at(found) < 1.04 * min(at(plain * 0.9**i) for i in (0.5, 1, 1.5, 2))
    assert widened_scale(plain, error, torch.eye(256), torch.eye(256)) == pytest.approx(plain)


def test_at_few_bits_the_scale_is_a_little_narrower():
    """By the power of 0.3 of the targets' variance, and never by more than a quarter."""
    _, both = factors(256, 256)
    variance = widened_scale(1.0, 0.01, *both) ** -2
    assert 1 < variance < 2
    narrower = widened_scale(1.0, 0.01, *both, few_bits=True)
    assert narrower == pytest.approx(variance**-0.8, rel=1e-6)
    wide, narrow = (widened_scale(1.0, 10.0, *both, few_bits=few) for few in (False, True))
    assert narrow == pytest.approx(wide / 1.25, rel=1e-6)


def weights(rows=256, columns=384):
    return torch.randn(rows, columns, generator=generator(7)) * 0.02


def test_a_layer_with_both_hessians():
    w, hessian, outputs = weights(), correlated_hessian(256, 1), correlated_hessian(384, 3)
    two = exl3.quantize_linear(w, hessian, 2, output_hessian=outputs)
    one = exl3.quantize_linear(w, hessian, 2)
    assert not two.notes
    lost = [objective(w - result.weight, hessian, outputs) for result in (two, one)]
    assert lost[0] < 0.6 * lost[1]
    assert torch.equal(two.tensors["svh"].sign(), one.tensors["svh"].sign())


def test_arguments_stay_as_they_are():
    given = (weights(), *(correlated_hessian(n, n).double() for n in (256, 384)))
    before = [x.clone() for x in given]
    exl3.quantize_linear(*given[:2], 3, output_hessian=given[2])
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_output_scales_are_part_of_the_outputs_hessian():
    """Channels that matter much have small weights here, and the other way round."""
    scale = torch.logspace(-0.5, 0.5, 256)
    w = weights(256, 256) * scale
    hessian = correlated_hessian(256, 1)
    outputs = correlated_hessian(256, 3) / scale[:, None] / scale
    two = exl3.quantize_linear(w, hessian, 2, output_hessian=outputs)
    one = exl3.quantize_linear(w, hessian, 2)
    lost = [objective(w - result.weight, hessian, outputs) for result in (two, one)]
    assert lost[0] < 0.6 * lost[1]


def test_a_layer_with_independent_outputs_is_the_one_sided_one(monkeypatch):
    """At the same scale: without feedback by outputs another is found."""
    monkeypatch.setattr(linear, "widened_scale", lambda scale, *_: scale)
    w, hessian = weights(), correlated_hessian(256, 1)
    two = exl3.quantize_linear(w, hessian, 3, output_hessian=torch.eye(384), out_scales="never")
    one = exl3.quantize_linear(w, hessian, 3, out_scales="never")
    assert two.proxy_error == pytest.approx(one.proxy_error, rel=1e-3)
    assert (two.weight == one.weight).float().mean() > 0.9  # but for near ties


def test_padding_and_zero_channels():
    w = weights(200, 150)
    w[:, 5] = 0
    w[17] = 0
    hessian, outputs = correlated_hessian(200, 1), correlated_hessian(150, 3)
    outputs[5] = outputs[:, 5] = 0
    two = exl3.quantize_linear(w, hessian, 3, output_hessian=outputs)
    one = exl3.quantize_linear(w, hessian, 3)
    assert two.weight.shape == (200, 150)
    assert not two.weight[:, 5].any()
    assert not two.weight[17].any()
    lost = [objective(w - result.weight, hessian, outputs) for result in (two, one)]
    assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize(
    ("outputs", "note"),
    [
        (torch.zeros(384, 384), "all-zero Hessian"),
        (torch.full((384, 384), float("nan")), "non-finite"),
        (torch.eye(384) + 40 * torch.eye(384).roll(1, 0) + 40 * torch.eye(384).roll(-1, 0), "not"),
    ],
)
def test_useless_output_hessians_leave_one_side(outputs, note):
    w, hessian = weights(), correlated_hessian(256, 1)
    result = exl3.quantize_linear(w, hessian, 3, output_hessian=outputs)
    assert len(result.notes) == 1
    assert note in result.notes[0]
    assert "by inputs only" in result.notes[0]
    one = exl3.quantize_linear(w, hessian, 3)
    assert all(torch.equal(one.tensors[name], result.tensors[name]) for name in one.tensors)


def test_output_damping_lies_between_one_side_and_two():
    w, hessian, outputs = weights(), correlated_hessian(256, 1), correlated_hessian(384, 3)
    lost = [
        objective(w - result.weight, hessian, outputs)
        for result in (
            exl3.quantize_linear(w, hessian, 3, output_hessian=outputs),
            exl3.quantize_linear(w, hessian, 3, output_hessian=outputs, output_damping=1.0),
            exl3.quantize_linear(w, hessian, 3),
        )
    ]
    assert lost[0] < lost[1] < lost[2]


def test_without_input_hessian_outputs_are_not_asked():
    w = weights()
    result = exl3.quantize_linear(w, None, 2, output_hessian=correlated_hessian(384, 3))
    plain = exl3.quantize_linear(w, None, 2)
    assert torch.equal(result.tensors["trellis"], plain.tensors["trellis"])
    assert result.notes == plain.notes


def test_wrong_output_hessian_is_told():
    with pytest.raises(ValueError, match="384 outputs"):
        exl3.quantize_linear(weights(), None, 2, output_hessian=torch.eye(256))


def test_same_bytes_for_any_number_of_threads(monkeypatch):
    w, hessian, outputs = weights(384, 640), correlated_hessian(384, 1), correlated_hessian(640, 3)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(parallel, "_THREADS", threads)
        torch.set_num_threads(threads)
        results.append(exl3.quantize_linear(w, hessian, 2, output_hessian=outputs).tensors)
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_block_diagonal_hessian_is_that_matrix():
    """The blocks alone give what the whole matrix gives, zeros between blocks."""
    w, hessian = weights(), correlated_hessian(256, 1)
    blocks = torch.stack([correlated_hessian(128, n) for n in range(3)])
    whole = exl3.quantize_linear(w, hessian, 3, output_hessian=torch.block_diag(*blocks))
    alone = exl3.quantize_linear(w, hessian, 3, output_hessian=blocks)
    lost = [objective(w - r.weight, hessian, torch.block_diag(*blocks)) for r in (whole, alone)]
    one = exl3.quantize_linear(w, hessian, 3)
    plain = objective(w - one.weight, hessian, torch.block_diag(*blocks))
    assert lost[1] == pytest.approx(lost[0], rel=0.05)
    assert lost[1] < 0.8 * plain
    with pytest.raises(ValueError, match="384 outputs"):
        exl3.quantize_linear(w, hessian, 3, output_hessian=blocks[:2])
