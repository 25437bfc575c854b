"""A Prefect server for the tests of the flows."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def server() -> Iterator[None]:
    """The server that this process's flows report to. It polls its database all its life, so it ends with these tests."""
    from prefect.testing.utilities import prefect_test_harness  # imports the server, in seconds

    with prefect_test_harness(server_startup_timeout=240):
        yield
