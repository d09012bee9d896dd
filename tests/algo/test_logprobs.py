from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.algo import logprobs
from rlhf_ray.algo.logprobs import entropy_at, logprobs_at, token_entropy, token_logprobs


def test_logits_at_t_minus_1_predict_token_t():
    # probabilities 1/4, 3/4 before token 1; 1/2, 1/2 before token 2; the last logits predict nothing
    logits_BTV = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [7.0, -7.0]]])
    logp_BT = token_logprobs(logits_BTV, torch.tensor([[1, 0, 1]]))
    torch.testing.assert_close(logp_BT, torch.tensor([[0.0, math.log(0.25), math.log(0.5)]]))
    entropy_BT = token_entropy(logits_BTV)
    quarter = 0.25 * math.log(4.0) + 0.75 * math.log(4.0 / 3.0)
    torch.testing.assert_close(entropy_BT, torch.tensor([[0.0, quarter, math.log(2.0)]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("slice_elements", [1, 13, 1 << 24])
def test_equals_log_softmax_and_gather_in_value_and_gradient(dtype, temperature, slice_elements, monkeypatch):
    monkeypatch.setattr(logprobs, "CPU_SLICE_ELEMENTS", slice_elements)
    torch.manual_seed(0)
    logits_BTV = (4 * torch.randn(3, 6, 11, dtype=torch.float64)).to(dtype)
    tokens_BT = torch.randint(0, 11, (3, 6))
    weight_BT = torch.randn(3, 6, dtype=torch.float64).to(torch.float32 if dtype != torch.float64 else dtype)

    ours_BTV = logits_BTV.clone().requires_grad_()
    ours_BT = token_logprobs(ours_BTV, tokens_BT, temperature)
    (ours_BT * weight_BT).sum().backward()
    plain_BTV = logits_BTV.clone().requires_grad_()
    wide_BTV = plain_BTV.to(weight_BT.dtype) / temperature
    plain_BT = wide_BTV.log_softmax(-1)[:, :-1].gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)
    (plain_BT * weight_BT[:, 1:]).sum().backward()

    assert ours_BT.dtype == weight_BT.dtype
    assert ours_BT[:, 0].abs().max() == 0.0
    torch.testing.assert_close(ours_BT[:, 1:], plain_BT, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours_BTV.grad, plain_BTV.grad)


def test_finite_differences_with_a_temperature_for_each_row():
    torch.manual_seed(1)
    logits_BTV = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    tokens_BT = torch.randint(0, 5, (3, 4))
    temperature_B = torch.tensor([0.5, 1.0, 2.0])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens_BT, temperature_B), (logits_BTV,))
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, temperature_B), (logits_BTV,))
    one_B = torch.stack(
        [token_logprobs(logits_BTV[b : b + 1], tokens_BT[b : b + 1], float(temperature_B[b]))[0] for b in range(3)]
    )
    torch.testing.assert_close(token_logprobs(logits_BTV, tokens_BT, temperature_B), one_B)


def test_tokens_outside_a_mask_are_zero_and_cost_no_gradient():
    torch.manual_seed(3)
    logits_BTV, tokens_BT = torch.randn(2, 4, 5, requires_grad=True), torch.randint(0, 5, (2, 4))
    mask_BT = torch.tensor([[True, False, True, True], [False, True, False, False]])
    masked_BT = token_logprobs(logits_BTV, tokens_BT, 0.7, mask_BT)
    torch.testing.assert_close(masked_BT, token_logprobs(logits_BTV, tokens_BT, 0.7) * mask_BT)
    masked_BT.sum().backward()
    assert (logits_BTV.grad.abs().sum(-1) > 0).tolist() == [[False, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize("slice_elements", [1, 12, 1 << 24])
def test_several_tokens_may_be_predicted_at_one_place(slice_elements, monkeypatch):
    """As the first tokens of answers behind one copy of their prompt: their gradients add up there."""
    monkeypatch.setattr(logprobs, "CPU_SLICE_ELEMENTS", slice_elements)
    torch.manual_seed(2)
    logits_PV = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    place_N, tokens_N = torch.tensor([2, 0, 2, 2]), torch.tensor([1, 4, 1, 3])
    temperature_N = torch.tensor([1.0, 1.0, 0.5, 2.0])
    expected_N = torch.stack(
        [(logits_PV[p] / t).log_softmax(-1)[k] for p, k, t in zip(place_N, tokens_N, temperature_N, strict=True)]
    )
    torch.testing.assert_close(logprobs_at(logits_PV, place_N, tokens_N, temperature_N), expected_N)
    assert torch.autograd.gradcheck(lambda x: logprobs_at(x, place_N, tokens_N, temperature_N), (logits_PV,))
    assert torch.autograd.gradcheck(lambda x: entropy_at(x, place_N, temperature_N), (logits_PV,))
    logprobs_at(logits_PV, place_N, tokens_N, temperature_N).sum().backward()
    assert logits_PV.grad[[1, 3]].abs().max() == 0, "nothing is predicted there"


def test_gradients_at_one_place_add_up_to_the_same_bits_each_time_on_several_threads():
    torch.manual_seed(4)
    N, V, threads = 256, 4096, torch.get_num_threads()
    logits_PV, tokens_N = torch.randn(2, V, requires_grad=True), torch.randint(V, (N,))
    torch.set_num_threads(4)
    try:
        grads = []
        for _ in range(10):
            logp_N = logprobs_at(logits_PV, torch.arange(N) % 2, tokens_N, torch.ones(N))
            grads += torch.autograd.grad(logp_N.sum(), logits_PV)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad_PV, grads[0]) for grad_PV in grads)


def test_banned_tokens_have_no_entropy_and_no_nan():
    logits_BTV = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    entropy_BT = token_entropy(logits_BTV)
    assert entropy_BT[0, 1].item() == pytest.approx(math.log(2.0))
    (entropy_BT.sum() + token_logprobs(logits_BTV, torch.tensor([[0, 1]])).sum()).backward()
    assert torch.isfinite(logits_BTV.grad).all()


def test_a_single_token_has_nothing_to_predict_it():
    assert token_logprobs(torch.randn(2, 1, 5), torch.zeros(2, 1, dtype=torch.int64)).tolist() == [
        [0.0],
        [0.0],
    ]


def test_backward_keeps_only_the_callers_logits():
    kept = []
    logits_BTV = torch.randn(2, 8, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_logprobs(logits_BTV, torch.zeros(2, 8, dtype=torch.int64), 0.7)
    large = [x for x in kept if x.numel() >= logits_BTV.numel()]
    assert [x.data_ptr() for x in large] == [logits_BTV.data_ptr()]
