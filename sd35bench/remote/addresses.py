"""Where a request may go: URLs read strictly, names resolved once, every address looked at.

A URL that somebody else chose (a service's output, a redirect, a client's image) must not make
this machine fetch from its own network. Two gates, both closed by default:

- `check_url` reads the text. https only, a plain ASCII host, no credentials; whatever two parsers
  could read differently (octal and short addresses, percent signs, full-width digits, a trailing
  dot, backslashes) is refused instead of interpreted.
- `resolve` asks for the host's addresses once, refuses the host if any of them is not global
  unicast, and returns one. The caller connects to that address and to no name, so that a second,
  different answer of the name server (rebinding) is never asked for.

Loopback is open only to a caller that allows it, and only by its own names (`localhost`,
``127.0.0.1``, ``[::1]``): a public name that resolves to it is refused even then.

Source: the IANA special-purpose registries for IPv4 and IPv6 (RFC 6890 and its updates). They are
spelled out here because `ipaddress.is_global` follows them only as far as the Python at hand does
(3.11.7 calls 192.0.0.8, 2002:7f00:1:: and 64:ff9b::7f00:1 global).
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx2

from sd35bench.errors import RemoteError, UnsafeAddress
from sd35bench.loopback import is_loopback

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to addresses as text, the preferred one first; raises OSError."""

_AUTHORITY = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://(?P<authority>[^/?#]*)")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_NAME = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
_LONGEST_NAME = 253
_HTTPS_PORT = 443
_FIRST_USER_PORT = 1024

_NOT_GLOBAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared with the carrier's NAT
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local; clouds keep their credentials at 169.254.169.254
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks of networks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_GLOBAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments; Teredo, benchmarks and ORCHID among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, retired by RFC 7526: carries any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class HostNotAllowed(UnsafeAddress):
    """A URL on a `host` that the caller does not allow."""

    def __init__(self, message: str, *, host: str) -> None:
        super().__init__(message)
        self.host = host


class Unresolved(RemoteError):
    """A host has no address, or the name server gave no answer."""


def check_url(url: str, *, hosts: Sequence[str] | None, allow_loopback: bool) -> httpx2.URL:
    """Read a URL that may be fetched, as far as its text can tell.

    `hosts` are the ones allowed, all of them with ``None``; one with a leading dot takes
    subdomains of any depth. Ports of public hosts are 443 or at least 1024; the fragment is
    dropped.

    Raises: UnsafeAddress.
    """
    scheme, host, port = _split(url)
    loopback = names_loopback(host)
    if loopback and not allow_loopback:
        raise UnsafeAddress(
            f"{_shown(url)} is on this machine; allow_loopback=true lets such addresses through"
        )
    if scheme != "https" and not (scheme == "http" and loopback):
        raise UnsafeAddress(f"{_shown(url)}: only https is fetched, not {scheme}")
    if not loopback and port != _HTTPS_PORT and port < _FIRST_USER_PORT:
        raise UnsafeAddress(f"{_shown(url)}: port {port} belongs to another service than https")
    if hosts is not None and not any(_takes(allowed.lower(), host) for allowed in hosts):
        raise HostNotAllowed(
            f"{_shown(url)} is on none of the allowed hosts: {', '.join(hosts)}", host=host
        )
    _literal_or_none(host, allow_loopback=loopback)
    try:
        read = httpx2.URL(url).copy_with(fragment=None)
    except (httpx2.InvalidURL, ValueError) as exc:
        raise UnsafeAddress(f"{_shown(url)} is not a URL: {exc}") from exc
    seen = (read.scheme, read.raw_host.decode("ascii"), _port(read.scheme, read.port))
    if seen != (scheme, host, port):
        raise UnsafeAddress(f"{_shown(url)} can be read in more than one way")
    return read


