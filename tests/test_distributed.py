from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from gpbridge.checks import ShapeError
from gpbridge.distributed import all_rows, all_sum, rank_rows, world


def test_one_process_is_the_identity():
    x = torch.arange(6.0).reshape(3, 2)
    assert world() == (0, 1)
    assert rank_rows(3) == slice(0, 3)
    assert all_sum(x) is x
    assert all_rows(x, 3) is x
    torch.testing.assert_close(x, torch.arange(6.0).reshape(3, 2), rtol=0, atol=0)


def test_no_rows_are_an_empty_slice():
    assert rank_rows(0) == slice(0, 0)
    assert all_rows(torch.empty(0, 2), 0).shape == (0, 2)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 4, 5, 12])
def test_ranks_partition_the_rows_in_order(monkeypatch, processes, n):
    owned = []
    for rank in range(processes):
        monkeypatch.setattr("gpbridge.distributed.world", lambda r=rank: (r, processes))
        owned += range(n)[rank_rows(n)]
    assert owned == list(range(n))


def test_a_wrong_number_of_local_rows_is_refused():
    with pytest.raises(ShapeError, match=r"rows 0 to 3 of 3 .* has 2 rows"):
        all_rows(torch.zeros(2, 1), 3)


@pytest.mark.parametrize("reduce", [all_sum, lambda x: all_rows(x, 3)])
def test_a_tensor_that_wants_a_gradient_is_refused(reduce):
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="not differentiable"):
        reduce(x)
    with torch.no_grad():
        assert reduce(x) is x


def _process(rank, size, store):
    """Body of one process; at module level so that spawn can pickle it by name."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=15),
    )
    try:
        assert world() == (rank, size)
        for n in (4, 5, 1):  # even, uneven, and a process without rows
            generator = torch.Generator().manual_seed(n)
            x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
            local = x[rank_rows(n)]
            assert torch.equal(all_rows(local, n), x)
            torch.testing.assert_close(
                all_sum(local.sum(0)), x.sum(0), rtol=1e-12, atol=1e-12
            )
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_agree_with_one(tmp_path):
    mp.start_processes(
        _process, (2, str(tmp_path / "store")), nprocs=2, start_method="spawn"
    )
