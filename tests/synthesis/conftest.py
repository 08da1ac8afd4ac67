"""A scripted server for each test."""

import pytest
from scripted_server import ScriptedServer


@pytest.fixture
def server():
    made = ScriptedServer()
    yield made
    made.close()
