"""Decoding of pictures and videos: what comes out right, and how what is wrong is refused."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prismprune.errors import (
    InvalidOptionError,
    MediaTooLargeError,
    PrismError,
    UndecodableMediaError,
    UnsupportedMediaError,
)
from prismprune.media import (
    SNIFF_BYTES,
    Clip,
    FrameSampling,
    MediaLimits,
    Picture,
    as_picture,
    decode_image,
    decode_video,
    open_media,
    sniff,
)

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """40 x 20 with red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (40, 20))
    for box, color in (((0, 0), RED), ((20, 0), GREEN), ((0, 10), BLUE), ((20, 10), WHITE)):
        image.paste(color, (*box, box[0] + 20, box[1] + 10))
    return image


def near(pixel: float | tuple[int, ...] | None, color: tuple[int, int, int], tolerance: int = 12) -> bool:
    assert pixel is not None
    return bool(np.abs(np.subtract(pixel, color)).max() <= tolerance)


# Pictures


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_recognised_and_decoded(kind: str) -> None:
    """Every allowed format comes out as RGB in its own size, with its media type."""
    data = encoded(corners(), kind)
    picture = decode_image(data)
    assert sniff(data[:SNIFF_BYTES]) == f"image/{kind.lower()}"
    assert (picture.image.mode, picture.size) == ("RGB", (40, 20))
    assert near(picture.image.getpixel((5, 3)), RED, 40)
    assert picture.decode_ms > 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    """A picture stored in any of the eight orientations comes out upright."""
    store = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = corners() if store is None else corners().transpose(store)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode_image(encoded(stored, kind, exif=exif, quality=95))
    assert picture.size == (40, 20)
    for place, color in (((4, 4), RED), ((35, 4), GREEN), ((4, 15), BLUE), ((35, 15), WHITE)):
        assert near(picture.image.getpixel(place), color, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_spoil_a_picture() -> None:
    """EXIF bytes that are no EXIF leave the picture as it lies."""
    data = encoded(corners(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff nonsense")
    assert decode_image(data).size == (40, 20)


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *GREEN])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("data", "color"),
    [
        pytest.param(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), WHITE, id="rgba"),
        pytest.param(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128))), (255, 127, 127), id="half"),
        pytest.param(encoded(Image.new("LA", (4, 4), (0, 0))), WHITE, id="grey-alpha"),
        pytest.param(encoded(palette_with_hole(), transparency=0), WHITE, id="palette"),
        pytest.param(encoded(palette_with_hole(), "GIF", transparency=0), WHITE, id="gif"),
        pytest.param(encoded(Image.new("RGB", (4, 4), RED), transparency=RED), WHITE, id="color-key"),
        pytest.param(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP"), WHITE, id="webp"),
    ],
)
def test_alpha_goes_on_white(data: bytes, color: tuple[int, int, int]) -> None:
    """Transparency of any kind shows white, half of it half."""
    assert near(decode_image(data).image.getpixel((1, 1)), color, 2)


