import functools
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from checkpoints import CONFIG, several_kinds, write_checkpoint, write_independent
from fp8_cast_bf16 import main

# Each conversion looks up the versions of packages, which is a third of the time of a small one.
metadata.version = functools.cache(metadata.version)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_faults" not in item.nodeid)  # The longest begin first.


@pytest.fixture
def source(tmp_path):
    """A checkpoint of two shards, with a config and a file beside them."""
    folder = write_checkpoint(tmp_path / "in", several_kinds()[0], CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def out(source, tmp_path):
    """The output of a whole conversion."""
    main(source, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def independent(tmp_path):
    """Two shards that need each other, one that needs none, and one in a folder of its own."""
    write_independent(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def folder():
    """A folder with an empty `in`; its path is short, because the names of sockets must be."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "in").mkdir()
        yield Path(name)
