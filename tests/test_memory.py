"""Memory that tensors free, kept for the next ones: what the C library is told, and when."""

import platform

import pytest
import torch

from slimcli import memory
from slimcli.memory import freed_memory_kept


class Library:
    """A C library that remembers what it was told."""

    def __init__(self):
        self.told, self.trimmed = {}, 0

    def mallopt(self, parameter, value):
        self.told[parameter] = value
        return 1

    def malloc_trim(self, _pad):
        self.trimmed += 1
        return 1


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in memory.SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: found)
    return found


def test_memory_is_kept_until_the_outermost_ends(library):
    with freed_memory_kept():
        with freed_memory_kept():
            pass
        assert library.told == memory.KEPT and not library.trimmed
    assert library.told == memory.USUAL and library.trimmed == 1


def test_an_error_inside_gives_memory_back(library):
    with pytest.raises(ValueError), freed_memory_kept():
        raise ValueError
    assert library.told == memory.USUAL and library.trimmed == 1


@pytest.mark.parametrize("name", memory.SETTINGS)
def test_what_the_environment_says_stands(name, monkeypatch, library):
    monkeypatch.setenv(name, "1")
    with freed_memory_kept():
        pass
    assert not library.told


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch, library):
    monkeypatch.setattr(memory.sys, "platform", "win32")
    with freed_memory_kept():
        pass
    assert not library.told
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: object())
    with freed_memory_kept():
        pass


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_glibc_takes_every_setting():
    library = memory._mallopt()
    assert all(library.mallopt(parameter, value) == 1 for parameter, value in (memory.KEPT | memory.USUAL).items())
    with freed_memory_kept():
        assert torch.ones(2**20).sum() == 2**20
