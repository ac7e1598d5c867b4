"""URLs that must not be fetched, and some that may, with how their hosts resolve.

`refused` runs the code that downloads run; what it leaves out is the socket: in its place stands a
transport that answers for every address, and tells on which ones it was asked. An entry is refused
if the download ended in `UnsafeAddress` and no address was reached but the public ones below.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx2

from sd35bench.errors import UnsafeAddress
from sd35bench.remote.download import download
from sd35bench.remote.http import Network

__all__ = ["CORPUS", "GOOD", "Entry", "Wire", "fetched", "lookup_of", "refused"]

PUBLIC = "93.184.216.34"
PUBLIC_V6 = "2606:2800:220:1:248:1893:25c8:1946"
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A URL, what its hosts resolve to (one list per lookup, the last repeated), its redirects."""

    name: str
    url: str
    hosts: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    redirects: Mapping[str, str] = field(default_factory=dict)
    allowed: Sequence[str] | None = None


class Wire(httpx2.AsyncBaseTransport):
    """Answers for every address; `reached` says on which it was asked for what."""

    def __init__(self, redirects: Mapping[str, str]) -> None:
        self.redirects = redirects
        self.reached: list[tuple[str, str]] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.headers["host"]
        self.reached.append((request.url.raw_host.decode(), host))
        location = self.redirects.get(f"https://{host}{request.url.raw_path.decode()}")
        if location is not None:
            nothing = httpx2.ByteStream(b"")
            return httpx2.Response(302, headers={"Location": location}, stream=nothing)
        body = httpx2.ByteStream(PNG_START)
        return httpx2.Response(200, headers={"Content-Type": "image/png"}, stream=body)


def lookup_of(hosts: Mapping[str, Sequence[Sequence[str]]], asked: list[str]):
    """A resolver that gives each host's answers in turn and counts who was asked for."""

    async def lookup(host: str, port: int) -> Sequence[str]:
        answers = hosts.get(host, [[PUBLIC]])
        asked.append(host)
        return answers[min(asked.count(host), len(answers)) - 1]

    return lookup


def fetched(entry: Entry) -> tuple[Exception | None, list[tuple[str, str]], list[str]]:
    """Download an entry; what it raised, the addresses it reached, the hosts it looked up."""
    wire, asked = Wire(entry.redirects), []
    network = Network(lookup=lookup_of(entry.hosts, asked), open_transport=lambda: wire)
    try:
        asyncio.run(
            download(
                entry.url, hosts=entry.allowed, allow_loopback=False, deadline_s=5, network=network
            )
        )
    except Exception as exc:
        return exc, wire.reached, asked
    return None, wire.reached, asked


def refused(entry: Entry) -> bool:
    """Whether an entry was refused before anything but a public address was reached."""
    error, reached, _ = fetched(entry)
    public = all(address in (PUBLIC, PUBLIC_V6) for address, _ in reached)
    return isinstance(error, UnsafeAddress) and public


