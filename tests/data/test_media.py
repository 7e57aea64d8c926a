"""Pictures and recordings are read as they are meant, and whatever is wrong with one is said in one line."""

import base64
import io
import random
import struct

import numpy as np
import pytest
from PIL import Image

from fanformer.model import media_fanformer
from fanformer.model.multimodal import load_picture, load_recording
from tests.multimodal_files import write_picture, write_tone

soundfile = pytest.importorskip("soundfile")


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sounded(samples, rate=16000, kind="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_format_gives_its_pixels(kind):
    image = Image.new("RGB", (16, 12), (200, 40, 90))
    read = load_picture(encoded(image, kind))
    assert (read.mode, read.size) == ("RGB", (16, 12))
    assert np.abs(np.asarray(read).astype(int) - (200, 40, 90)).max() <= 4  # JPEG and WebP round


def test_16_bit_grey_keeps_its_greys():
    values = np.array([[0, 257 * 64], [32896, 65535]], dtype=np.uint16)
    assert np.asarray(load_picture(encoded(Image.fromarray(values))))[..., 0].tolist() == [[0, 64], [128, 255]]


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(load_picture(encoded(clear))).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    half = Image.new("LA", (1, 1), (0, 128))
    assert np.asarray(load_picture(encoded(half)))[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 90, 90, 90])
    palette.putpixel((1, 0), 1)
    assert np.asarray(load_picture(encoded(palette, transparency=0)))[0, :, 0].tolist() == [255, 90]
    grey = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert np.asarray(load_picture(encoded(grey, transparency=0)))[0, :, 0].tolist() == [255, 255]


def test_pictures_are_upright():
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((0, 0), (255, 255, 255))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    read = load_picture(encoded(image, exif=turned))
    assert read.size == (1, 2)
    assert np.asarray(read)[:, 0, 0].tolist() == [255, 0]


def test_a_photo_with_its_depths_behind_it_is_the_photo():
    photo, depths = Image.new("RGB", (16, 12), (200, 40, 90)), Image.new("RGB", (8, 8))
    read = load_picture(encoded(photo, "MPO", save_all=True, append_images=[depths]))
    assert read.size == (16, 12)
    assert np.abs(np.asarray(read).astype(int) - (200, 40, 90)).max() <= 4  # JPEG rounds


def test_a_pil_image_is_treated_like_a_file():
    clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    assert load_picture(clear).getpixel((0, 0)) == (255, 255, 255)


