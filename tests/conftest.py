"""What every test has: one thread, a fixed seed; and those of numerics, types and shapes checked at run time.

The import hook has to be in place before `recoup` is imported, so it is here and not in a fixture. It is
never installed outside of the tests. It is off in those of other rooms, which call numerics as its own tests
do, and would take half as long again. It covers the one room whose functions carry shapes throughout: it
decorates method by method, which beartype refuses for a method that returns `typing.Self`, and Dynamo cannot
trace what it wraps, so a test of `torch.compile(fullgraph=True)` runs in a process of its own.
"""

import os
import random

import jaxtyping
import numpy as np
import pytest
import torch

jaxtyping.install_import_hook("recoup.numerics", "beartype.beartype")
torch.set_num_threads(1)  # pytest-xdist is what runs in parallel
# No pool of compilers, which begins slowly, and no trial of what the processor says that it has.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}


@pytest.fixture(autouse=True)
def types(request: pytest.FixtureRequest) -> None:
    """Of numerics are checked in its own tests."""
    jaxtyping.config.update("jaxtyping_disable", "numerics" not in request.path.parts)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, in whichever order and worker it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every accelerator too, for milliseconds