def _texts() -> list[Entry]:
    """URLs whose text is enough to refuse them."""
    urls = {
        "http": "http://images.example.com/a.png",
        "file": "file:///etc/passwd",
        "file-host": "file://localhost/etc/passwd",
        "ftp": "ftp://images.example.com/a.png",
        "gopher": "gopher://images.example.com:70/_GET%20/",
        "javascript": "javascript:alert(1)",
        "data-html": "data:text/html;base64,PGI+",
        "data-svg": "data:image/svg+xml;base64,PHN2Zy8+",
        "data-plain": "data:,hello",
        "unix-socket": "http+unix://%2Fvar%2Frun%2Fdocker.sock/images",
        "ws": "wss://images.example.com/a.png",
        "no-scheme": "//images.example.com/a.png",
        "no-host": "https:///a.png",
        "one-slash": "https:/images.example.com/a.png",
        "empty": "",
        "loopback": "https://127.0.0.1/a.png",
        "loopback-http": "http://127.0.0.1:8000/a.png",
        "loopback-other": "https://127.8.9.10/a.png",
        "localhost": "https://localhost/a.png",
        "localhost-capitals": "https://LOCALHOST/a.png",
        "localhost-subdomain": "https://a.localhost/a.png",
        "loopback-v6": "https://[::1]/a.png",
        "loopback-v6-long": "https://[0000:0000:0000:0000:0000:0000:0000:0001]/a.png",
        "unspecified": "https://0.0.0.0/a.png",
        "unspecified-v6": "https://[::]/a.png",
        "zero": "https://0/a.png",
        "decimal": "https://2130706433/a.png",
        "hex": "https://0x7f000001/a.png",
        "hex-dotted": "https://0x7f.0x0.0x0.0x1/a.png",
        "octal": "https://0177.0.0.1/a.png",
        "octal-padded": "https://127.0.0.01/a.png",
        "short": "https://127.1/a.png",
        "short-three": "https://127.0.1/a.png",
        "mixed-bases": "https://169.0xfe.0251.254/a.png",
        "overflow": "https://256.256.256.256/a.png",
        "decimal-overflow": "https://4294967297/a.png",
        "trailing-dot": "https://127.0.0.1./a.png",
        "trailing-dot-name": "https://localhost./a.png",
        "userinfo": "https://images.example.com@127.0.0.1/a.png",
        "userinfo-public": "https://user:pass@images.example.com/a.png",
        "userinfo-empty": "https://@images.example.com/a.png",
        "userinfo-twice": "https://a@b@127.0.0.1/a.png",
        "backslash": "https://images.example.com\\@127.0.0.1/a.png",
        "backslash-path": "https:\\\\127.0.0.1\\a.png",
        "tab": "https://127.0.\t0.1/a.png",
        "newline": "https://images.example.com\r\nHost: 127.0.0.1/a.png",
        "nul": "https://images.example.com\0.example.org/a.png",
        "leading-blank": " https://127.0.0.1/a.png",
        "percent-host": "https://%31%32%37.0.0.1/a.png",
        "percent-dot": "https://127%2e0%2e0%2e1/a.png",
        "fullwidth-digits": "https://１２７.０.０.１/a.png",
        "circled-digits": "https://①②⑦.⓪.⓪.①/a.png",
        "ideographic-stop": "https://127。0。0。1/a.png",
        "idna-name": "https://ｌocalhost/a.png",
        "soft-hyphen": "https://local\u00adhost/a.png",
        "dotless-i": "https://ımages.example.com/a.png",
        "metadata": "https://169.254.169.254/latest/meta-data/",
        "metadata-v6": "https://[fd00:ec2::254]/latest/meta-data/",
        "link-local-v6": "https://[fe80::1]/a.png",
        "link-local-zone": "https://[fe80::1%25eth0]/a.png",
        "private-10": "https://10.0.0.1/a.png",
        "private-172": "https://172.16.0.1/a.png",
        "private-172-end": "https://172.31.255.255/a.png",
        "private-192": "https://192.168.1.1/a.png",
        "carrier-nat": "https://100.64.0.1/a.png",
        "protocol-assignments": "https://192.0.0.8/a.png",
        "documentation": "https://203.0.113.7/a.png",
        "benchmarking": "https://198.18.0.1/a.png",
        "relay-anycast": "https://192.88.99.1/a.png",
        "multicast": "https://224.0.0.1/a.png",
        "multicast-v6": "https://[ff02::1]/a.png",
        "reserved": "https://240.0.0.1/a.png",
        "broadcast": "https://255.255.255.255/a.png",
        "unique-local-v6": "https://[fc00::1]/a.png",
        "site-local-v6": "https://[fec0::1]/a.png",
        "documentation-v6": "https://[2001:db8::1]/a.png",
        "documentation-v6-new": "https://[3fff::1]/a.png",
        "discard-v6": "https://[100::1]/a.png",
        "unassigned-v6": "https://[4000::1]/a.png",
        "mapped-loopback": "https://[::ffff:127.0.0.1]/a.png",
        "mapped-hex": "https://[::ffff:7f00:1]/a.png",
        "mapped-private": "https://[::ffff:10.0.0.1]/a.png",
        "translated": "https://[::ffff:0:127.0.0.1]/a.png",
        "compatible": "https://[::127.0.0.1]/a.png",
        "nat64": "https://[64:ff9b::127.0.0.1]/a.png",
        "nat64-metadata": "https://[64:ff9b::a9fe:a9fe]/a.png",
        "nat64-local": "https://[64:ff9b:1::10.0.0.1]/a.png",
        "6to4-loopback": "https://[2002:7f00:1::]/a.png",
        "6to4-private": "https://[2002:c0a8:101::1]/a.png",
        "teredo": "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/a.png",
        "v4-in-brackets": "https://[127.0.0.1]/a.png",
        "open-bracket": "https://[::1/a.png",
        "port-ssh": "https://images.example.com:22/a.png",
        "port-smtp": "https://images.example.com:25/a.png",
        "port-zero": "https://images.example.com:0/a.png",
        "port-too-large": "https://images.example.com:65536/a.png",
        "port-signed": "https://images.example.com:-1/a.png",
        "port-underscore": "https://images.example.com:4_43/a.png",
        "port-arabic": "https://images.example.com:٤٤٣/a.png",
        "two-ports": "https://images.example.com:443:80/a.png",
        "name-too-long": f"https://{'a.' * 150}com/a.png",
    }
    return [Entry(name=name, url=url) for name, url in urls.items()]


