"""Every way in which one IPv4 address has been written to get past a guard."""

from __future__ import annotations

import ipaddress

FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")  # noqa: RUF001
CIRCLED = str.maketrans("0123456789", "⓪①②③④⑤⑥⑦⑧⑨")
BOLD = str.maketrans("0123456789", "".join(chr(0x1D7CE + n) for n in range(10)))
DOUBLE_STRUCK = str.maketrans("0123456789", "".join(chr(0x1D7D8 + n) for n in range(10)))
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")

PUBLIC_PREFIX = 0x2606_4700_0000_0000
"""A prefix that is nobody's special case, for interface ids that embed IPv4."""


def as_ipv4(address: str) -> dict[str, str]:
    """Spellings that are IPv4 to some parser; only ``dotted`` is one to hookd."""
    a, b, c, d = (int(part) for part in address.split("."))
    number = int(ipaddress.IPv4Address(address))
    return {
        "dotted": address,
        "trailing dot": f"{address}.",
        "two trailing dots": f"{address}..",
        "leading dot": f".{address}",
        "three parts": f"{a}.{b}.{c << 8 | d}",
        "two parts": f"{a}.{b << 16 | c << 8 | d}",
        "decimal": f"{number}",
        "decimal and dot": f"{number}.",
        "decimal over 2^32": f"{number + 2**32}",
        "octal": f"0{number:o}",
        "octal parts": f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        "octal parts, long": f"000{a:o}.0000{b:o}.00000{c:o}.000{d:o}",
        "hex": f"0x{number:08x}",
        "hex, upper": f"0X{number:08X}",
        "hex parts": f"0x{a:x}.0x{b:x}.0x{c:x}.0x{d:x}",
        "hex, two parts": f"0x{a:x}.{b << 16 | c << 8 | d}",
        "hex and dot": f"0x{number:08x}.",
        "mixed": f"{a}.0x{b:x}.0{c:o}.{d}",
        "hex first only": f"0x{a:x}.{b}.{c}.{d}",
        "hex last only": f"{a}.{b}.{c}.0x{d:x}",
        "zero-padded": f"{a:03}.{b:03}.{c:03}.{d:03}",
        "parts over 256": f"{a + 256}.{b + 256}.{c + 256}.{d + 256}",
        "five parts": f"{address}.0",
        "plus sign": f"+{address}",
        "full-width": address.translate(FULL_WIDTH),
        "full-width hex": f"０x{number:08x}",  # noqa: RUF001
        "circled": address.translate(CIRCLED),
        "bold": address.translate(BOLD),
        "double-struck": address.translate(DOUBLE_STRUCK),
        "superscript": address.translate(SUPERSCRIPT),
        "arabic-indic": address.translate(ARABIC),
        "one circled": f"{a}.{b}.{c}.{str(d).translate(CIRCLED)}",
        "ideographic dots": address.replace(".", "。"),
        "full-width dots": address.replace(".", "．"),  # noqa: RUF001
        "half-width dots": address.replace(".", "｡"),
        "soft hyphens": address.replace(".", ".\u00ad"),
        "zero-width spaces": address.replace(".", ".\u200b"),
        "percent-encoded": "".join(f"%{ord(c):02x}" for c in address),
        "percent-encoded dots": address.replace(".", "%2e"),
        "percent-encoded twice": address.replace(".", "%252e"),
        "NUL": f"{address}%00.example.com",
        "bracketed": f"[{address}]",
    }


def as_ipv6(address: str) -> dict[str, str]:
    """IPv6 addresses that carry an IPv4 one; all canonical IPv6, so that only the guard can tell."""
    number = int(ipaddress.IPv4Address(address))
    numbers = {
        "mapped": 0xFFFF << 32 | number,
        "compatible": number,
        "SIIT": 0xFFFF << 48 | number,
        "reserved /8": 0x5EFE << 32 | number,
        "NAT64": 0x0064_FF9B << 96 | number,
        "NAT64 local-use": 0x0064_FF9B_0001 << 80 | number,
        "NAT64 local-use /48": 0x0064_FF9B_0001 << 80 | (number >> 16) << 64 | (number & 0xFFFF) << 40,
        "6to4": 0x2002 << 112 | number << 80 | 1,
        "Teredo client": 0x2001_0000 << 96 | 0x0808_0808 << 64 | (number ^ 0xFFFF_FFFF),
        "Teredo server": 0x2001_0000 << 96 | number << 64 | (0x0808_0808 ^ 0xFFFF_FFFF),
        "ISATAP": PUBLIC_PREFIX << 64 | 0x0000_5EFE << 32 | number,
        "ISATAP, universal": PUBLIC_PREFIX << 64 | 0x0200_5EFE << 32 | number,
        "ISATAP, link-local": 0xFE80 << 112 | 0x5EFE << 32 | number,
    }
    return {name: str(ipaddress.IPv6Address(n)) for name, n in numbers.items()}


def as_host(address: str) -> dict[str, str]:
    """All of these, as they stand in a URL."""
    hosts = as_ipv4(address)
    for name, text in as_ipv6(address).items():
        exploded = ipaddress.IPv6Address(text).exploded
        hosts[name] = f"[{text}]"
        hosts[f"{name}, exploded"] = f"[{exploded.upper()}]"
        hosts[f"{name}, zone"] = f"[{text}%251]"
    hosts["mapped, dotted"] = f"[::ffff:{address}]"
    hosts["mapped, dotted and exploded"] = f"[0:0:0:0:0:FFFF:{address}]"
    hosts["compatible, dotted"] = f"[::{address}]"
    hosts["NAT64, dotted"] = f"[64:ff9b::{address}]"
    hosts["mapped, bare zone"] = f"[::ffff:{address}%eth0]"
    hosts["mapped, no brackets"] = f"::ffff:{address}"
    return hosts
