"""Decode pictures and videos that strangers send.

Each format is recognised by its first bytes, never by its name, and only formats on the list reach a
decoder. Sizes are checked before anything is decoded. Pictures are decoded here by Pillow; videos in a
process of their own (`_video_child`) with limits on memory, processor and wall time. A decoder's own
words never reach a message: they have carried addresses and paths.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from prismprune.errors import (
    InvalidOptionError,
    MediaTooLargeError,
    PrismError,
    UndecodableMediaError,
    UnsupportedMediaError,
)
from prismprune.kinds import is_number, is_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MIB = 1024 * 1024
SNIFF_BYTES = 64
"""How much of a file `sniff` needs."""

IMAGE_FORMATS = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/bmp": "BMP",
}
"""Media type to the one Pillow plugin that may read it."""

VIDEO_FORMATS = {
    "video/mp4": "mov",
    "video/quicktime": "mov",
    "video/webm": "matroska",
    "video/x-matroska": "matroska",
    "video/x-msvideo": "avi",
    "image/gif": "gif",
}
"""Media type to the one FFmpeg demuxer that may read it; none of them is a playlist."""


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What is refused with MediaTooLargeError. Times in seconds."""

    max_image_bytes: int = 32 * MIB
    max_pixels: int = 25_000_000
    """Of a picture, checked in its header before decoding."""
    max_video_bytes: int = 256 * MIB
    max_video_pixels: int = 4096 * 2304
    """Of each frame: 4K in either of its shapes."""
    max_duration_s: float = 600.0
    max_frames: int = 64
    """Sampled frames."""
    max_video_frames: int = 36_000
    """Frames in the file: ten minutes at 60 a second."""
    max_frame_side: int = 1280
    """Not refused: larger frames are made smaller, aspect kept, as no vision tower here reads more."""
    decode_timeout_s: float = 30.0
    decode_memory_bytes: int = 2048 * MIB
    """Address space of the decoding process (not on macOS, which cannot limit it)."""


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames of a video are looked at.

    The stretch from `start_s` to `end_s` (None or past the end: the end) is cut into `num_frames` equal
    segments; each gives the frame that is on screen at its middle. A video of just `num_frames` frames
    gives each of them once; a shorter one repeats frames, so there are always `num_frames`, in order.

    Raises `InvalidOptionError` for what no video could satisfy.
    """

    num_frames: int = 8
    start_s: float = 0.0
    end_s: float | None = None

    def __post_init__(self) -> None:
        if not (is_whole(self.num_frames) and self.num_frames >= 1):
            raise InvalidOptionError(
                f"num_frames must be a whole number of at least 1, not {self.num_frames}."
            )
        if not (is_number(self.start_s) and math.isfinite(self.start_s) and self.start_s >= 0):
            raise InvalidOptionError(f"start_s must be at least 0, not {self.start_s}.")
        if self.end_s is not None and not (is_number(self.end_s) and self.end_s > self.start_s):
            raise InvalidOptionError(f"end_s ({self.end_s}) must be after start_s ({self.start_s}).")
        # numpy's numbers are numbers, too, but no JSON, in which the decoder is told of them.
        object.__setattr__(self, "num_frames", int(self.num_frames))
        object.__setattr__(self, "start_s", float(self.start_s))
        if self.end_s is not None:
            object.__setattr__(self, "end_s", float(self.end_s))


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: RGB, upright, alpha on white."""

    image: Image.Image
    decode_ms: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright original."""
        return self.image.size


@dataclass(frozen=True, slots=True)
class Clip:
    """Sampled frames of a video: RGB, upright, in order; `times_s` since its first frame.

    `size` is width and height of the upright original; the frames may be smaller, with its aspect.
    `total_frames` is how many frames the file shows, sampled or not; None for a clip that is no file.

    Raises `InvalidOptionError` for no frames, or not a time for each.
    """

    frames: tuple[Image.Image, ...]
    times_s: tuple[float, ...]
    size: tuple[int, int]
    decode_ms: float = 0.0
    total_frames: int | None = None

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.times_s):
            raise InvalidOptionError("A clip has at least one frame, and a time for each.")


DEFAULT_LIMITS = MediaLimits()
DEFAULT_SAMPLING = FrameSampling()


def sniff(head: bytes) -> str:
    """The media type that the first bytes of a file (`SNIFF_BYTES` are enough) belong to.

    Raises UndecodableMediaError for an empty file, UnsupportedMediaError for every other format.
    """
    if not head:
        raise UndecodableMediaError("The file is empty.")
    kind = _sniff_image(head) or _sniff_video(head)
    if kind is None:
        raise UnsupportedMediaError(
            "The file is none of PNG, JPEG, WebP, GIF, BMP, MP4, WebM, MOV, MKV and AVI."
        )
    return kind


def open_media(
    source: str | Path | bytes,
    limits: MediaLimits = DEFAULT_LIMITS,
    sampling: FrameSampling | None = None,
) -> Picture | Clip:
    """Decode a file or its bytes, picture or video by its first bytes.

    A GIF is a picture (its first frame), unless `sampling` is given: then it is a video.
    Raises OSError if the file cannot be read; else as `decode_image` and `decode_video`.
    """
    source = source if isinstance(source, bytes) else Path(source)
    kind = sniff(_head(source))
    if kind in IMAGE_FORMATS and not (sampling and kind in VIDEO_FORMATS):
        return decode_image(_read(source, limits.max_image_bytes), limits)
    return decode_video(source, sampling or DEFAULT_SAMPLING, limits)


# Pictures ------------------------------------------------------------------------------------------------

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it."""
_ORIENTATION_TAG = 0x0112


