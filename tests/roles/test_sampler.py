"""The sampler: exact, and keyed to the row and the place."""

import math

import pytest
import torch

from rlhf_ray.roles.protocols import Sampling
from rlhf_ray.roles.sampler import draw, keyed_uniform, sample_by_inversion, seeds_of


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def sample_counts(logits_V: torch.Tensor, sampling: Sampling, n: int = 20_000, position: int = 0) -> torch.Tensor:
    u_B = keyed_uniform(seeds_of(range(n)), position).float()
    chosen, _ = draw(logits_V.repeat(n, 1), u_B, [sampling.temperature] * n, sampling)
    return torch.bincount(chosen, minlength=len(logits_V)).double()


@pytest.mark.parametrize("position", [0, 1, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_draws_from_the_models_distribution(temperature, position):
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -3.0])
    counts = sample_counts(logits_V, Sampling(1, temperature=temperature), position=position)
    # 5 degrees of freedom: above 20.5 once in a thousand. The draws are fixed by the seeds, so it never flickers.
    assert chi_square(counts, torch.softmax(logits_V / temperature, -1).double()) < 20.5
    assert chi_square(counts, torch.softmax(logits_V / 1.2, -1).double()) > 100, "the test can fail"


def test_neighbouring_seeds_and_positions_draw_independently():
    grid = torch.stack([keyed_uniform(torch.arange(2000), t) for t in range(4)])
    assert grid.min() > 0 and grid.max() < 1 and abs(float(grid.mean()) - 0.5) < 0.01
    assert abs(float(grid.var()) - 1 / 12) < 0.003
    corr = torch.corrcoef(grid)
    assert (corr - torch.eye(4)).abs().max() < 0.08, "positions of one seed"
    assert abs(float(torch.corrcoef(torch.stack([grid[0, :-1], grid[0, 1:]]))[0, 1])) < 0.08, "neighbouring seeds"
    assert len(set(grid.flatten().tolist())) == grid.numel()


def test_a_uniform_number_is_pinned():
    """A resumed or re-dispatched request must draw the same tokens in any later version."""
    expected = []
    for seed, position in ((0, 0), (12345, 6), ((1 << 63) - 1, 2)):
        x = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64  # SplitMix64 in plain integers
        for _ in range(2):
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
        expected.append(((x >> 11) + 0.5) / 2**53)
        assert float(keyed_uniform(torch.tensor([seed]), position)[0]) == expected[-1]


def test_inversion_by_hand():
    p_BV = torch.tensor([[0.25, 0.0, 0.5, 0.25]])
    for u, token in ((0.1, 0), (0.2499, 0), (0.26, 2), (0.74, 2), (0.76, 3), (0.9999999, 3)):
        assert sample_by_inversion(p_BV, torch.tensor([u], dtype=torch.float64)).item() == token, u


def test_inversion_never_takes_what_top_p_removed():
    p_BV = torch.tensor([[0.5, 0.5, 0.0]])
    for u in (1 - 1e-9, 1 - 1e-16):
        assert sample_by_inversion(p_BV, torch.tensor([u], dtype=torch.float64)).item() != 2


def test_top_k_and_top_p_are_respected_and_renormalised():
    logits_V = torch.tensor([0.5, 0.3, 0.1, 0.07, 0.03]).log()
    counts = sample_counts(logits_V, Sampling(1, top_k=2))
    assert counts[2:].sum() == 0
    assert chi_square(counts[:2], torch.tensor([0.625, 0.375]).double()) < 10.8
    counts = sample_counts(logits_V, Sampling(1, top_p=0.85))  # 0.5 + 0.3 < 0.85 <= 0.5 + 0.3 + 0.1
    assert counts[3:].sum() == 0
    assert chi_square(counts[:3], torch.tensor([5 / 9, 3 / 9, 1 / 9]).double()) < 13.8


def test_the_probability_after_top_k_is_the_one_sampled_with():
    logits_BV = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for u, token, p in ((0.6, 0, 0.625), (0.63, 1, 0.375)):
        token_B, logp_B = draw(logits_BV, torch.tensor([u]), [1.0], Sampling(1, top_k=2))
        assert token_B.item() == token and math.exp(logp_B.item()) == pytest.approx(p, rel=1e-6)


def test_rows_of_different_temperatures():
    """Each row is drawn as it would be with the others at its temperature; a row at 0 is greedy."""
    logits_BV, u_B, sampling = torch.tensor([[0.0, 1.0, 2.0]] * 4), torch.tensor([0.1, 0.5, 0.1, 0.3]), Sampling(1)
    chosen_B, logp_B = draw(logits_BV, u_B, [0.5, 2.0, 0.0, 0.5], sampling)
    for temperature, rows in ((0.5, [0, 3]), (2.0, [1])):
        alone_B, alone_logp_B = draw(logits_BV, u_B, [temperature] * 4, sampling)
        assert torch.equal(alone_B[rows], chosen_B[rows]) and torch.equal(alone_logp_B[rows], logp_B[rows])
    # Greedy rows in every place: the keyed draw at 0.1 would not take the likeliest.
    greedy_B, _ = draw(logits_BV, torch.full([4], 0.1), [0.0, 0.0, 0.0, 1.0], sampling)
    assert greedy_B.tolist() == [2, 2, 2, 1]
