"""Count-weighted attention: a token of count m equals m copies of it, in both forms."""

import pytest
import torch
import torch.nn.functional as F

from ailurus_hf import AiluRusError, count_weighted_attention
from ailurus_hf.attention import biased_attention

FORMS = ["mask", "channel"]


def example(dtype=torch.float32, width=12):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, width, generator=generator) for length in (5, 6, 6))
    counts = torch.tensor([[1, 7, 2, 1, 30, 3], [2, 2, 5, 1, 1, 9]])
    return query.to(dtype), key.to(dtype), value.to(dtype), counts


def with_copies(query, key, value, counts, scale=None):
    images = [
        F.scaled_dot_product_attention(
            query[i], *(x[i].repeat_interleave(counts[i], dim=1) for x in (key, value)), scale=scale
        )
        for i in range(len(counts))
    ]
    return torch.stack(images)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [8, 12, 64])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_count_of_m_equals_m_copies(form, width, scale):
    query, key, value, counts = example(width=width)
    got = count_weighted_attention(query, key, value, counts, scale=scale, form=form)
    # The copies in float64: SDPA's own float32 error on them (2e-6) is as large as that of the weighted form.
    want = with_copies(query.double(), key.double(), value.double(), counts, scale).float()
    torch.testing.assert_close(got, want, rtol=0, atol=3e-6)
    unweighted = F.scaled_dot_product_attention(query, key, value, scale=scale)
    assert (got - unweighted).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_count_of_zero_has_no_weight_and_finite_gradients(form):
    query, key, value, counts = example()
    counts[:, 2] = 0
    inputs = [x.requires_grad_() for x in (query, key, value)]
    got = count_weighted_attention(*inputs, counts, form=form)
    rest = [0, 1, 3, 4, 5]
    want = count_weighted_attention(query, key[:, :, rest], value[:, :, rest], counts[:, rest], form=form)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_copies(form):
    inputs = example()
    gradients = []
    for function in (lambda *x: count_weighted_attention(*x, form=form), with_copies):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        function(*leaves, inputs[3]).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, dtype):
    query, key, value, counts = example(dtype)
    got = count_weighted_attention(query, key, value, counts, form=form)
    assert got.dtype == dtype
    want = count_weighted_attention(query.float(), key.float(), value.float(), counts)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=16 * torch.finfo(dtype).eps)


def test_wrong_input_is_named():
    query, key, value, counts = example()
    with pytest.raises(AiluRusError, match=r"counts must have shape \(2, 6\), got \(2, 5\)"):
        count_weighted_attention(query, key, value, counts[:, :5])
    with pytest.raises(AiluRusError, match="form must be"):
        biased_attention(query, key, value, counts.log(), form="dense")