def decode_image(data: bytes, limits: MediaLimits = DEFAULT_LIMITS) -> Picture:
    """Decode a picture: first frame, EXIF orientation applied, alpha on white, RGB.

    Raises MediaTooLargeError before decoding if it has too many bytes or pixels, UnsupportedMediaError
    for a format that is no picture, UndecodableMediaError if it is damaged or cut short.
    """
    started = time.perf_counter()
    _check_bytes(len(data), limits.max_image_bytes)
    kind = sniff(data[:SNIFF_BYTES])
    if kind not in IMAGE_FORMATS:
        raise UnsupportedMediaError("The file is a video where a picture is expected.")
    if kind == "image/png":  # Pillow wants more than a header before it tells the size
        _check_pixels(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), limits)
    with _pillow_errors(limits), Image.open(BytesIO(data), formats=[IMAGE_FORMATS[kind]]) as image:
        _check_pixels(*image.size, limits)
        image.load()
        upright = _rgb(_upright(image))
    return Picture(upright, _milliseconds(started))


def as_picture(image: Image.Image) -> Picture:
    """A Pillow image that the caller opened, made upright and RGB as `decode_image` does.

    Raises UndecodableMediaError if its file is damaged: Pillow reads it only now.
    """
    started = time.perf_counter()
    with _pillow_errors(DEFAULT_LIMITS):
        image.load()
        return Picture(_rgb(_upright(image)), _milliseconds(started))


@contextmanager
def _pillow_errors(limits: MediaLimits) -> Iterator[None]:
    """Turn whatever a Pillow plugin raises on bad bytes into one of our errors, without its words."""
    try:
        yield
    except (PrismError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(limits) from None
    except Exception:  # noqa: BLE001 -- plugins raise OSError, SyntaxError, struct.error, KeyError, ...
        raise UndecodableMediaError("The picture is damaged or cut short.") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # noqa: BLE001 -- damaged EXIF data does not spoil a picture; viewers show it as it lies
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip 16-bit grey, or 0 to 1
        image = Image.fromarray(_eight_bits(np.asarray(image), is_16_bit=image.mode.startswith("I;16")))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray[Any, Any], *, is_16_bit: bool) -> np.ndarray[Any, Any]:
    """Grey of 16 or 32 bits as 0 to 255; what is no finite number is black.

    Which range 32 bits hold their values tell: 0 to 1 (floats), 0 to 65535 (integers), or 0 to 255.
    """
    if grey.dtype.kind == "f":
        grey = np.where(np.isfinite(grey), grey, 0.0)
        if grey.min() >= 0 and grey.max() <= 1:
            grey = grey * 255
        grey = grey.round()
    elif is_16_bit or grey.max() > 255:
        grey = grey >> 8
    return grey.clip(0, 255).astype(np.uint8)


# Videos --------------------------------------------------------------------------------------------------

_CHILD = Path(__file__).with_name("_video_child.py")
_REFUSALS: Mapping[str, type[PrismError]] = {
    "option": InvalidOptionError,
    "too-large": MediaTooLargeError,
    "undecodable": UndecodableMediaError,
    "unsupported": UnsupportedMediaError,
}


