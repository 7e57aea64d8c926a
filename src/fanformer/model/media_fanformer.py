"""Pictures and recordings from files and bytes, checked first; what the library's own readers spoil is kept.

Those turn 16-bit pictures white and transparent ones black, forget how a camera was held where the picture is open
already, and let recordings through that hold no numbers.
"""

import base64
import importlib
import io
import os
import stat
import struct
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MOST_PIXELS = 50_000_000
"""Of a picture, known from its header: what a small file claims to hold must not fill the memory."""
MOST_BYTES = 512 << 20
"""Of a file."""
MOST_SECONDS = 1800
"""Of a recording."""
_MOST_SAMPLES = 1 << 28
_GREYS = np.rint(np.arange(1 << 16) / 257).astype(np.uint8)
"""Of 16-bit greys; looked up: to compute them takes 800 MiB more for the largest picture."""
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
RECORDING_FORMATS = {"WAV": "wav", "WAVEX": "wav", "RF64": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}
_PRETENDERS = (
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML"),
    (b"<!doctype", "HTML"),
    (b"<html", "HTML"),
    (b"%pdf", "PDF"),
    (b"gif8", "a GIF"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska)"),
    (b"bm", "a BMP"),
    (b"ii*\x00", "a TIFF"),
    (b"mm\x00*", "a TIFF"),
    (b"\x89png", "a PNG"),
    (b"\xff\xd8\xff", "a JPEG"),
    (b"flac", "FLAC sound"),
    (b"oggs", "Ogg sound"),
    (b"id3", "MP3 sound"),
    (b"pk\x03\x04", "a zip archive"),
)


def media_bytes(source: str | os.PathLike | bytes) -> bytes:
    """Return the content of a file, of a data: URI, or of bytes.

    Args:
        source: a path, `data:...;base64,...`, or the bytes themselves.

    Raises:
        ValueError: if it is missing, no regular file, too large, empty, or not base64.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        content = bytes(source)
    elif isinstance(source, str) and source.startswith("data:"):
        content = base64_bytes(source.partition(",")[2])
    else:
        path = Path(source)
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{path} must be a regular file, got something else.")
            if found.st_size > MOST_BYTES:
                raise ValueError(f"{path} must have at most {MOST_BYTES:,} bytes, got {found.st_size:,}.")
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    if not content:
        raise ValueError(f"{_name(source)} must hold something, got 0 bytes.")
    return content


def base64_bytes(text: str) -> bytes:
    """Return what `text` holds in base64.

    Raises:
        ValueError: if it is not base64.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"base64 must be whole, got {text[:24]!r}... of {len(text)} characters: {error}.") from error


def load_picture(source: Any, name: str | None = None) -> Image.Image:
    """Return a picture as it is meant to be seen: upright, RGB of 8 bits, white where it is transparent.

    Args:
        source: a path, a data: URI, bytes of PNG, JPEG or WebP, or a PIL image.
        name: what messages call it; None is what the source tells.

    Raises:
        ValueError: if there is none, it is damaged, of another format, moving, or larger than MOST_PIXELS.
    """
    if isinstance(source, Image.Image):
        return _as_rgb(source, "the picture")
    name, content = name or _name(source), media_bytes(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below is lower than the library's
            image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} must have at most {MOST_PIXELS:,} pixels, got more: {error}") from error
    except Exception as error:  # what a damaged header leads to depends on the format
        raise ValueError(
            f"{name} must be a whole picture in {', '.join(PICTURE_FORMATS)}, got {_what_it_is(content)}."
        ) from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{name} must have at most {MOST_PIXELS:,} pixels, got {width} x {height}: make it smaller.")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG of a phone or camera: behind the picture are depths and previews
        raise ValueError(f"{name} must be one picture, got {frames} that move: save one of them.")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} is damaged or truncated ({' '.join(str(error).split())[:120]}): copy it again."
        ) from error
    return _as_rgb(image, name)


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # of a damaged EXIF block; to leave it out could turn the picture
        raise ValueError(
            f"{name} has EXIF data that cannot be read ({type(error).__name__}): save it again."
        ) from error
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must hold numbers only, got some that are not finite.")
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        grey, clear = _GREYS[values], image.info.get("transparency")
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey, "L").convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        whole = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    return image.convert("RGB")