def _names() -> list[Entry]:
    """Names that look well and lead elsewhere."""
    answers = {
        "name-to-loopback": ["127.0.0.1"],
        "name-to-loopback-v6": ["::1"],
        "name-to-private": ["10.1.2.3"],
        "name-to-metadata": ["169.254.169.254"],
        "name-to-mapped": ["::ffff:192.168.0.1"],
        "name-to-nat64": ["64:ff9b::7f00:1"],
        "name-to-zone": ["fe80::1%2"],
        "name-to-unspecified": ["0.0.0.0"],
        "one-of-two-private": [PUBLIC, "10.0.0.1"],
        "one-of-three-loopback": [PUBLIC_V6, PUBLIC, "::1"],
        "name-to-scoped": [f"{PUBLIC_V6}%eth0"],
        "name-to-nonsense": ["not an address"],
    }
    url = "https://innocent.example.com/a.png"
    return [
        Entry(name=name, url=url, hosts={"innocent.example.com": [found]})
        for name, found in answers.items()
    ]


def _chains() -> list[Entry]:
    """Redirects from a public host, and name servers that change their minds."""
    start = "https://images.example.com/0"
    targets = {
        "redirect-loopback": "http://127.0.0.1/a.png",
        "redirect-localhost": "https://localhost:8443/a.png",
        "redirect-metadata": "http://169.254.169.254/latest/meta-data/",
        "redirect-http": "http://images.example.com/a.png",
        "redirect-file": "file:///etc/passwd",
        "redirect-data": "data:text/html,hello",
        "redirect-scheme-relative": "//10.0.0.1/a.png",
        "redirect-backslashes": "\\\\127.0.0.1\\a.png",
        "redirect-decimal": "https://2130706433/a.png",
        "redirect-userinfo": "https://images.example.com@127.0.0.1/a.png",
        "redirect-port": "https://images.example.com:22/a.png",
        "redirect-private-name": "https://inside.example.com/a.png",
    }
    inside = {"inside.example.com": [["192.168.0.10"]]}
    entries = [
        Entry(name=name, url=start, hosts=inside, redirects={start: target})
        for name, target in targets.items()
    ]
    host = "https://images.example.com/"
    hops = {f"{host}{n}": f"{host}{n + 1}" for n in range(4)}
    late = {**{f"{host}{n}": f"{host}{n + 1}" for n in range(2)}, f"{host}2": "https://10.0.0.1/"}
    rebound = {"images.example.com": [[PUBLIC], ["127.0.0.1"]]}
    return [
        *entries,
        Entry(name="four-redirects", url=start, redirects=hops),
        Entry(name="redirect-loop", url=start, redirects={start: start}),
        Entry(name="third-redirect-private", url=start, redirects=late),
        Entry(name="rebinding-redirect", url=start, redirects={start: f"{host}1"}, hosts=rebound),
        Entry(
            name="redirect-other-host",
            url=start,
            redirects={start: "https://other.example.org/a.png"},
            allowed=["images.example.com"],
        ),
        Entry(name="none-allowed", url=start, allowed=[]),
        Entry(name="not-allowed", url=start, allowed=[".example.org", "example.com"]),
        Entry(name="allowed-suffix", url="https://evilexample.org/a", allowed=[".example.org"]),
        Entry(name="allowed-apex", url="https://example.org/a", allowed=[".example.org"]),
    ]


CORPUS = (*_texts(), *_names(), *_chains())

GOOD = (
    Entry(name="plain", url="https://images.example.com/a.png"),
    Entry(name="capitals", url="HTTPS://Images.EXAMPLE.com/a.png"),
    Entry(name="query", url="https://images.example.com/a.png?sig=a%2Bb&x=@127.0.0.1"),
    Entry(name="fragment", url="https://images.example.com/a.png#@127.0.0.1/"),
    Entry(name="port-443", url="https://images.example.com:443/a.png"),
    Entry(name="port-high", url="https://images.example.com:8443/a.png"),
    Entry(name="punycode", url="https://xn--bcher-kva.example/a.png"),
    Entry(name="unicode-path", url="https://images.example.com/ä/１２７.png"),
    Entry(name="underscore", url="https://a_b.example.com/a.png"),
    Entry(name="digits-in-name", url="https://1.2.3.example.com/a.png"),
    Entry(name="address", url=f"https://{PUBLIC}/a.png"),
    Entry(name="address-v6", url=f"https://[{PUBLIC_V6}]/a.png"),
    Entry(
        name="several-addresses",
        url="https://images.example.com/a.png",
        hosts={"images.example.com": [[PUBLIC_V6, PUBLIC]]},
    ),
    Entry(name="allowed-subdomain", url="https://a.b.example.org/a.png", allowed=[".example.org"]),
    Entry(
        name="three-redirects",
        url="https://images.example.com/0",
        redirects={
            "https://images.example.com/0": "/1",
            "https://images.example.com/1": "https://cdn.example.org/2",
            "https://cdn.example.org/2": "//images.example.com/3",
        },
    ),
    Entry(
        name="rebinding-unasked",
        url="https://images.example.com/a.png",
        hosts={"images.example.com": [[PUBLIC], ["127.0.0.1"]]},
    ),
)
"""The last one's name server would lie if it was asked again: it must not be."""