def decode_video(
    source: bytes | Path,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Clip:
    """Decode the sampled frames of a video (a GIF counts as one) in a process of its own.

    Raises MediaTooLargeError for bytes, frames, pixels, seconds over the limit and for a video that takes
    more time or memory to decode than allowed, InvalidOptionError for a stretch that begins after the end,
    UnsupportedMediaError for a format or codec not on the list, UndecodableMediaError if it is damaged.
    """
    started = time.perf_counter()
    _check_bytes(_length(source), limits.max_video_bytes)
    if sampling.num_frames > limits.max_frames:
        raise MediaTooLargeError(f"At most {limits.max_frames} frames of a video can be sampled.")
    kind = sniff(_head(source))
    if kind not in VIDEO_FORMATS:
        raise UnsupportedMediaError("The file is a picture where a video is expected.")
    with _as_file(source) as file:
        output = _run_child(file, _task(VIDEO_FORMATS[kind], sampling, limits), limits)
    return replace(_parse(output), decode_ms=_milliseconds(started))


def _task(demuxer: str, sampling: FrameSampling, limits: MediaLimits) -> dict[str, Any]:
    return asdict(sampling) | {
        "demuxer": demuxer,
        "max_pixels": limits.max_video_pixels,
        "max_side": limits.max_frame_side,
        "max_duration_s": limits.max_duration_s,
        "max_packets": limits.max_video_frames,
        "timeout_s": limits.decode_timeout_s,
        "memory_bytes": limits.decode_memory_bytes,
    }


def _run_child(file: BinaryIO, task: Mapping[str, Any], limits: MediaLimits) -> bytes:
    # -P: nothing beside the script, and nothing in the caller's directory, can pose as a module.
    command = [sys.executable, "-P", str(_CHILD), json.dumps(task)]
    try:
        done = subprocess.run(  # noqa: S603 -- our own script; the argument is JSON that it parses
            command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limits.decode_timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _too_slow(limits) from None
    if -done.returncode in (
        signal.SIGXCPU,
        signal.SIGKILL,
        signal.SIGALRM,
    ):  # how the child's own limits end it
        raise _too_slow(limits)
    if done.returncode:
        raise UndecodableMediaError("The video made its decoder fail.")
    return done.stdout


def _parse(output: bytes) -> Clip:
    start = output.index(b"\n") + 1
    header, planes = json.loads(output[:start]), memoryview(output)[start:]
    if "error" in header:
        raise _REFUSALS[header["error"]](header["detail"])
    frames, offset = [], 0
    for plane in header["planes"]:
        pixels = planes[offset : offset + plane["bytes"]]
        frame = Image.frombytes("RGB", tuple(plane["size"]), pixels, "raw", "RGB", plane["stride"])
        frames.append(_turned(frame, plane["rotation"]))
        offset += plane["bytes"]
    # A recording whose size changes on its way is a clip of its first frame's.
    frames = [frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames]
    width, height = header["planes"][0]["source_size"]
    sideways = _quarter_turns(header["planes"][0]["rotation"]) % 2
    size = (height, width) if sideways else (width, height)
    order, times_s = (frames[i] for i in header["order"]), tuple(header["times_s"])
    return Clip(tuple(order), times_s, size, total_frames=header["total_frames"])


_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def _quarter_turns(degrees: int) -> int:
    """Counterclockwise; phones note them in the file instead of turning the pixels."""
    return round(degrees / 90) % 4


def _turned(frame: Image.Image, degrees: int) -> Image.Image:
    turns = _quarter_turns(degrees)
    return frame.transpose(_TURNS[turns]) if turns else frame


# Bytes ---------------------------------------------------------------------------------------------------


def _sniff_image(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    # "BM" alone begins many a text; a bitmap's second header begins with its own length.
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "image/bmp"
    return None


def _sniff_video(head: bytes) -> str | None:
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "video/x-msvideo"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video/webm" if b"webm" in head else "video/x-matroska"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # QuickTime before it had brands
        return "video/quicktime"
    if head[4:8] == b"ftyp" and head[8:12] not in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis"):
        return "video/quicktime" if head[8:12] == b"qt  " else "video/mp4"
    return None


def _head(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source[:SNIFF_BYTES]
    with source.open("rb") as file:
        return file.read(SNIFF_BYTES)


def _length(source: bytes | Path) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _read(source: bytes | Path, limit: int) -> bytes:
    _check_bytes(_length(source), limit)
    return source if isinstance(source, bytes) else source.read_bytes()


@contextmanager
def _as_file(source: bytes | Path) -> Iterator[BinaryIO]:
    """An open file that a child can take as its standard input and seek in."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as spool:
        spool.write(source)
        spool.seek(0)
        yield spool


def _check_bytes(length: int, limit: int) -> None:
    if length > limit:
        raise MediaTooLargeError(f"The file has {length} bytes; {limit} are allowed.")


def _check_pixels(width: int, height: int, limits: MediaLimits) -> None:
    if width * height > limits.max_pixels:
        raise _too_many_pixels(limits)


def _too_many_pixels(limits: MediaLimits) -> MediaTooLargeError:
    return MediaTooLargeError(f"The picture has more than {limits.max_pixels} pixels.")


def _too_slow(limits: MediaLimits) -> MediaTooLargeError:
    return MediaTooLargeError(f"The video takes longer than {limits.decode_timeout_s:g} s to decode.")


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1000
