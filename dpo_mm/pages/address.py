"""Address of a page: the host and the names under which it is served, and the links of its people."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_mm.pages.access import Access, Visitor, key_hash, keys_file, link, make_keys, people_links, read_people

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Serving:
    """Address and visitors of a page.

    Args:
        host: address or name on which the server listens.
        port: None: the first free port from 7860.
        allow_host: other hosts (NAME or NAME:PORT) under which the page may be opened or shown in a frame.
        people: file with one name per line. Each person opens the page by a secret link, and nobody else can.
        host_key: the host of the page has a secret link too.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    allow_host: Sequence[str] = ()
    people: str | None = None
    host_key: bool = False

    def check(self) -> None:
        """Check that a page which other machines can reach has keys, and the file of names.

        Raises:
            ValueError: if it has none, or as in `read_people`.
        """
        if self.people is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} lets other machines open the page, and nothing says who may. Add --people FILE with one "
                "name per line: each person gets a secret link"
            )
        if self.people is not None:
            read_people(self.people)


LOCAL = Serving()
"""This machine only."""


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach a host. A name other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def hosts_of(serving: Serving, port: int) -> set[str]:
    """Return the hosts, with the port, under which a page may be opened. The guard adds addresses of this machine."""
    names = {*LOCAL_NAMES} if is_loopback(serving.host) else {*LOCAL_NAMES, *machine_names(), serving.host.lower()}
    return {f"{name}:{port}" for name in names} | {host.lower() for host in serving.allow_host}


def machine_names() -> set[str]:
    """Return the names of this machine."""
    name = socket.gethostname().lower()
    return {name, f"{name}.local", socket.getfqdn().lower()}


def address_of(serving: Serving, port: int) -> str:
    """Return the address that other people open, with an IP address of this machine if the page listens on all."""
    host = serving.host
    if host in ("0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # chooses the interface. Nothing is sent
                host = probe.getsockname()[0]
            except OSError:
                host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_access(serving: Serving, port: int) -> tuple[Access | None, list[str]]:
    """Make the keys of a page. Return them, and the lines that tell the host how to open it.

    Raises:
        ValueError: as in `make_keys`.
    """
    local = f"http://127.0.0.1:{port}" if serving.host in ("127.0.0.1", "0.0.0.0") else address_of(serving, port)
    stop = "(stop with Ctrl-C)"
    if serving.people is None and not serving.host_key:
        return None, [f"Open {local} {stop}"]
    key = secrets.token_urlsafe(32)
    visitors, lines = {key_hash(key): Visitor("")}, [f"Open {link(local, key)} {stop}"]
    if serving.people is not None:
        hashes, new = make_keys(serving.people)
        visitors |= {digest: Visitor(name) for name, digest in hashes.items()}
        lines = [*people_links(address_of(serving, port), hashes, new, keys_file(serving.people)), *lines]
    return Access(f"dpo-mm-key-{port}", visitors, is_open=serving.people is None), lines
