"""A proven model behind one call: prompts in, PNG pictures out. For MLflow's loader, and for `textcraftor serve`."""

from typing import Any

__all__ = ["_load_pyfunc"]


def _load_pyfunc(path: str, model_config: Any = None) -> Any:
    """What `mlflow.pyfunc.load_model` calls, named in the MLmodel file of every version. Raises Unproven."""
    from textcraftor.serving.loading import load_downloaded

    return load_downloaded(path)
