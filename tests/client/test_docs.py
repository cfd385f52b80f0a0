from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import dat_client

MODULES = sorted(module.name for module in pkgutil.walk_packages(dat_client.__path__, "dat_client."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_are_found():
    finder = doctest.DocTestFinder()
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 8
