"""The backend switch: the argument, the context manager, the setter, the environment."""

import asyncio
import runpy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

import dinat_triton as dt
from dinat_triton import dispatch, ops


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that calls resolved to."""
    names: list[str] = []
    resolve = ops.resolve
    monkeypatch.setattr(ops, "resolve", lambda *a: names.append(resolve(*a)) or names[-1])
    return names


def call(**options) -> torch.Tensor:
    x = torch.randn(1, 4, 4, 1, 2)
    return dt.na2d(x, x, x, 3, **options)


def test_the_argument_beats_the_switch_and_the_innermost_switch_wins(ran: list[str]) -> None:
    module = dt.NeighborhoodAttention2D(8, 2, 3)
    with dt.use_backend("reference"):
        call()
        call(backend="tiled")
        with dt.use_backend(None):
            call()
        module(torch.randn(1, 4, 4, 8))
    call()
    with pytest.raises(KeyError), dt.use_backend("tiled"):
        raise KeyError
    assert dispatch.current_backend() is None
    dt.use_backend("reference")  # a statement too
    call()
    assert ran == ["reference", "tiled", "tiled", "reference", "tiled", "reference"]


@pytest.mark.skipif(torch.__version__ < "2.14", reason="it keeps the backend that it was compiled with")
def test_a_compiled_function_notices_the_switch(ran: list[str]) -> None:
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled()
    with dt.use_backend("reference"):
        compiled()
    assert set(ran) == {"tiled", "reference"}


def test_threads_and_tasks_do_not_meet() -> None:
    together = Barrier(2)

    def thread(name: str) -> list[str | None]:
        found = [dispatch.current_backend()]
        together.wait()
        with dt.use_backend(name):
            together.wait()
            found.append(dispatch.current_backend())
            together.wait()
        return [*found, dispatch.current_backend()]

    async def task(name: str) -> list[str | None]:
        found = [dispatch.current_backend()]
        with dt.use_backend(name):
            await asyncio.sleep(0)
            found.append(dispatch.current_backend())
            await asyncio.sleep(0)
        return [*found, dispatch.current_backend()]

    async def tasks() -> list[list[str | None]]:
        return await asyncio.gather(task("reference"), task("tiled"))

    dt.use_backend("triton")
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(thread, ("reference", "tiled"))] == [[None, "reference", None], [None, "tiled", None]]
    assert asyncio.run(tasks()) == [["triton", "reference", "triton"], ["triton", "tiled", "triton"]]
    assert dispatch.current_backend() == "triton"


def test_the_environment_chooses_and_wrong_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(value: str) -> str | None:
        monkeypatch.setenv("DINAT_TRITON_BACKEND", value)
        return runpy.run_path(dispatch.__file__)["current_backend"]()  # as in a new process

    assert (chosen("reference"), chosen("")) == ("reference", None)
    with pytest.raises(ValueError, match="DINAT_TRITON_BACKEND must be one of 'triton'"):
        chosen("fast")
    with pytest.raises(ValueError, match="backend must be one of 'triton', 'tiled', 'reference', got 'gpu'"):
        dt.use_backend("gpu")
