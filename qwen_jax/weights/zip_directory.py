"""Where the entries of a zip archive lie, if it is one of plain, uncompressed files such as torch.save writes.

Formats: APPNOTE.TXT of PKWARE, 4.3. Only the central directory is believed, and it must describe the file without
contradiction; whatever torch.save does not use (compression, encryption, comments, several disks) is refused.
"""

from __future__ import annotations

import dataclasses
import struct

from qwen_jax.weights.tensors import RegularFile, quoted

MAX_ENTRIES = 20_000
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x2041  # general purpose bits 0, 6 and 13
_FULL32 = 0xFFFFFFFF  # stands for a number that only its 64 bit field can hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZipEntry:
    """A file in the archive: `header` is where its local header starts, `limit` where the next thing does."""

    name: str
    size: int
    header: int
    limit: int


def read_directory(file: RegularFile) -> dict[str, ZipEntry]:
    """The entries by name. Raises ValueError, in a clause, if the archive is not of the kind described above."""
    count, size, start = _find_directory(file)
    if count > MAX_ENTRIES:
        raise ValueError(f"the archive has {count} entries, where {MAX_ENTRIES} is the limit")
    if size > count * 256:  # torch.save writes less than 150 each
        raise ValueError(f"the archive's directory has {size} bytes for {count} entries")
    directory = file.read_bytes(start, size)
    entries: dict[str, tuple[int, int]] = {}
    position = 0
    for _ in range(count):
        name, entry, position = _parse_entry(directory, position)
        if name in entries:
            raise ValueError(f"the archive has two entries {quoted(name)}")
        entries[name] = entry
    if position != size:
        raise ValueError("the archive's directory is longer than its entries")
    headers = sorted(header for header, _ in entries.values())
    limits = dict(zip(headers, [*headers[1:], start], strict=True))
    if len(limits) != len(entries):
        raise ValueError("two entries of the archive lie at the same place")
    return {
        name: ZipEntry(name=name, size=size, header=header, limit=limits[header])
        for name, (header, size) in entries.items()
    }


def data_offset(file: RegularFile, entry: ZipEntry) -> int:
    """Where the contents of an entry start in the file. Raises ValueError if they are not where they should be."""
    if entry.header + _LOCAL.size > entry.limit:
        raise ValueError(f"entry {quoted(entry.name)} overlaps the next")
    signature, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack(
        file.read_bytes(entry.header, _LOCAL.size)
    )
    start = entry.header + _LOCAL.size + name_length + extra_length
    if signature != b"PK\3\4" or flags & _ENCRYPTED or method != 0:
        raise ValueError(f"entry {quoted(entry.name)} is not a plain file at byte {entry.header}")
    if start + entry.size > entry.limit:
        raise ValueError(f"entry {quoted(entry.name)} overlaps the next")
    if file.read_bytes(entry.header + _LOCAL.size, name_length) != entry.name.encode("utf-8"):
        raise ValueError(f"entry {quoted(entry.name)} has another name at byte {entry.header}")
    return start


def _find_directory(file: RegularFile) -> tuple[int, int, int]:
    """Number of entries, size and start of the central directory."""
    end = file.size - _END.size
    if end < 0:
        raise ValueError("the file is too short for an archive")
    signature, *_, count, size, start, _ = _END.unpack(file.read_bytes(end, _END.size))
    if signature != b"PK\5\6":
        raise ValueError("the archive does not end as it should, so the file is cut or has something appended")
    locator = end - _LOCATOR64.size
    if locator >= 0:
        signature, _, position, _ = _LOCATOR64.unpack(file.read_bytes(locator, _LOCATOR64.size))
        if signature == b"PK\6\7":
            end = locator - _END64.size
            if position != end:
                raise ValueError("the archive's 64 bit directory is not where it should be")
            signature, *_, count, size, start = _END64.unpack(file.read_bytes(end, _END64.size))
            if signature != b"PK\6\6":
                raise ValueError("the archive's 64 bit directory has no signature")
    if start + size != end:
        raise ValueError("the archive's directory does not end where its end is recorded")
    return count, size, start


def _parse_entry(directory: bytes, position: int) -> tuple[str, tuple[int, int], int]:
    """Name, (start of the local header, size) of the entry at `position`, and the position of the next."""
    try:
        fields = _ENTRY.unpack_from(directory, position)
    except struct.error:
        raise ValueError("the archive's directory is shorter than its entries") from None
    signature, _, _, flags, method, _, _, _, packed, size, name_length, extra_length, comment_length, *rest = fields
    header = rest[-1]
    position += _ENTRY.size
    end = position + name_length
    next_entry = end + extra_length + comment_length
    if next_entry > len(directory):
        raise ValueError("the archive's directory is shorter than its entries")
    name = directory[position:end].decode("utf-8")
    if signature != b"PK\1\2":
        raise ValueError("an entry of the archive's directory has no signature")
    if flags & _ENCRYPTED:
        raise ValueError(f"entry {quoted(name)} is encrypted")
    if method != 0:
        raise ValueError(f"entry {quoted(name)} is compressed")
    size, packed, header = _widen(directory[end : end + extra_length], [size, packed, header])
    if packed != size:
        raise ValueError(f"entry {quoted(name)} has two different sizes")
    return name, (header, size), next_entry


def _widen(extra: bytes, numbers: list[int]) -> list[int]:
    """The numbers, those too large for 32 bits taken from the extra field that holds them."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            return [next(wide, number) if number == _FULL32 else number for number in numbers]
        extra = extra[4 + length :]
    return numbers
