"""A Prefect server for the tests of the flows."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness  # imports the server, in seconds

    with prefect_test_harness(server_startup_timeout=240):
        yield