def load_recording(
    source: Any, rate: int = 16000, most_seconds: float | None = None, name: str | None = None
) -> np.ndarray:
    """Return a recording (samples,) float32, one channel at `rate` Hz; several channels are averaged.

    Args:
        source: a path, a data: URI, bytes of wav, flac, ogg or mp3, or an array (samples,) at `rate` already.
        rate: in Hz.
        most_seconds: that a file may last, which its header says; None is MOST_SECONDS.
        name: what messages call it; None is what the source tells.

    Raises:
        ValueError: if there is none, it is damaged, of another format, empty, too long, or holds what is no
            number.
        ImportError: if soundfile or soxr is not installed.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 1:
            raise ValueError(f"a recording must have the shape (samples,), got {source.shape}: average its channels.")
        return _checked(source.astype(np.float32), "the recording")
    name, content = name or _name(source), media_bytes(source)
    soundfile = _package("soundfile")
    if _is_cut(content):
        raise ValueError(f"{name} is truncated: it ends before its header says; copy it again.")
    try:
        file = soundfile.SoundFile(io.BytesIO(content))
    except Exception as error:  # of libsndfile, by the format
        got = _what_it_is(content)
        raise ValueError(f"{name} must be whole sound in wav, flac, ogg or mp3, got {got}.") from error
    with file:
        if file.format not in RECORDING_FORMATS:
            raise ValueError(f"{name} must be sound in wav, flac, ogg or mp3, got {file.format}.")
        seconds, most = file.frames / max(file.samplerate, 1), MOST_SECONDS if most_seconds is None else most_seconds
        if seconds > most or file.frames * file.channels > _MOST_SAMPLES:
            raise ValueError(f"{name} must last at most {most:,.4g} s, got {seconds:,.4g}: cut it.")
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{name} is damaged or truncated ({reason}): copy it again.") from error
        if len(samples) < file.frames and file.format != "MP3":  # whose header only guesses
            raise ValueError(f"{name} is truncated: {len(samples)} of {file.frames} samples; copy it again.")
        mono, given = _checked(samples.mean(axis=1), name), file.samplerate
    if given != rate:
        mono = _package("soxr").resample(mono, given, rate)
    return _checked(np.ascontiguousarray(mono, dtype=np.float32), name)


def _checked(samples: np.ndarray, name: str) -> np.ndarray:
    if not samples.size:
        raise ValueError(f"{name} must last some time, got 0 samples.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} must hold numbers only, got samples that are not finite: record it again.")
    return samples


def _is_cut(content: bytes) -> bool:
    """Whether a wav or Ogg file says that more should follow; libsndfile reads what is there and says nothing."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        size = struct.unpack("<I", content[4:8])[0]
        return size not in (0, 0xFFFFFFFF) and size + 8 > len(content) + 1  # those are written into a pipe
    if content[:4] == b"OggS":
        last = content.rfind(b"OggS")
        return last + 5 >= len(content) or not content[last + 5] & 4  # the flag of the last page
    return False


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"reading sound needs the package `{name}`, which is not installed: pip install soundfile soxr "
            "(the extra fanformer[multimodal] has both)"
        ) from error


def _what_it_is(content: bytes) -> str:
    """Return in words what bytes begin like."""
    start = content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if content[4:8] == b"ftyp":
        return "a video (MP4)"
    if content[:4] == b"RIFF" and len(content) >= 12:
        kind = content[8:12]
        return {b"AVI ": "a video (AVI)", b"WAVE": "wav sound", b"WEBP": "a WebP"}.get(kind, "RIFF")
    for beginning, words in _PRETENDERS:
        if start.startswith(beginning):
            return words
    return f"{len(content)} bytes that begin with {content[:8]!r}"


def _name(source: Any) -> str:
    if isinstance(source, str) and source.startswith("data:"):
        return f"the {source[5:].partition(';')[0][:24] or 'data'} in base64"
    return f"{source}" if isinstance(source, str | os.PathLike) else "the media"


__all__ = ["base64_bytes", "load_picture", "load_recording", "media_bytes"]
