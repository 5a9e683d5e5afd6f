"""The Ray cluster of a session, as its head answers: whether it is there, what it may grow to, and how it is left."""

from __future__ import annotations

import gc
import socket


def growth() -> dict[str, float]:
    """What the cluster's autoscaler could add, by resource; nothing where there is none, or none that says so."""
    from ray._private.state import state

    return {name: float(most) for name, most in (state.get_max_resources_from_cluster_config() or {}).items()}


def shut_down_ray() -> None:
    """End this process's part in Ray.

    Ray ends the process if one of its handles is freed while it shuts down. Tune leaves some in reference cycles, which
    any thread may collect at any time: so they are collected before, and none meanwhile.
    """
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def speaks_grpc(address: str, timeout_seconds: float) -> bool:
    """Whether a gRPC server answers there. Ray itself would wait for minutes to find out.

    Args:
        address: host:port.
        timeout_seconds: for connecting and for the answer.
    """
    host, _, port = address.rpartition(":")
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2 preface, empty SETTINGS
    try:
        with socket.create_connection((host, int(port)), timeout_seconds) as connection:
            connection.sendall(hello)
            answer = connection.recv(9)
    except (OSError, ValueError):
        return False
    return len(answer) >= 4 and answer[3] == 4  # a server begins with SETTINGS
