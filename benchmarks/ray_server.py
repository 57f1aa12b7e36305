"""A Ray cluster that serves classifiers: `python -m benchmarks.ray_server INGRESS NAME=PATH ...`.

INGRESS is `haproxy` or `proxy`, Serve's own. It prints the port of the ingress, and with HAProxy those of the
replicas, on which HAProxy finds them. The clusters of several such processes do not meet.
"""

import os
import signal
import socket
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

from jaxcls.cluster.session import SETTINGS

HOST = "127.0.0.1"
NUM_CPUS = 8
"""As Ray is told: replicas of different classifiers share those that there are."""
REPLICA_PORTS = range(30000, 30020)


def main(ingress: str, *classifiers: str) -> None:
    """Serve until SIGTERM."""
    os.environ.update(
        SETTINGS,
        RAY_AUTH_TOKEN=os.urandom(32).hex(),
        RAY_SERVE_HAPROXY_METRICS_PORT=str(free_port()),
        RAY_SERVE_HAPROXY_STATS_PORT=str(free_port()),
    )
    import ray  # reads the settings
    from ray import serve

    from jaxcls.serving.ray import application
    from jaxcls.serving.ray_target import start_serve

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    port = free_port()
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            "local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
            _node_ip_address="127.0.0.2",
        )  # fmt: skip
        if ingress == "haproxy":
            start_serve(HOST, port)
        else:
            serve.start(http_options={"host": HOST, "port": port})
        names = dict(text.split("=", 1) for text in classifiers)
        for name, path in names.items():
            args: dict[str, Any] = {
                "model": path,
                "name": name,
                "version": "1",
                "key_file": None,
                "config": {},
            }
            serve.run(application(args), name=name, route_prefix=f"/{name}")
        replicas = [find_replica(name) for name in names] if ingress == "haproxy" else []
        print("serving:", port, *replicas, flush=True)
        signal.pause()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server((HOST, 0)) as free:
        port: int = free.getsockname()[1]
        return port


def find_replica(name: str) -> int:
    """The port of an application's only replica."""
    while True:
        for port in REPLICA_PORTS:
            try:
                if httpx2.get(f"http://{HOST}:{port}/{name}/v2/health/ready").status_code == 200:
                    return port
            except httpx2.TransportError:
                continue
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
