"""A test of another program skips where its environment was not built, and fails there in .ci/run; heavy ones run in `make runtimes`."""

import os

import pytest
from environments import ENVIRONMENTS, find_python, run_python


@pytest.fixture
def run_in():
    """Return a function that runs Python in an environment by its name; the test skips where the environment is absent."""

    def run(name, *arguments, timeout=600):
        required = os.environ.get("FINETUNE_RUNTIMES_REQUIRED")
        if ENVIRONMENTS[name].heavy and required != "all":
            pytest.skip(f"the environment {name} is heavy: make runtimes")
        if find_python(name) is None:
            reason = f"the environment {name} was not built: python tests/runtimes/environments.py {name}"
            if required:
                pytest.fail(reason)
            pytest.skip(reason)
        return run_python(name, arguments, timeout)

    return run
