"""`textcraftor serve`."""

import contextlib
from typing import Annotated

import typer

from textcraftor import config as configuration
from textcraftor.options import PARAMS, Device, Params, Profile


def serve(
    model: Annotated[str, typer.Option(help="champion, challenger or a version; nothing that is not proven.")] = "champion",
    port: Annotated[int, typer.Option(min=0, max=65535, help="On the loopback interface; 0 takes a free one.")] = 8780,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered with 429.")] = 64,
    params: Params = PARAMS,
    profile: Profile = None,
    device: Device = "auto",
) -> None:
    """Serve a proven model until Ctrl-C: POST /invocations takes {"prompt": ..., "seed": ...} and answers with a PNG."""
    run = configuration.load(params, profile=profile)
    from textcraftor.serving.loading import load_registered
    from textcraftor.serving.server import ModelServer

    with ModelServer(load_registered(model, run, params.parent, device), port, waiting) as server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/invocations  {model}, until Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