@pytest.mark.parametrize("value", [0, 20_000, 65_535])
def test_sixteen_bit_grey_is_scaled_not_clipped(value: int) -> None:
    """A 16-bit grey value keeps its brightness."""
    data = encoded(Image.fromarray(np.full((4, 4), value, np.uint16)))
    assert near(decode_image(data).image.getpixel((0, 0)), (value // 257,) * 3, 1)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[-5, 25_700, 65_535]], np.int32), [0, 100, 255]),
        (np.array([[0, 0.4, 1]], np.float32), [0, 102, 255]),
        (np.array([[-3, 100.4, 300]], np.float32), [0, 100, 255]),
        (np.array([[np.nan, 0.4, np.inf]], np.float32), [0, 102, 0]),
        (np.array([[np.nan, np.nan, np.nan]], np.float32), [0, 0, 0]),
    ],
)
def test_grey_of_32_bits_is_shown_by_its_range(values: np.ndarray[Any, Any], shown: list[int]) -> None:
    """A Pillow image of mode I or F does not become black for want of a range; no number is black."""
    image = as_picture(Image.fromarray(values)).image
    assert [image.getpixel((column, 0)) for column in range(3)] == [(value,) * 3 for value in shown]


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_dark_sixteen_bit_grey_stays_dark(byte_order: str) -> None:
    """Its range is its mode's, whatever the values are."""
    image = as_picture(Image.fromarray(np.array([[200, 513]], np.dtype(byte_order)))).image
    assert [image.getpixel((column, 0)) for column in range(2)] == [(0, 0, 0), (2, 2, 2)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_color_mode_becomes_rgb(mode: str) -> None:
    """Black and white, grey, palette, CMYK and YCbCr pictures come out as RGB."""
    kind = "JPEG" if mode in {"CMYK", "YCbCr"} else "PNG"
    picture = decode_image(encoded(Image.new("RGB", (8, 8), "white").convert(mode), kind))
    assert picture.image.mode == "RGB"
    assert near(picture.image.getpixel((3, 3)), WHITE, 3)


def test_an_animated_picture_is_its_first_frame() -> None:
    """Of an animated GIF read as a picture the first frame counts."""
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    picture = open_media(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert isinstance(picture, Picture)
    assert near(picture.image.getpixel((3, 3)), RED)


def test_a_pillow_image_is_made_upright_and_rgb() -> None:
    """An image that the caller opened goes the same way as bytes do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(corners().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert as_picture(Image.open(io.BytesIO(stored))).size == (40, 20)
    assert near(as_picture(Image.new("RGBA", (2, 2))).image.getpixel((0, 0)), WHITE)
    with pytest.raises(UndecodableMediaError):
        as_picture(Image.open(io.BytesIO(encoded(corners(), "BMP")[:200])))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


@pytest.mark.parametrize("header", [png_header, bmp_header])
@pytest.mark.parametrize("side", [5001, 10_000, 50_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(
    side: int, header: Callable[[int, int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many pixels are refused before anything is decoded, even if there is nothing but a header."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(MediaTooLargeError, match="25000000 pixels"):
        decode_image(header(side, side))


def test_too_many_bytes_are_refused() -> None:
    """The limit on bytes holds for pictures and videos."""
    data = encoded(corners())
    with pytest.raises(MediaTooLargeError, match="bytes"):
        decode_image(data, MediaLimits(max_image_bytes=len(data) - 1))
    with pytest.raises(MediaTooLargeError, match="bytes"):
        decode_video(data, limits=MediaLimits(max_video_bytes=len(data) - 1))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_cut_short_is_refused(kind: str) -> None:
    """Half of a picture is no picture, and the message is ours."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(UndecodableMediaError, match=r"^The picture is damaged or cut short\.$"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data",
    [
        b"Just a text, called .png",
        b"BMW is a maker of cars, not a bitmap",
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/secret.ts\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"II*\x00" + bytes(60),
        b"\x00\x00\x00\x1cftypavif" + bytes(40),
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    """Text, playlists, vector graphics and formats off the list are unsupported, whatever their name."""
    with pytest.raises(UnsupportedMediaError):
        open_media(data)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """An empty file is undecodable."""
    (tmp_path / "empty.png").touch()
    with pytest.raises(UndecodableMediaError, match="empty"):
        open_media(tmp_path / "empty.png")


SEEDS = [encoded(corners(), kind) for kind in FORMATS] + [
    encoded(palette_with_hole(), transparency=0),
    encoded(Image.new("CMYK", (9, 7), (10, 20, 30, 40)), "JPEG"),
]


@settings(max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    st.integers(0, 1 << 16),
)
@pytest.mark.filterwarnings("ignore")
def test_mutated_pictures_raise_only_our_errors(
    seed: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    """Whatever the bytes: a picture within limits, or one of our errors."""
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value
    try:
        picture = decode_image(bytes(data[: len(data) - cut % len(data)]), MediaLimits(max_pixels=1_000_000))
    except PrismError:
        return
    assert picture.image.mode == "RGB"
    assert picture.size[0] * picture.size[1] <= 1_000_000


# Videos


def video(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    frames: int = 16,
    fps: int = 8,
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
) -> bytes:
    """A video whose frame i is grey of brightness 16 * i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps, options={"x264-params": "log-level=none", **(options or {})})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 16 * i % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def growing() -> bytes:
    """A video whose second half is twice as wide and high, as of a call whose line has become better."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(16):
            scale = 1 + i // 8
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = 64 * scale, 48 * scale, "yuvj420p"
            encoder.time_base = Fraction(1, 8)
            frame = av.VideoFrame.from_ndarray(np.full((48 * scale, 64 * scale, 3), 16 * i, np.uint8))
            frame.pts = i
            for packet in [*encoder.encode(frame), *encoder.encode()]:
                packet.stream, packet.pts, packet.dts = stream, i, i
                packet.time_base = Fraction(1, 8)
                out.mux(packet)
    return buffer.getvalue()


def numbers(clip: Clip) -> list[int]:
    """Which frame of `video` each frame of the clip is."""
    return [round(float(np.asarray(frame).mean()) / 16) for frame in clip.frames]


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return video()


def test_frames_of_a_video_that_changes_its_size_are_of_one() -> None:
    """That of the first, which is the clip's."""
    clip = decode_video(growing(), FrameSampling(num_frames=16))
    assert numbers(clip) == list(range(16))
    assert {frame.size for frame in clip.frames} == {clip.size} == {(64, 48)}


OPEN_GROUPS = {"x264-params": "log-level=none:keyint=4:bframes=3:open-gop=1:b-adapt=0:scenecut=0"}


@pytest.mark.parametrize(
    ("container", "codec", "options", "media_type"),
    [
        ("mp4", "libx264", {}, "video/mp4"),
        ("mp4", "libx264", {"g": "4", "bf": "2"}, "video/mp4"),
        ("mp4", "libx264", OPEN_GROUPS, "video/mp4"),
        ("mp4", "mpeg4", {}, "video/mp4"),
        ("mov", "libx264", {"g": "1"}, "video/quicktime"),
        ("webm", "libvpx", {"g": "5"}, "video/webm"),
        ("webm", "libvpx-vp9", {}, "video/webm"),
        ("matroska", "libx264", {"g": "6"}, "video/x-matroska"),
        ("avi", "mpeg4", {"bf": "2"}, "video/x-msvideo"),
        ("avi", "libx264", {"bf": "2"}, "video/x-msvideo"),
        ("avi", "mjpeg", {}, "video/x-msvideo"),
    ],
)
def test_frames_come_in_order_and_at_their_times(
    container: str, codec: str, options: dict[str, str], media_type: str
) -> None:
    """Of 16 frames, 8 segments give every second one, whatever the container and the group structure."""
    data = video(container, codec, options=options)
    clip = decode_video(data)
    assert sniff(data[:SNIFF_BYTES]) == media_type
    assert numbers(clip) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert clip.times_s == pytest.approx([0.125 + 0.25 * i for i in range(8)], abs=0.005)
    assert (clip.size, clip.frames[0].mode, clip.frames[0].size) == ((64, 48), "RGB", (64, 48))
    assert clip.decode_ms > 0


def test_a_video_of_just_as_many_frames_gives_each_once(mp4: bytes) -> None:
    """Sixteen of sixteen frames are the sixteen frames."""
    assert numbers(decode_video(mp4, FrameSampling(16))) == list(range(16))


def test_a_short_video_repeats_frames() -> None:
    """Fewer frames than asked for: each stands in for its share of the time."""
    clip = decode_video(video(frames=3), FrameSampling(8))
    assert numbers(clip) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert clip.times_s[0] == clip.times_s[1] == 0


def test_one_frame_is_a_video() -> None:
    """A video of one frame gives that frame."""
    assert numbers(decode_video(video(frames=1), FrameSampling(4))) == [0] * 4


def test_a_stretch_is_sampled_by_itself(mp4: bytes) -> None:
    """Only frames of the stretch are looked at; an end past the end is the end."""
    assert numbers(decode_video(mp4, FrameSampling(4, start_s=1.0, end_s=1.5))) == [8, 9, 10, 11]
    assert numbers(decode_video(mp4, FrameSampling(2, start_s=1.5, end_s=99))) == [13, 15]


def test_a_group_of_pictures_that_is_not_needed_is_skipped_rightly() -> None:
    """Frames far apart come out right although the groups between them are not decoded."""
    data = video(frames=16, options={"g": "2", "bf": "0"})
    assert numbers(decode_video(data, FrameSampling(2))) == [4, 12]


def test_a_gif_is_a_video_when_asked_for_one() -> None:
    """An animated GIF opened with a sampling is a clip, in its own timing."""
    clip = open_media(video("gif", "gif", fps=10), sampling=FrameSampling(16))
    assert isinstance(clip, Clip)
    assert numbers(clip) == list(range(16))
    assert clip.times_s[15] == pytest.approx(1.5)


def test_a_path_is_opened_as_its_bytes(mp4: bytes, tmp_path: Path) -> None:
    """A file is recognised by its bytes, not by its name."""
    path = tmp_path / "clip.png"
    path.write_bytes(mp4)
    clip = open_media(str(path))
    assert isinstance(clip, Clip)
    assert len(clip.frames) == 8


def test_a_noted_rotation_is_applied() -> None:
    """A video that a phone recorded sideways comes out upright."""
    image = corners().resize((64, 32), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    data = buffer.getvalue()
    matrix = data.index(b"tkhd") + 44  # a quarter turn clockwise, as phones write it
    turn = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)
    clip = decode_video(data[:matrix] + turn + data[matrix + 36 :], FrameSampling(1))
    assert clip.size == clip.frames[0].size == (32, 64)
    assert near(clip.frames[0].getpixel((24, 16)), RED, 40)
    assert near(clip.frames[0].getpixel((8, 16)), BLUE, 40)


def test_large_frames_are_made_smaller() -> None:
    """Frames beyond the side limit shrink with their aspect; the clip remembers the original size."""
    clip = decode_video(video(size=(320, 160), frames=2), FrameSampling(1), MediaLimits(max_frame_side=64))
    assert clip.frames[0].size == (64, 32)
    assert clip.size == (320, 160)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (MediaLimits(max_duration_s=1.5), "longer than 1.5 s"),
        (MediaLimits(max_video_pixels=1000), "1000 pixels"),
        (MediaLimits(max_video_frames=10), "more than 10 frames"),
        (MediaLimits(max_frames=4), "At most 4 frames"),
        (MediaLimits(decode_timeout_s=0.001), "longer than 0.001 s"),
        (MediaLimits(decode_memory_bytes=1), "more memory"),
    ],
)
def test_a_video_over_a_limit_is_refused(mp4: bytes, limits: MediaLimits, message: str) -> None:
    """Seconds, pixels, frames, time and memory to decode: each limit has its own words."""
    with pytest.raises(MediaTooLargeError, match=message):
        decode_video(mp4, limits=limits)


def test_the_duration_is_measured_not_believed() -> None:
    """A header that claims one millisecond does not hide an hour of packets."""
    data = video(frames=4, fps=1)
    header = data.index(b"mvhd") + 20
    lying = data[:header] + struct.pack(">I", 1) + data[header + 4 :]
    with pytest.raises(MediaTooLargeError, match="longer than 3 s"):
        decode_video(lying, limits=MediaLimits(max_duration_s=3))


def test_a_start_beyond_the_end_is_an_error(mp4: bytes) -> None:
    """The message says where the video ends."""
    with pytest.raises(InvalidOptionError, match=r"start_s is 2, but the video ends at 2\.000 s"):
        decode_video(mp4, FrameSampling(start_s=2))


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 0},
        {"num_frames": 2.5},
        {"num_frames": True},
        {"num_frames": "8"},
        {"start_s": -1},
        {"start_s": float("nan")},
        {"start_s": "0"},
        {"start_s": 2, "end_s": 2},
        {"end_s": 0},
        {"end_s": "1"},
    ],
)
def test_an_impossible_sampling_is_an_error(options: dict[str, Any]) -> None:
    """A sampling that no video could satisfy cannot be made."""
    with pytest.raises(InvalidOptionError):
        FrameSampling(**options)


