"""What the HTTP parser lets through and a connection does not, and requests sent ahead."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from moon.bundle import Bundle
from moon.serve.bounded import HEADER_BYTES, MOST_AHEAD
from tests.serve.conftest import Server, running

ID = b"X-Request-ID: %b\r\n"
LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Server]:
    with running(
        tmp_path_factory.mktemp("connection"),
        bundle,
        MOON_SERVE_HEAD_SECONDS="1",
        MOON_SERVE_BODY_SECONDS="1",
        MOON_SERVE_LINGER_SECONDS="1",
        MOON_SERVE_IDLE_SECONDS="1",
    ) as server:
        yield server


def live(name: str) -> bytes:
    return LIVE + ID % name.encode() + b"\r\n"


def told(server: Server, *parts: bytes, pause: float = 0.05) -> tuple[list[int], bytes]:
    """The statuses, and all that came until the server closed."""
    parts_of = urlsplit(server.url)
    assert parts_of.hostname and parts_of.port
    found = b""
    with socket.create_connection((parts_of.hostname, parts_of.port), timeout=20) as connection:
        connection.settimeout(20)
        try:
            for i, part in enumerate(parts):
                if i:
                    time.sleep(pause)
                connection.sendall(part)
            while chunk := connection.recv(65536):
                found += chunk
        except ConnectionError:
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", found)], found


def ids(found: bytes) -> list[bytes]:
    return re.findall(rb"(?i)x-request-id: ([^\r]*)", found)


def test_requests_sent_ahead_are_answered_in_order(server: Server, pictures: list[bytes]) -> None:
    picture = POST + ID % b"two" + b"Content-Length: %d\r\n\r\n" % len(pictures[0]) + pictures[0]
    statuses, found = told(server, live("one") + picture + live("three"))
    assert statuses == [200, 200, 200]
    assert ids(found) == [b"one", b"two", b"three"]
    assert b'"predictions"' in found


@pytest.mark.parametrize("cut", [1, 30, 70])
def test_a_request_sent_ahead_in_pieces(server: Server, cut: int) -> None:
    second = live("two")
    statuses, found = told(server, live("one") + second[:cut], second[cut:])
    assert statuses == [200, 200] and ids(found) == [b"one", b"two"]


def test_only_so_many_are_sent_ahead(server: Server) -> None:
    statuses, found = told(server, b"".join(live(f"n{i}") for i in range(3000)))
    assert set(statuses) == {200} and 1 <= len(statuses) <= MOST_AHEAD + 1
    # Those that were answered are the first, so that a client knows where to go on.
    assert ids(found) == [b"n%d" % i for i in range(len(statuses))]
    assert b"connection: close" in found.lower()


def test_only_so_much_is_sent_ahead(server: Server) -> None:
    large = POST + ID % b"large" + b"Content-Length: 90000\r\n\r\n" + b"a" * 90_000
    statuses, found = told(server, live("one") + live("two") + large + live("four"))
    assert statuses == [200, 200] and ids(found) == [b"one", b"two"]


@pytest.mark.parametrize("version", [b"0.9", b"2.0", b"3.0"])
def test_other_versions_are_not_spoken(server: Server, version: bytes) -> None:
    statuses, _ = told(server, LIVE.replace(b"1.1", version) + b"\r\n")
    assert statuses == [400]


@pytest.mark.parametrize(
    "broken",
    [b"GET\r\n\r\n", LIVE + b"\x00\r\n\r\n", CHUNKED + b"\r\nzz\r\n", POST + b"X: " + b"a" * 70000],
)
def test_what_comes_before_something_broken_is_answered(server: Server, broken: bytes) -> None:
    statuses, found = told(server, live("one") + live("two") + broken)
    assert statuses[:2] == [200, 200] and ids(found)[:2] == [b"one", b"two"]
    assert all(400 <= status < 500 for status in statuses[2:])


def test_what_frames_a_body_is_bounded(server: Server) -> None:
    endless = b"a" * (4 * HEADER_BYTES)
    for begin in (b"0\r\nX: ", b"0\r\nX", b"1;x=", b"1\r\nx\r\n0;"):
        start = time.monotonic()
        statuses, _ = told(server, CHUNKED + b"\r\n" + begin, endless, endless)
        assert statuses in ([431], []) and time.monotonic() - start < 10


def test_a_body_in_many_chunks_is_not_taken_for_framing(
    server: Server, pictures: list[bytes]
) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, bytes([byte])) for byte in pictures[0])
    pieces = [chunks[i : i + 500] for i in range(0, len(chunks), 500)]
    statuses, _ = told(
        server, CHUNKED + b"Connection: close\r\n\r\n", *pieces, b"0\r\n\r\n", pause=0.0005
    )
    assert statuses == [200]


def test_trailers_are_not_headers(server: Server, pictures: list[bytes]) -> None:
    body = b"%x\r\n%b\r\n0\r\n" % (len(pictures[0]), pictures[0])
    head = CHUNKED + ID % b"first" + b"Connection: close\r\n\r\n"
    statuses, found = told(server, head, body, ID % b"second" + b"Content-Type: text/x\r\n\r\n")
    assert statuses == [200] and ids(found) == [b"first"]


@pytest.mark.parametrize("size", [40_000, 200_000])
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_headers_are_bounded(server: Server, size: int, end: bytes) -> None:
    for head in (LIVE + b"X: " + b"a" * size, b"GET /" + b"a" * size):
        statuses, _ = told(server, head + end)
        assert statuses in ([431], [400], []), head[:20]
    many = LIVE + b"".join(b"X%d: 1\r\n" % i for i in range(size // 8))
    assert told(server, many + b"\r\n")[0] in ([431], [])


def test_headers_of_some_length_are_read(server: Server) -> None:
    long = b"X: " + b"a" * 20_000 + b"\r\nConnection: close\r\n\r\n"
    assert told(server, LIVE + long)[0] == [200]
    assert told(server, LIVE + long[:9000], long[9000:])[0] == [200]


@pytest.mark.parametrize("hosts", [b"", b"Host: x\r\nHost: y\r\n", b"Host: x\r\nhost: x\r\n"])
def test_there_is_one_host(server: Server, hosts: bytes) -> None:
    statuses, found = told(server, b"GET /livez HTTP/1.1\r\n" + hosts + b"\r\n")
    assert statuses == [400] and b"one Host header" in found


def test_old_clients_name_no_host(server: Server) -> None:
    statuses, found = told(server, b"GET /livez HTTP/1.0\r\n\r\n")
    assert statuses == [200] and found.endswith(b"ok\n")


@pytest.mark.parametrize("target", [b"*", b"x", b"//", b"/\xff", b"http://", b"/%ff", b"x:443"])
def test_strange_targets(server: Server, target: bytes) -> None:
    for method in (b"GET", b"OPTIONS", b"CONNECT"):
        head = method + b" " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        statuses, found = told(server, head)
        assert len(statuses) == 1 and 400 <= statuses[0] < 500, (head, found)


def test_whole_addresses_are_read(server: Server) -> None:
    head = b"GET http://x/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert told(server, head)[0] == [200]


@pytest.mark.parametrize("to", [b"h2c", b"websocket", b"x"])
def test_who_asks_for_another_protocol_gets_this_one(
    server: Server, pictures: list[bytes], to: bytes
) -> None:
    asked = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + to + b"\r\n"
    length = b"Content-Length: %d\r\n" % len(pictures[0])
    one = POST + asked + ID % b"one" + length + b"\r\n" + pictures[0]
    two = CHUNKED + asked + ID % b"two" + b"\r\n%x\r\n" % len(pictures[0]) + pictures[0]
    three = LIVE + asked + ID % b"three" + b"\r\n"
    for parts in ([one + two + b"\r\n0\r\n\r\n" + three], [one, two, b"\r\n0\r\n\r\n", three]):
        statuses, found = told(server, *parts)
        assert statuses == [200] * 3 and ids(found) == [b"one", b"two", b"three"]
    assert len(told(server, three * 200)[0]) <= MOST_AHEAD + 1


@pytest.mark.parametrize(
    "framing",
    [
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: 0x3\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Content-Length : 3\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(server: Server, framing: bytes) -> None:
    statuses, found = told(server, POST + framing + b"\r\nabc" + live("smuggled"))
    assert statuses == [400] and b"smuggled" not in found


def test_a_body_that_breaks_off(server: Server) -> None:
    statuses, found = told(server, CHUNKED + b"\r\n3\r\nabc\r\n", b"zz\r\n")
    assert statuses == [400] and b"not valid HTTP/1.1" in found


def test_empty_lines_are_not_a_request(server: Server) -> None:
    start = time.monotonic()
    assert told(server, *[b"\r\n"] * 60) == ([], b"")
    assert time.monotonic() - start < 10
    assert told(server, b"\r\n" + live("one"))[0] == [200]


def test_who_still_sends_hears_the_refusal(server: Server) -> None:
    for _ in range(20):
        statuses, _ = told(server, b"BROKEN\r\n\r\n", *[b"a" * 50_000] * 4, pause=0.001)
        assert statuses == [400]
