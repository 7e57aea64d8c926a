"""What general-purpose compressors make of a text, as the mark that a model has to beat."""

import lzma
import zlib
from pathlib import Path

from fanformer.files.durable import read_pieces

LARGEST_COMPRESSED = 8 * 10**6
"""Bytes of text above which gzip and xz are not measured: xz -9 would take longer than encoding everything else."""


def compressed_sizes(path: Path) -> dict[str, int | None]:
    """Return gzip_bytes and xz_bytes: a file's size under `gzip -9` and `xz -9`, None where it is empty or missing."""
    if not path.is_file() or not path.stat().st_size:
        return {"gzip_bytes": None, "xz_bytes": None}
    gzip, xz = zlib.compressobj(9, zlib.DEFLATED, wbits=31), lzma.LZMACompressor(preset=9)
    gzip_bytes = xz_bytes = 0
    for content in read_pieces(path):
        gzip_bytes += len(gzip.compress(content))
        xz_bytes += len(xz.compress(content))
    return {"gzip_bytes": gzip_bytes + len(gzip.flush()), "xz_bytes": xz_bytes + len(xz.flush())}
