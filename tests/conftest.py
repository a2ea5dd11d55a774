"""Fixtures that every test can use."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dinat_triton as dt
from dinat_triton import store, tiled
from dinat_triton.kernels import configs
from dinat_triton.tuner import layer_run


@pytest.fixture(autouse=True, scope="session")
def _no_tuned_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What somebody tuned on this machine must not decide a test, and no test may write there."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tuned")
        patch.setenv(store.ENVIRONMENT, str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def _autograd_without_threads() -> None:
    """Autograd decides at its first backward; after a compilation it would take threads, and refuse to run in forks."""
    torch.zeros((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_chosen() -> None:
    """A backend that one test chose, or the environment, must not decide another."""
    dt.use_backend(None)


@pytest.fixture
def forget_tuned() -> Iterator[Callable[[], None]]:
    """Has all tuned tables read anew when they are next asked for: before a test, after it and when it calls this."""

    def forget() -> None:
        for cache in (configs.choose_config, configs.load_user_table, configs.load_table):
            cache.cache_clear()
        for cache in (tiled._choose_tile, tiled.load_user_tiles):
            cache.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New uninitialised floating tensors hold NaN: an output that nobody wrote cannot pass for a result."""
    with layer_run.poisoned():
        yield


@pytest.fixture
def enabled() -> Iterator[None]:
    """transformers' DiNAT repaired for the length of a test."""
    from dinat_triton.integrations.transformers import disable, enable

    disable()
    with enable():
        yield
