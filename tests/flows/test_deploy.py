"""What is done to our Prefect server before a worker starts, and how a user's error looks in its logs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prefect import flow, get_client, task
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.states import Completed, Pending, Running, Scheduled, Suspended

from flows.deploy import VERSION_LINK, repair_links, settle_earlier_runs
from flows.errors import log_user_errors_in_one_line
from textcraftor.errors import ModelError

pytestmark = pytest.mark.usefixtures("server")


def with_client(work: Callable[[PrefectClient], Awaitable[Any]]) -> Any:
    async def call() -> Any:
        async with get_client() as client:
            return await work(client)

    return asyncio.run(call())


@flow(name="textcraftor")
def a_run() -> None: ...


@flow(name="promote")
def a_promotion() -> None: ...


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (a_run, Running(), "Cancelled"),
        (a_run, Pending(), "Cancelled"),
        (a_run, Scheduled(), "Scheduled"),
        (a_run, Completed(), "Completed"),
        (a_run, Suspended(), "Suspended"),
        (a_promotion, Scheduled(), "Scheduled"),
        (a_promotion, Pending(), "Scheduled"),
        (a_promotion, Running(), "Scheduled"),
        (a_promotion, Completed(), "Completed"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_had_begun_ends_and_no_promotion_is_lost(kind: Any, before: Any, after: str) -> None:
    async def settle(client: PrefectClient) -> str:
        run = await client.create_flow_run(kind, state=before)
        await settle_earlier_runs(client)
        settled = await client.read_flow_run(run.id)
        assert settled.state
        return settled.state.name

    assert with_client(settle) == after


def test_links_of_earlier_runs_lead_to_the_server_of_today() -> None:
    @flow
    def link(address: str) -> None:
        create_link_artifact(address, "a version", key=VERSION_LINK)

    async def links(client: PrefectClient) -> set[str]:
        await repair_links(client, "http://127.0.0.1:5001")
        found = await client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[VERSION_LINK])))
        return {str(artifact.data) for artifact in found}

    for address in ("http://127.0.0.1:5000/#/models/m/versions/1", "http://elsewhere:5000/#/models/m/versions/2"):
        link(address)
    shown = with_client(links)
    assert "[a version](http://127.0.0.1:5001/#/models/m/versions/1)" in shown
    assert "[a version](http://elsewhere:5000/#/models/m/versions/2)" in shown


def test_a_user_error_is_one_line_in_the_log_and_a_bug_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    @task
    def fail(error: Exception) -> None:
        raise error

    @flow
    def failing(error: Exception) -> None:
        log_user_errors_in_one_line()
        fail(error)

    with caplog.at_level(logging.INFO, "prefect"):
        with pytest.raises(ModelError):
            failing(ModelError("there is no version 7"))
        assert "there is no version 7" in caplog.messages
        assert not any(record.exc_info for record in caplog.records)
        caplog.clear()
        with pytest.raises(ZeroDivisionError):
            failing(ZeroDivisionError("a bug"))
    assert any(record.exc_info for record in caplog.records)


def test_the_tests_own_server_reports_to_nobody() -> None:
    async def settings(client: PrefectClient) -> Any:
        return (await client._client.get("/admin/settings")).json()

    assert with_client(settings)["server"]["analytics_enabled"] is False
