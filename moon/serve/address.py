"""Addresses: binding the port, and who can reach it."""

from __future__ import annotations

import errno
import ipaddress
import socket

from moon.errors import MoonError, UsageError

__all__ = ["BACKLOG", "bind", "is_loopback", "url_of"]

BACKLOG = 2048


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host's every address.

    Raises:
        UsageError: the host has no address.
    """
    found = {str(info[4][0]) for info in _resolve(host, 0)}
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the host is not this machine's, the port is out of range or taken for
            system services.
        MoonError: the port is taken.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, got {port}")
    # Names such as localhost have addresses of both families; IPv4 is what clients try.
    family, kind, protocol, _, address = min(
        _resolve(host, port), key=lambda info: info[0] != socket.AF_INET
    )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.set_inheritable(True)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a listening socket answers."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _resolve(host: str, port: int) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    try:
        # An empty host would mean every address.
        if not host:
            raise OSError("it is empty")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # A label that is too long is a UnicodeError.
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is not an address of this machine: {error}") from error
    return list(found)


def _bind_error(host: str, port: int, error: OSError) -> MoonError:
    if error.errno == errno.EADDRINUSE:
        return MoonError(
            f"port {port} of {host} is taken by another program",
            remedy="Stop that one, or pass another --port",
        )
    if error.errno == errno.EACCES:
        return UsageError(f"port {port} is reserved for the system", remedy="Pass another --port")
    return UsageError(f"cannot listen on {host} port {port}: {error.strerror or error}")
