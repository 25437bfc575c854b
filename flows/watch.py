"""What MLflow's webhooks do, on demand or by cron: each champion is proven again, and its alias put back."""

from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows.errors import log_user_errors_in_one_line
from tasks import aliases
from tasks.tracking import only_if_unavailable
from textcraftor.config import Config, load
from textcraftor.errors import Unproven


@flow(name="watch")
def watch() -> State[list[str]]:
    """Let MLflow's aliases show what the signed records of promotions say, for every registered model that has a policy.

    Fails when a champion does not hold, which is what a notification may be set on.
    """
    log_user_errors_in_one_line()
    config, found, faults = load("params.yaml"), [], []
    for model in aliases.watched_models():
        try:
            found.append(look(config, model))
        except Unproven as error:
            faults.append(str(error))
    if faults:
        raise Unproven(". ".join(faults))
    return Completed(message="; ".join(found) or "no registered model has a policy", data=found)


@task(
    task_run_name="watch {model}",
    retries=3,
    retry_delay_seconds=5,
    retry_condition_fn=only_if_unavailable,
    cache_policy=NO_CACHE,
)
def look(config: Config, model: str) -> str:
    """Watch one registered model (see `tasks.aliases.watch`)."""
    found = aliases.watch(config, model)
    get_run_logger().warning(found) if "put back" in found else get_run_logger().info(found)
    return found
