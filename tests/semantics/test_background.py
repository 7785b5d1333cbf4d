"""A dense gradient with a background: a factor times the student's softmax where no entry is."""

from __future__ import annotations

import pytest
import torch

from opd_kernels import _ops
from opd_kernels._arguments import Background, Temperature

N, V, K, LIMIT = 6, 40, 5, 37


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_it_is_the_gradient_of_entries_and_a_log_sum_exp(inplace: bool, dtype: torch.dtype) -> None:
    """Of sum_S w_j z_j + a T logsumexp(z / T): w_j + a p_j on S, a p_j elsewhere."""
    z = normal(N, V).to(dtype)
    leaf = z.double().clone().requires_grad_()
    ids = torch.stack([torch.randperm(LIMIT, generator=torch.manual_seed(i))[:K] for i in range(N)])
    weights, factors = normal(N, K, seed=1).double(), normal(N, seed=2).double()
    temperature, upstream = torch.rand(N).double() + 0.5, normal(N, seed=3).double()
    factors[1] = 0
    sums = torch.logsumexp(leaf[:, :LIMIT] / temperature[:, None], -1)
    rows = (weights * leaf.gather(-1, ids)).sum(-1) + factors * temperature * sums
    rows.backward(upstream)
    p = (leaf.detach().gather(-1, ids) / temperature[:, None] - sums.detach()[:, None]).exp()
    entries = weights + factors[:, None] * p
    absent = torch.zeros(N, K, dtype=torch.bool)
    absent[2, 1], absent[3, 0] = True, True
    expected = leaf.grad.clone()
    # Without its entry an id has the background alone.
    only = upstream[:, None] * factors[:, None] * p
    expected.scatter_(-1, ids, torch.where(absent, only, expected.gather(-1, ids)))
    ids = torch.where(absent, -1, ids).int()

    out = z.clone() if inplace else torch.full((N, V), torch.nan, dtype=dtype)
    z[1], out[1] = torch.nan, torch.nan
    expected[1] = torch.zeros(V).double().scatter_(-1, ids[1].long(), upstream[1] * weights[1])
    background = Background(
        factors, sums.detach(), LIMIT, None if inplace else z, Temperature(1.0, temperature)
    )
    version = out._version
    _ops.scatter_(out, entries, ids, upstream, background, "auto")
    assert out._version > version
    assert (out[:, LIMIT:] == 0).all()
    exact = dtype != torch.bfloat16  # of which a rounding is 2^-9
    tolerance = {} if exact else {"rtol": 2**-8, "atol": 1e-30}
    torch.testing.assert_close(out, expected.to(dtype), **tolerance)


@pytest.mark.parametrize("name", ["factors", "logsumexp", "logits"])
def test_what_does_not_fit_the_gradient_is_refused(name: str) -> None:
    parts = {"factors": torch.ones(N), "logsumexp": torch.ones(N), "logits": torch.ones(N, V)}
    parts[name] = parts[name][:-1]
    entries, ids = torch.ones(N, K), torch.zeros(N, K, dtype=torch.int32)
    background = Background(limit=V, **parts)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        _ops.scatter_(torch.ones(N, V), entries, ids, torch.ones(N), background, "auto")


@pytest.mark.parametrize("background", [Background(), Background(torch.ones(N), torch.ones(N), V)])
def test_memory_for_other_rows_is_refused(background: Background) -> None:
    ids, entries = torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K)
    for out in (torch.zeros(N + 1, V), torch.zeros(N - 1, V), torch.zeros(N, 1, V)):
        for backend in ("auto", "reference"):
            with pytest.raises(ValueError, match=r"leading shape \(6,\)|expected the logits'"):
                _ops.scatter_(out, entries, ids, torch.ones(N), background, backend)
