"""`textcraftor keys`, `policy` and `rollback`: who signs, who is believed, what a version must have shown, and going back."""

from pathlib import Path
from typing import Annotated

import typer

from textcraftor.config import load
from textcraftor.errors import ConfigError
from textcraftor.layout import TEAM_KEYS
from textcraftor.options import PARAMS, Profile

Params = Annotated[Path, typer.Option(help="The run; its folder is the project.")]
keys = typer.Typer(help="The keys that sign and that are believed.", invoke_without_command=True)
policy = typer.Typer(help="What a version of a registered model must have shown.", no_args_is_help=True)


@keys.callback()
def show_keys(context: typer.Context, params: Params = PARAMS) -> None:
    """List the keys: which one signs here, which are believed, which are revoked."""
    if context.invoked_subcommand:
        return
    from textcraftor.signing import Keyring

    ring = Keyring(params.parent)
    signing = ring.signer().public_key.keyid
    believed, revoked = ring.believed(), ring.revoked()
    for keyid in dict.fromkeys((signing, *believed, *revoked)):
        status = "revoked" if keyid in revoked else "believed" if keyid in believed else f"not believed: not in {TEAM_KEYS}/"
        typer.echo(f"{keyid}  {status}{'  signs on this machine' if keyid == signing else ''}")


@keys.command()
def rotate(params: Params = PARAMS) -> None:
    """Make a new key for this machine. What the old one signed is still believed."""
    from textcraftor.signing import Keyring

    typer.echo(f"{Keyring(params.parent).rotate()}  signs on this machine from now on")


@keys.command()
def revoke(keyid: Annotated[str, typer.Argument(help="Id, or its beginning.")], params: Params = PARAMS) -> None:
    """Never believe a key of this machine again. Every version that it signed for is unproven from now on."""
    from textcraftor.signing import Keyring

    Keyring(params.parent).revoke(keyid)
    typer.echo(f"{keyid} is revoked. Run the pipeline again to register what it had signed for")


@policy.command()
def pin(
    params: Params = PARAMS,
    profile: Annotated[str | None, typer.Option(help="Instead of the profile that params.yaml names.")] = None,
    replace: Annotated[bool, typer.Option(help="Replace a policy that is there.")] = False,
) -> None:
    """Write the gate of the run and its judges' digests as the policy of the registered model. Review and commit it."""
    from textcraftor.fetch import require
    from textcraftor.trust.policy import Policy, policy_file

    run, root = load(params, profile=profile), params.parent
    require(run, root)  # the policy names the judges by their weights
    path = root / policy_file(run.registry.name)
    if path.exists() and not replace:
        raise ConfigError(f"{path} is there already. Edit it, or give --replace to write the gate of {run.profile} over it")
    typer.echo(Policy.of(run, root).write(run.registry.name, run.profile, root))


@policy.command()
def check(params: Params = PARAMS, profile: str | None = None) -> None:
    """Say whether the run's own gate is the policy of its registered model. Exits with 1 if it is another."""
    from textcraftor.trust.policy import Policy, policy_file

    run, root = load(params, profile=profile), params.parent
    pinned, own = Policy.load(run.registry.name, root), Policy.of(run, root)
    differing = [name for name in type(own).model_fields if getattr(own, name) != getattr(pinned, name)]
    typer.echo(f"differs from {policy_file(run.registry.name)}: {', '.join(differing)}" if differing else "the same")
    if differing:
        raise typer.Exit(1)


def rollback(
    to: Annotated[int | None, typer.Option(min=1, help="This version, instead of the one that was champion before.")] = None,
    why: Annotated[str, typer.Option(help="The reason; it stands in the record of promotions.")] = "",
    params: Params = PARAMS,
    profile: Profile = None,
) -> None:
    """Make the version before the present champion champion again, after proving it. The record keeps both promotions."""
    from textcraftor.plugins import plugin

    decision = plugin("textcraftor.verbs", "rollback")(load(params, profile=profile), to, why)
    typer.echo(f"{decision.verdict}: version {decision.version}: {decision.why}")
