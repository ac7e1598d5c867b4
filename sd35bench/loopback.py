"""Which hosts are this machine, by their text alone: no name is looked up."""

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address without brackets, is this machine's own."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
