"""Tables as the bytes of a Parquet file and back: what a disk or a network has changed is noticed, never read.

A file carries three kinds of checksum. Each page has Parquet's own, which any reader can verify; it covers neither page
headers nor the footer. So the footer's metadata holds two more, as `quorum.checksum: BODY-FOOTER`: of all bytes before
the footer, and of the footer itself (row counts, statistics, offsets, fingerprint) with its own eight digits as zeros.
All are CRC-32: every changed bit is found, and every run of up to 32 of them; of other changes one in 2^32 is not. They
guard against accidents, not against a forger. Files of older versions have no checksums and are read without.
"""

from __future__ import annotations

import io
import zlib

import pyarrow as pa
import pyarrow.parquet as pq

_KEY = b"quorum.checksum"
_BLANK = b"00000000-00000000"
#: How the entry begins: Thrift's heads of two strings, of 15 and 17 bytes, and the key between them.
_ENTRY = b"\x18\x0f" + _KEY + b"\x18\x11"


class Damaged(ValueError):
    """These are not the bytes that were written; the message is the reason, without the file's name."""


def encode(table: pa.Table, metadata: dict[bytes, bytes], row_group_size: int | None) -> bytes:
    """The bytes of a file; equal tables give equal bytes."""
    # Parquet pages end where chunks end, so the chunks of a table would change the bytes.
    whole = _in_one_piece(table).replace_schema_metadata({**metadata, _KEY: _BLANK})
    buffer = io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd", row_group_size=row_group_size, write_page_checksum=True)
    with buffer.getbuffer() as data:
        start = len(data) - footer_size(data[-8:])
        at = start + bytes(data[start:]).rindex(_ENTRY) + len(_ENTRY)
        data[at : at + 8] = _crc(data[:start])
        data[at + 9 : at + 17] = _crc(data[start:])
    return buffer.getvalue()


def decode(data: bytes) -> tuple[pq.ParquetFile, bool]:
    """A file, or its footer alone, and whether its checksums were verified.

    Raises:
        Damaged: a checksum is wrong, or this is no Parquet file.
    """
    try:
        size = footer_size(data[-8:])
        body = _check_footer(data[-size:])
        if body is not None and len(data) > size and _crc(memoryview(data)[:-size]) != body:
            raise Damaged("its content does not match its checksum")
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(str(error)) from error
    if body is None and _KEY in (file.schema_arrow.metadata or {}):
        raise Damaged("its checksum is gone")
    return file, body is not None


def footer_size(end: bytes | memoryview) -> int:
    """Bytes of a footer, with its length and the magic number, from the last eight bytes of a file.

    Raises:
        Damaged: this is not the end of a Parquet file.
    """
    if len(end) < 8 or end[-4:] != b"PAR1":
        raise Damaged("it does not end like a Parquet file")
    return int.from_bytes(end[-8:-4], "little") + 8


def _check_footer(footer: bytes) -> bytes | None:
    """The checksum that a footer holds of the bytes before it; None where it has none."""
    at = footer.rfind(_ENTRY)
    if at < 0:
        return None
    at += len(_ENTRY)
    if footer[at + 9 : at + 17] != _crc(footer[: at + 9] + b"0" * 8 + footer[at + 17 :]):
        raise Damaged("its footer does not match its checksum")
    return footer[at : at + 8]


def _crc(data: bytes | memoryview) -> bytes:
    return b"%08x" % zlib.crc32(data)


def _in_one_piece(table: pa.Table) -> pa.Table:
    try:
        return table.combine_chunks()
    except pa.ArrowException:  # More than 2 GB of nested text in a column do not fit one chunk.
        return table
