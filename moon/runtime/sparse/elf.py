"""What an object file defines and what it would need from elsewhere.

Asked to load an object that needs what nobody has, or for a function that is not in it, LLVM
ends the process. So both are read from the symbol table beforehand.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["Symbols", "read_symbols"]

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE = 2
_FUNCTION = 2
_LOCAL = 0
_UNDEFINED = 0


@dataclass(frozen=True)
class Symbols:
    """Names of an object file.

    Attributes:
        functions: those it defines and shows to others, with code.
        others: what else it defines and shows.
        missing: names it refers to and does not define.
    """

    functions: frozenset[str]
    others: frozenset[str]
    missing: frozenset[str]


def read_symbols(data: bytes) -> Symbols:
    """The names of a 64-bit little-endian ELF object.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        return _read(data)
    except (struct.error, OverflowError) as error:
        raise ValueError("the object file is truncated") from error


def _read(data: bytes) -> Symbols:
    fields = _HEADER.unpack_from(data)
    if fields[0][:7] != b"\x7fELF\x02\x01\x01" or fields[11] != _SECTION.size:
        raise ValueError("not a 64-bit ELF object")
    start, count = fields[6], fields[12]
    sections = [_SECTION.unpack_from(data, start + _SECTION.size * i) for i in range(count)]
    functions: set[str] = set()
    others: set[str] = set()
    missing: set[str] = set()
    for section in sections:
        if section[1] != _SYMBOL_TABLE:
            continue
        offset, size, link = section[4], section[5], section[6]
        if link >= count or offset + size > len(data):
            raise ValueError("the object file is damaged")
        names = data[sections[link][4] : sections[link][4] + sections[link][5]]
        # The first symbol of a table is empty.
        for at in range(offset + _SYMBOL.size, offset + size, _SYMBOL.size):
            name, info, _, where, address, length = _SYMBOL.unpack_from(data, at)
            text = names[name : names.find(b"\0", name)].decode("ascii", "replace")
            if where == _UNDEFINED:
                missing.add(text)
            elif info >> 4 == _LOCAL:
                continue
            elif info & 15 != _FUNCTION:
                others.add(text)
            elif where >= count or not 0 < length <= sections[where][5] - address:
                raise ValueError("the object file is damaged")
            else:
                functions.add(text)
    return Symbols(frozenset(functions), frozenset(others), frozenset(missing))
