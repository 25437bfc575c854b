"""A user's error is one line in the log of a run; a bug keeps its traceback."""

import logging

from textcraftor.errors import UserError


class WithoutTraceback(logging.Filter):
    """Replaces what Prefect logs for a UserError, its representation and traceback, with its message, once."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if not isinstance(error, UserError):
            return True
        repeated = record.getMessage().startswith("Engine execution")  # the flow has said it before
        record.msg, record.args, record.exc_info = "%s", (error,), None
        return not repeated


def log_user_errors_in_one_line() -> None:
    """Install the filter on the loggers of flow runs and task runs, unless it is there."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(present, WithoutTraceback) for present in logger.filters):
            logger.addFilter(WithoutTraceback())