def test_numpys_numbers_sample_as_others_do(mp4: bytes) -> None:
    """The decoder's process is told of plain ones."""
    numbers = {"num_frames": np.int64(2), "start_s": np.float32(0.5), "end_s": np.float64(1)}
    clip = decode_video(mp4, FrameSampling(**numbers))  # type: ignore[arg-type] # numpy's stand for both
    assert clip.times_s == decode_video(mp4, FrameSampling(2, 0.5, 1)).times_s


@pytest.mark.parametrize(("frames", "times"), [(0, ()), (1, ()), (2, (0.0,)), (1, (0.0, 1.0))])
def test_a_clip_has_frames_and_a_time_for_each(frames: int, times: tuple[float, ...]) -> None:
    """Anything else cannot be made."""
    with pytest.raises(InvalidOptionError, match="a time for each"):
        Clip((Image.new("RGB", (4, 4)),) * frames, times, (4, 4))


def test_a_picture_is_no_video_and_a_video_no_picture(mp4: bytes) -> None:
    """Each decoder refuses the other's formats."""
    with pytest.raises(UnsupportedMediaError):
        decode_video(encoded(corners()))
    with pytest.raises(UnsupportedMediaError):
        decode_image(mp4)


def test_a_codec_off_the_list_is_unsupported() -> None:
    """A known container with an unlisted codec inside is refused."""
    with pytest.raises(UnsupportedMediaError, match="codec"):
        decode_video(video("matroska", "ffv1"))