def test_grey_and_cmyk_become_rgb():
    assert load_picture(encoded(Image.new("L", (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert load_picture(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert load_picture(encoded(Image.new("CMYK", (8, 8), 0), "JPEG")).getpixel((4, 4)) == (255, 255, 255)


def test_base64_and_data_uris_are_read(tmp_path):
    path = write_picture(tmp_path / "a.png", "red")
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    assert load_picture(uri).tobytes() == load_picture(path).tobytes() == load_picture(path.read_bytes()).tobytes()
    with pytest.raises(ValueError, match="base64 must be whole, got '###'"):
        load_picture("data:image/png;base64,###")


def test_bad_pictures_are_named_in_one_line(tmp_path):
    good = write_picture(tmp_path / "a.png", "red")
    content = good.read_bytes()

    def wrong(name, data, message):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            load_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
        if data:
            with pytest.raises(ValueError, match=message) as of_bytes:
                load_picture(data, "some.png")
            assert str(of_bytes.value).startswith("some.png ")

    wrong("cut.png", content[: len(content) // 2], "damaged or truncated")
    wrong("empty.png", b"", "must hold something, got 0 bytes")
    wrong("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "got an SVG drawing")
    wrong("page.jpg", b"<!DOCTYPE html><html>", "got HTML")
    wrong("film.png", b"\0\0\0\x18ftypmp42" + bytes(20), r"got a video \(MP4\)")
    wrong("film.webp", b"RIFF\x24\0\0\0AVI LIST" + bytes(20), r"got a video \(AVI\)")
    wrong("sound.png", sounded(np.zeros(100)), "got wav sound")
    wrong("noise.png", bytes(range(1, 60)), "bytes that begin with")
    wrong(
        "moves.png", encoded(Image.new("L", (2, 2)), save_all=True, append_images=[Image.new("L", (2, 2), 9)]), "2 that"
    )
    with pytest.raises(ValueError, match=r"cannot read .*none\.png: No such file"):
        load_picture(tmp_path / "none.png")
    with pytest.raises(ValueError, match="must be a regular file"):
        load_picture(tmp_path)


def test_a_picture_that_claims_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    import zlib

    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "bomb.png").write_bytes(bytes(bomb))
    with pytest.raises(ValueError, match="must have at most 50,000,000 pixels"):
        load_picture(tmp_path / "bomb.png")
    monkeypatch.setattr(media_fanformer, "MOST_PIXELS", 10)
    with pytest.raises(ValueError, match="at most 10 pixels, got 12 x 12"):
        load_picture(write_picture(tmp_path / "a.png", "red"))


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_every_sound_format_is_heard_at_any_rate(kind):
    time = np.arange(22050) / 22050
    stereo = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros_like(time)], 1) * 0.5
    heard = load_recording(sounded(stereo, 22050, kind))
    assert heard.dtype == np.float32
    assert abs(len(heard) - 16000) <= 1200  # lossy formats pad to their frames
    spectrum = np.abs(np.fft.rfft(heard[2000:10000]))
    assert abs(spectrum.argmax() * 16000 / 8000 - 440) <= 4
    assert 0.2 < np.abs(heard).max() < 0.3  # the mean of both channels


def test_silence_and_long_recordings_are_heard():
    assert not load_recording(sounded(np.zeros(800))).any()
    assert len(load_recording(sounded(np.zeros(16000 * 45)))) == 16000 * 45


def test_bad_recordings_are_named_in_one_line(tmp_path, monkeypatch):
    tone = write_tone(tmp_path / "a.wav", "low").read_bytes()
    noise = np.random.default_rng(0).standard_normal(8000) * 0.1

    def wrong(name, data, message):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            load_recording(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
        with pytest.raises(ValueError, match=message) as of_bytes:
            load_recording(data, name="some.wav")
        assert str(of_bytes.value).startswith("some.wav ")

    wrong("cut.wav", tone[: len(tone) // 2], "truncated")
    for kind in ("FLAC", "OGG"):
        whole = sounded(noise, kind=kind)
        wrong(f"cut.{kind.lower()}", whole[: len(whole) // 2], "truncated")
    wrong("none.wav", sounded(np.zeros(0)), "must last some time, got 0 samples")
    wrong("nan.wav", sounded(np.array([0.0, np.nan, 0.1]), subtype="FLOAT"), "samples that are not finite")
    wrong("inf.wav", sounded(np.array([0.0, np.inf]), subtype="FLOAT"), "samples that are not finite")
    wrong("picture.wav", encoded(Image.new("L", (4, 4))), "must be whole sound in wav, flac, ogg or mp3, got a PNG")
    wrong("text.mp3", b"hello, this is no sound at all", "must be whole sound in wav, flac, ogg or mp3")
    wrong("other.wav", sounded(noise, kind="AIFF"), "must be sound in wav, flac, ogg or mp3, got AIFF")
    monkeypatch.setattr(media_fanformer, "MOST_SECONDS", 0.1)
    wrong("long.wav", tone, "must last at most 0.1 s")
    with pytest.raises(ValueError, match=r"must have the shape \(samples,\), got \(2, 5\)"):
        load_recording(np.zeros((2, 5), dtype=np.float32))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"needs the package `soundfile`.*fanformer\[multimodal\]"):
        load_recording(write_tone(tmp_path / "a.wav", "low"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "WAV", "FLAC", "OGG", "MP3"])
def test_damage_anywhere_is_an_error_or_a_picture_but_never_something_else(kind):
    numbers = random.Random(kind)
    noise = np.random.default_rng(0)
    if kind in ("WAV", "FLAC", "OGG", "MP3"):
        whole, load = sounded(noise.standard_normal(400) * 0.1, kind=kind), load_recording
    else:
        pixels = noise.integers(0, 255, (9, 11, 3), dtype=np.uint8)
        whole, load = encoded(Image.fromarray(pixels), kind), load_picture
    read, messages = 0, []
    for _ in range(150):
        spoilt = bytearray(whole)
        for _ in range(numbers.randint(1, 4)):
            place = (
                numbers.randrange(len(spoilt)) if numbers.random() < 0.5 else numbers.randrange(min(60, len(spoilt)))
            )
            spoilt[place] = numbers.randrange(256)
        if numbers.random() < 0.3:
            del spoilt[numbers.randrange(len(spoilt)) :]
        try:
            load(bytes(spoilt))
            read += 1
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert not [text for text in messages if "\n" in text]
    assert read or kind in ("OGG", "PNG")  # which have checksums
