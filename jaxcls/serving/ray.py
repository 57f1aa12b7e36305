"""One replica in a Ray cluster: Ray Serve calls the application that a process of `replica` serves.

Serve's part is to start and end replicas, and to share requests out. Who is let in, and what is scored
together, is decided in the replica as everywhere else: Serve's own bounds lie above those of `Admission`, and
`serve.batch`, which fails a whole batch for one image, has no part in it.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxcls.errors import ServiceError, UsageError
from jaxcls.serving.config import MAX_SHUTDOWN_SECONDS, ServiceConfig
from jaxcls.storage import Storage

LOGGER = logging.getLogger(__name__)

NAME = "Replica"
"""Of the deployment, the only one of an application."""
HEALTH_SECONDS = 1.0
"""Between two checks; Serve ends a replica that fails three in a row."""
NUM_STARTS = 2
"""How often replicas may fail to become ready before their version is given up."""


def application(args: Mapping[str, Any]) -> Application:
    """The application that serves one classifier; what Serve calls an app builder.

    A Serve config file names it `jaxcls.serving.ray:application`, and says below `deployments`, under the
    name "Replica", how many replicas there are, and on what.

    Args:
        args: `model`, where a saved classifier lies on every node; `name` and `version`, as clients are told;
            `key_file`, where the keys lie there, or None; `config`, fields of `ServiceConfig`.

    Raises:
        UsageError: a bound that cannot work.
    """
    return make_application(args)


def make_application(args: Mapping[str, Any], **options: Any) -> Application:
    """As `application`, with what Serve's config file would say of its deployment.

    Args:
        args: as for `application`.
        options: further ones of `serve.deployment`, such as `num_replicas`.
    """
    config = ServiceConfig(**args["config"])
    deployment = serve.deployment(
        name=NAME,
        **options,
        max_ongoing_requests=config.max_connections,
        max_queued_requests=config.max_connections,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=MAX_SHUTDOWN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
        logging_config={"enable_access_log": False},
        max_constructor_retry_count=NUM_STARTS,
        # New replicas start beside the old ones, of which none ends before another one takes its place.
        max_surge_percent=100,
        rolling_update_percentage=1.0,
    )(serve.ingress()(_Replica))
    return deployment.bind(**args)


class _Replica:
    """What a replica of Serve holds."""

    def __init__(
        self, model: str, name: str, version: str, key_file: str | None, config: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several replicas may share a GPU
        # Only here: whoever deploys needs no JAX.
        from jaxcls.parallel import use_compilation_cache
        from jaxcls.serving.app import Identity
        from jaxcls.serving.auth import Keys
        from jaxcls.serving.replica import make_replica

        use_compilation_cache(Storage.default().persistent / "compiled")
        self._keys = None if key_file is None else Keys.read(key_file)
        identity = Identity(name, version, self._keys)
        self._replica = make_replica(Path(model), ServiceConfig(**config), identity)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from jaxcls.serving.app import make_app

        return _at_root(make_app(self._replica))

    def check_health(self) -> None:
        """Read the keys again, and raise ServiceError if the device is broken."""
        if self._keys is not None:
            try:
                self._keys.reload()
            except UsageError as error:
                LOGGER.error("the keys stay as they were: %s", error)
        if self._replica.service.batcher.broken.is_set():
            self._replica.is_ready = False
            self._replica.admission.is_closed = True
            raise ServiceError(
                "the device failed on several single images: this replica must be started anew"
            )


def _at_root(app: ASGIApp) -> ASGIApp:
    """The application as if it were not below a route."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].removeprefix(scope["root_path"]), "root_path": ""}
        await app(scope, receive, send)

    return call