async def resolve(
    host: str, port: int, *, allow_loopback: bool, lookup: Lookup | None = None
) -> str:
    """Return the address to connect to for a host that `check_url` let through.

    The name is looked up once. Every address has to be global unicast (IPv4 inside IPv6 and
    behind NAT64 is unwrapped first), or loopback where the host is a name of loopback and that is
    allowed. The first address is returned: the system sorts those first that can be reached from
    here (RFC 6724).

    Raises: UnsafeAddress; Unresolved where the lookup fails or finds nothing.
    """
    loopback = names_loopback(host)
    if loopback and not allow_loopback:
        raise UnsafeAddress(f"host {host} is this machine, and allow_loopback is false")
    literal = _literal_or_none(host, allow_loopback=loopback)
    if literal is not None:
        return literal
    try:
        found = await (system_lookup if lookup is None else lookup)(host, port)
    except (OSError, UnicodeError) as exc:
        raise Unresolved(f"host {host} cannot be resolved: {exc}") from exc
    if not found:
        raise Unresolved(f"host {host} has no address")
    for text in found:
        _vet(text, of=host, loopback=loopback)
    return found[0]


async def system_lookup(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver. Raises: OSError."""
    loop = asyncio.get_running_loop()
    answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def names_loopback(host: str) -> bool:
    """Whether a host, by its text alone, is this machine."""
    return host.endswith(".localhost") or is_loopback(host)


def _split(url: str) -> tuple[str, str, int]:
    """Scheme, host (IPv6 without brackets) and port of a URL in lower case."""
    if not all(char.isprintable() and char not in " \\" for char in url):
        raise UnsafeAddress(
            f"{_shown(url)}: blanks, backslashes and control characters have no place in a URL"
        )
    start = _AUTHORITY.match(url)
    if start is None:
        raise UnsafeAddress(f"{_shown(url)} is not a URL of the form https://host/path")
    parts = _HOST_PORT.fullmatch(start["authority"])
    if parts is None:
        raise UnsafeAddress(
            f"{_shown(url)}: the host must be plain ASCII (xn-- for other scripts) with nothing"
            " around it, neither a user name nor escapes"
        )
    scheme, host = start["scheme"].lower(), parts["host"].lower().strip("[]")
    port = _port(scheme, None if parts["port"] is None else int(parts["port"]))
    if not 1 <= port <= 65535:
        raise UnsafeAddress(f"{_shown(url)}: there is no port {port}")
    return scheme, host, port


def _port(scheme: str, port: int | None) -> int:
    return {"http": 80}.get(scheme, _HTTPS_PORT) if port is None else port


def _literal_or_none(host: str, *, allow_loopback: bool) -> str | None:
    """The host if it is an address that may be connected to; nothing if it is a name.

    A host whose last part starts with a digit is an address to some resolvers, in octal,
    hexadecimal or with parts left out (127.1, 0x7f000001): it has to be one as everybody writes it.
    """
    if ":" in host or re.fullmatch(r"[0-9.]+", host):
        _vet(host, of=host, loopback=allow_loopback)
        return host
    if not _NAME.fullmatch(host) or len(host) > _LONGEST_NAME:
        raise UnsafeAddress(
            f"host {host[:200]!r} is neither a domain name (without a dot at its end) nor an"
            " address in its usual form"
        )
    return None


def _vet(text: str, *, of: str, loopback: bool) -> None:
    """Raise UnsafeAddress unless an address may be connected to."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as exc:
        raise UnsafeAddress(f"host {of[:200]!r}: {text[:100]!r} is not an address") from exc
    inner = _unwrapped(address)
    if inner.is_loopback if loopback else _is_global(inner):
        return
    kind = "not on this machine" if loopback else "no public address"
    raise UnsafeAddress(f"host {of} leads to {text}, which is {kind}")


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for; itself if it stands for none."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_global(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_GLOBAL_V4)
    if address.scope_id is not None or address not in _GLOBAL_V6:
        return False
    return not any(address in network for network in _NOT_GLOBAL_V6)


def _takes(allowed: str, host: str) -> bool:
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed


def _shown(url: str) -> str:
    """A URL fit for a message: no query (it may hold a signature), no control characters."""
    return ascii(re.split("[?#]", url, maxsplit=1)[0][:200])