def test_a_film_without_pictures_is_refused() -> None:
    """A container of sound alone holds no video."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 44100
        out.mux(stream.encode(silence))
        out.mux(stream.encode())
    with pytest.raises(UndecodableMediaError, match="no video"):
        decode_video(buffer.getvalue())


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=20),
    st.integers(0, 1 << 16),
    st.sampled_from([("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("gif", "gif")]),
)
def test_mutated_videos_raise_only_our_errors(
    changes: list[tuple[int, int]], cut: int, kind: tuple[str, str]
) -> None:
    """Whatever the bytes: as many frames as asked for, or one of our errors."""
    data = bytearray(video(*kind, frames=4))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        clip = decode_video(bytes(data[: len(data) - cut % len(data)]), FrameSampling(2))
    except PrismError:
        return
    assert len(clip.frames) == 2


def test_the_child_can_open_nothing(tmp_path: Path, mp4: bytes) -> None:
    """Once confined, the decoding process opens neither files nor sockets, and loads no further module."""
    child = Path(sys.modules["prismprune.media"].__file__ or "").with_name("_video_child.py")
    probe = (
        "import runpy, socket, sys\n"
        f"child = runpy.run_path({str(child)!r})\n"
        "loaded = set(sys.modules)\n"
        f"task = child['Task'](**{_task()!r})\n"
        "child['confine'](task)\n"
        "child['run'](sys.stdin.buffer, task, sys.stdout.buffer)\n"
        "for forbidden in (lambda: open('/dev/null'), socket.socket):\n"
        "    try:\n        forbidden()\n        sys.exit('opened')\n    except OSError:\n        pass\n"
        "sys.exit(str(sorted(set(sys.modules) - loaded)) if set(sys.modules) - loaded else 0)\n"
    )
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4)
    with path.open("rb") as file:
        done = subprocess.run([sys.executable, "-c", probe], stdin=file, capture_output=True, check=False)
    assert done.stderr == b""
    assert done.returncode == 0
    assert len(json.loads(done.stdout.split(b"\n", 1)[0])["order"]) == 8


def _task() -> dict[str, object]:
    from prismprune.media import _task

    return _task("mov", FrameSampling(), MediaLimits())


def test_importing_the_package_and_its_media_loads_no_torch() -> None:
    """Decoding needs neither torch nor transformers, and video libraries stay in the child."""
    probe = "import sys, prismprune.media; print({'torch', 'transformers', 'av'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
