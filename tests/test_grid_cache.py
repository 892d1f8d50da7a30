"""Tables of a grid: made once, and constants of a compiled graph, however many of one function it takes."""

import pytest
import torch

from ailurus_hf.grid_cache import grid_table


@grid_table
def ramp(count: int) -> torch.Tensor:
    return torch.arange(count).float()


@grid_table
def ramp_and_ones(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count).float(), torch.ones(count)


def with_tables(x):
    small, large = ramp_and_ones(4), ramp_and_ones(6)
    return x[:, :4] * ramp(4) + ramp(6).sum() * x[:, :1] + small[1] + large[0][:4] + ramp(4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_takes_several_tables_of_one_function(backend):
    compiled = torch.compile(with_tables, fullgraph=True, backend=backend)
    x = torch.randn(2, 6)
    torch.testing.assert_close(compiled(x), with_tables(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x + 1), with_tables(x + 1))


def test_a_table_is_made_once():
    assert ramp(5) is ramp(5) and ramp(5) is not ramp(6)
