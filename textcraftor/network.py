"""Proxies and certificates that the environment names, for whoever talks to the outside."""

import os
from collections.abc import Mapping
from typing import Final

from textcraftor.errors import UserError

_NAMES: Final = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def network_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, in upper or lower case, that every HTTP client reads when it is made, loopback or not."""
    return {name: value for name, value in environment.items() if name.upper() in _NAMES}


def require_usable_network() -> None:
    """Raises UserError, without the settings' values, where no HTTP client can be made with them.

    A SOCKS proxy needs a package that we do not install, and a certificate file may be gone.
    """
    from huggingface_hub import get_session

    try:
        get_session()
    except Exception as error:  # the client's own and its libraries'; it has no other reason to fail
        names = ", ".join(sorted(network_settings(os.environ))) or "the system's proxy"
        raise UserError(
            f"Nothing can be downloaded with the proxy or certificates that the environment names ({names}): "
            f"{' '.join(str(error).split())[:200]}. Unset or correct them; --from DIR needs no network"
        ) from None
