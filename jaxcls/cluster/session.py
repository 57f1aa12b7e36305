"""A connection to Ray: to a running cluster, or to one that is started on this machine for a single job."""

import logging
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxcls.errors import DeploymentError, MissingExtraError, UsageError

SETTINGS = {
    "RAY_AUTH_MODE": "token",  # whoever reaches a cluster can run code on it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else each pool of actors puts an error on the terminal that is none
}
"""For Ray, unless the environment says otherwise."""

OWN, RUNNING = "local", "auto"
"""Ray's addresses of a cluster to be started, and of this machine's that runs."""
CONNECT_SECONDS = 10
GIVEN_TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
"""Variables that say what the token is, or where."""
TOKEN = ".ray/auth_token"
"""Where Ray looks for it otherwise, in the user's home, and writes it if it is not there."""


def require_ray() -> None:
    """Raise MissingExtraError unless Ray is installed."""
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "a cluster", "pip install 'jaxcls[cluster]'")


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Be connected to Ray while the block runs.

    Args:
        address: of a running cluster: "host:port", or "auto": the one that the environment names
            (`RAY_ADDRESS`), else this machine's. None: the one that this process is connected to already, or
            that the environment names; else a new one, of this machine's cores and GPUs, which ends with the
            block or, at the latest, the process.

    Raises:
        MissingExtraError: Ray is not installed.
        DeploymentError: there is no such cluster, or it refuses.
        UsageError: an address of another form.
    """
    require_ray()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray  # reads the settings

    if address is None and ray.is_initialized():
        yield
        return
    if address is None or address == RUNNING:
        address = os.environ.get("RAY_ADDRESS") or address or OWN
    if address not in (OWN, RUNNING):
        _require_listener(address)
    if address == OWN and not os.environ.keys() & GIVEN_TOKENS:
        _keep_token(Path.home() / TOKEN)
    try:
        with warnings.catch_warnings():
            # The processes that are forked become other programs at once.
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **_options(address))
    except Exception as error:  # of nearly every kind, `Exception` itself among them
        raise _no_cluster(address, str(error).partition("\n")[0]) from error
    try:
        yield
    finally:
        ray.shutdown()


def _keep_token(path: Path) -> None:
    """Have Ray's token there for its owner alone: Ray itself would write it for all users to read."""
    path.parent.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(secrets.token_hex(32))
    path.chmod(0o600)


def _require_listener(address: str) -> None:
    """Raise DeploymentError unless somebody listens there: Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except ValueError as error:
        raise UsageError(f"address {address}: give HOST:PORT, ray://HOST:PORT or {RUNNING}") from error
    except OSError as error:
        raise _no_cluster(address, str(error.strerror or error)) from error


def _no_cluster(address: str, reason: str) -> DeploymentError:
    return DeploymentError(
        f"no Ray cluster at {address}: {reason}; `RAY_AUTH_MODE=token ray start --head` starts one"
    )


def _options(address: str) -> dict[str, Any]:
    """Of a new cluster: no dashboard; loopback, for which Ray does not take 127.0.0.1 but the network's."""
    return {"include_dashboard": False, "_node_ip_address": "127.0.0.2"} if address == OWN else {}
