"""The process that decodes one video: a script of its own, because a video decoder is not to be trusted.

`prismprune.media` runs it as a file, not as a module: it imports nothing of this package, only PyAV. The
video is standard input, an open file; what to do is the one argument, JSON. Before the first byte is
parsed the process gives up memory, processor time and the right to open anything else, so no playlist,
no reference in a container and no bug in a demuxer reaches another file or the network.

Standard output: one line of JSON, then the RGB planes it announces. On refusal the line is
`{"error": "option" | "too-large" | "undecodable" | "unsupported", "detail": ...}`, in our own words.

Nothing that a container claims is believed: the duration comes from the packets, and every decoded frame
is measured again. A "stamp" is a presentation time in the stream's own clock, `time_base` seconds a tick.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import av
import av.error
import av.subtitles.stream  # PyAV would import it on opening, when no file may be opened any more
from av.stream import Disposition

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CODECS = (
    "h264,hevc,vp8,vp9,libdav1d,av1,mpeg4,msmpeg4,mpeg1video,mpeg2video,mjpeg,prores,gif,rawvideo,"
    "aac,mp3,mp3float,opus,vorbis"
)
"""Decoders that may be opened. Sound is probed when the file is opened, never decoded."""
MAX_STREAMS = 64
"""Films carry dozens of subtitle tracks; more is an attack."""
THREADS = 4
"""Of one decoder: each costs memory, and a machine may have a hundred cores."""
ROOM = 16 << 20
"""Bytes that the process may always take beyond what it has at its start: Python itself breaks without."""
ONE_REQUEST = 64 << 20
"""Bytes. An allocation that fails leaves the peak below the limit by less than its own size."""


class RefusalError(Exception):
    """What goes to the parent instead of frames."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Task:
    """The argument. `demuxer` as FFmpeg names it; the other fields as in FrameSampling and MediaLimits."""

    demuxer: str
    num_frames: int
    start_s: float
    end_s: float | None
    max_pixels: int
    max_side: int
    max_duration_s: float
    max_packets: int
    timeout_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Packets:
    """The video's packets in file order: stamp (None: never shown) and keyframe mark; `end` of the last."""

    stamps: list[int | None]
    keys: list[bool]
    end: float
    tick_s: float

    @property
    def shown(self) -> list[int]:
        return sorted(stamp for stamp in self.stamps if stamp is not None)

    def needed(self, wanted: Iterable[int]) -> list[bool]:
        """Packets to decode for the frames `wanted`: their whole groups of pictures and no others.

        A group whose wanted frame is shown before its keyframe (an open group) leans on the group before.
        """
        starts = [0, *(i for i, key in enumerate(self.keys) if key and i), len(self.keys)]
        groups, targets = list(pairwise(starts)), set(wanted)
        take = [False] * len(self.keys)
        for number, (first, last) in enumerate(groups):
            here = [s for s in self.stamps[first:last] if s is not None and s in targets]
            if here:
                key = self.stamps[first]
                leaning = number > 0 and (key is None or min(here) < key)
                begin = groups[number - 1][0] if leaning else first
                take[begin:last] = [True] * (last - begin)
        return take


class Memory:
    """The process' address space and its limit. Linux only: macOS knows the limit and refuses to set it."""

    def __init__(self, limit: int) -> None:
        self._status = Path("/proc/self/status").open("rb", buffering=0)  # noqa: SIM115 -- later none may be opened
        self._limit = max(limit, self._peak() + ROOM)
        resource.setrlimit(resource.RLIMIT_AS, (self._limit, self._limit))

    def _peak(self) -> int:
        self._status.seek(0)
        line = next(line for line in self._status.read().splitlines() if line.startswith(b"VmPeak:"))
        return int(line.split()[1]) << 10

    @property
    def short(self) -> bool:
        """Whether an allocation may have failed: FFmpeg reports many such failures as something else."""
        return self._peak() > self._limit - ONE_REQUEST


def confine(task: Task) -> Memory | None:
    """Give up what decoding does not need. Cannot be taken back."""
    memory = Memory(task.memory_bytes) if sys.platform == "linux" else None
    seconds = math.ceil(task.timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # no further file, no socket
    signal.alarm(seconds)  # the parent may be gone by then
    return memory


def open_video(file: BinaryIO, task: Task) -> tuple[Any, Any]:
    """Open `file` with the one demuxer that its first bytes called for; returns (container, video stream)."""
    file.seek(0)
    container = av.open(
        file,
        format=task.demuxer,
        options={
            "codec_whitelist": CODECS,
            "format_whitelist": task.demuxer,
            "protocol_whitelist": "none",
            "max_streams": str(MAX_STREAMS),
            "max_pixels": str(task.max_pixels),  # the decoder then refuses before it allocates
        },
    )
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a cover is no video
            check_codec(stream.codec_context, task)
            stream.codec_context.thread_count = THREADS
            return container, stream
    raise RefusalError("undecodable", "The file holds no video.")


def check_codec(codec: Any, task: Task) -> None:
    if codec is None or codec.codec.name not in CODECS.split(","):
        raise RefusalError("unsupported", "The video's codec is not among those decoded here.")
    check_size(codec.width, codec.height, task)


def check_size(width: int, height: int, task: Task) -> None:
    if width * height > task.max_pixels:
        raise RefusalError("too-large", f"The video has more than {task.max_pixels} pixels a frame.")


def numbered(container: Any) -> bool:
    """AVI stores no presentation times, and FFmpeg's guesses are off: its frames are counted instead."""
    return bool(container.format.name == "avi")


def video_packets(container: Any, stream: Any) -> Iterator[tuple[Any, int]]:
    """Packets that carry something, each with its stamp."""
    counting = numbered(container)
    for packet in container.demux(stream):
        stamp = packet.dts if counting or packet.pts is None else packet.pts
        if packet.size and stamp is not None:
            yield packet, stamp


def survey(container: Any, stream: Any, task: Task) -> Packets:
    """Read every packet without decoding: when frames are shown, and where decoding can start."""
    tick_s = float(stream.time_base)
    stamps: list[int | None] = []
    keys: list[bool] = []
    gap = 0.0
    for packet, stamp in video_packets(container, stream):
        if len(keys) == task.max_packets:
            raise RefusalError("too-large", f"The video has more than {task.max_packets} frames.")
        stamps.append(None if packet.is_discard else stamp)
        keys.append(packet.is_keyframe and not numbered(container))
        gap = float(packet.duration or 0)
    shown = sorted(stamp for stamp in stamps if stamp is not None)
    if not shown:
        raise RefusalError("undecodable", "The file holds no video frame.")
    if not gap and len(shown) > 1:
        gap = (shown[-1] - shown[0]) / (len(shown) - 1)
    if (shown[-1] + gap - shown[0]) * tick_s > task.max_duration_s:
        raise RefusalError("too-large", f"The video is longer than {task.max_duration_s:g} s.")
    return Packets(stamps, keys, shown[-1] + gap, tick_s)


def sample(packets: Packets, task: Task) -> list[int]:
    """For each of `num_frames` equal segments of the stretch, the stamp of the frame shown at its middle."""
    shown = packets.shown
    duration = (packets.end - shown[0]) * packets.tick_s
    if task.start_s and task.start_s >= duration:
        raise RefusalError("option", f"start_s is {task.start_s:g}, but the video ends at {duration:.3f} s.")
    end = duration if task.end_s is None else min(task.end_s, duration)
    step = (end - task.start_s) / task.num_frames
    middles = (task.start_s + (i + 0.5) * step for i in range(task.num_frames))
    # A middle may fall on a frame's own time: the slack keeps rounding from giving the frame before.
    ticks = (shown[0] + middle / packets.tick_s + 1e-6 for middle in middles)
    return [shown[max(bisect_right(shown, tick) - 1, 0)] for tick in ticks]


def decode(container: Any, stream: Any, packets: Packets, wanted: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """(stamp, frame) in order of presentation; before a gap in what is needed the decoder is emptied."""
    codec = stream.codec_context
    numbers = iter(packets.shown) if numbered(container) else None
    running = False
    for (packet, _), take in zip(video_packets(container, stream), packets.needed(wanted), strict=False):
        if take or running:
            yield from stamped(codec.decode(packet if take else None), numbers)
        if running and not take:
            codec.flush_buffers()
        running = take
    if running:
        yield from stamped(codec.decode(None), numbers)


def stamped(frames: Iterable[Any], numbers: Iterator[int] | None) -> Iterator[tuple[int, Any]]:
    for frame in frames:
        stamp = frame.pts if numbers is None else next(numbers, None)
        if stamp is not None:
            yield stamp, frame


def pick(
    frames: Iterable[tuple[int, Any]], wanted: Iterable[int], task: Task
) -> dict[int, tuple[Any, dict[str, Any]]]:
    """RGB planes and their description by stamp; for one that the decoder left out, the frame before it."""
    picked: dict[int, Any] = {}
    left = deque(sorted(set(wanted)))
    before: Any = None
    for count, (stamp, frame) in enumerate(frames):
        if count > task.max_packets:
            raise RefusalError("too-large", f"The video has more than {task.max_packets} frames.")
        check_size(frame.width, frame.height, task)
        while left and stamp >= left[0]:
            exact = stamp == left[0] or before is None
            picked[left.popleft()] = to_rgb(frame if exact else before, task)
        if not left:
            break
        before = frame
    if left and before is None:
        raise RefusalError("undecodable", "The video's frames cannot be decoded.")
    return picked | {stamp: to_rgb(before, task) for stamp in left}


def to_rgb(frame: Any, task: Task) -> tuple[Any, dict[str, Any]]:
    """The frame as RGB, its longer side at most `max_side`, and what the parent needs to read it."""
    scale = min(1.0, task.max_side / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    plane = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").planes[0]
    return plane, {
        "size": [width, height],
        "stride": plane.line_size,
        "bytes": plane.buffer_size,
        "rotation": frame.rotation,
        "source_size": [frame.width, frame.height],
    }


def run(file: BinaryIO, task: Task, out: BinaryIO) -> None:
    """Decode and write; raises RefusalError with what the caller should read."""
    container, stream = open_video(file, task)
    with container:
        packets = survey(container, stream, task)
    wanted = sample(packets, task)
    container, stream = open_video(file, task)
    with container:
        picked = pick(decode(container, stream, packets, wanted), wanted, task)
    stamps = sorted(picked)
    header = {
        "times_s": [(stamp - packets.shown[0]) * packets.tick_s for stamp in wanted],
        "order": [stamps.index(stamp) for stamp in wanted],
        "planes": [picked[stamp][1] for stamp in stamps],
        "total_frames": len(packets.shown),
    }
    out.write(json.dumps(header).encode() + b"\n")
    out.writelines(picked[stamp][0] for stamp in stamps)


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    av.logging.set_level(None)
    memory = confine(task)
    try:
        run(sys.stdin.buffer, task, sys.stdout.buffer)
    except RefusalError as refusal:
        answer = {"error": refusal.kind, "detail": refusal.detail}
    except (MemoryError, av.error.FFmpegError, ArithmeticError, ValueError, IndexError) as error:
        if isinstance(error, MemoryError) or (memory and memory.short):  # also av.error.MemoryError
            detail = "The video needs more memory to decode than is allowed."
            answer = {"error": "too-large", "detail": detail}
        else:
            detail = "The video is damaged or not in the format it begins as."
            answer = {"error": "undecodable", "detail": detail}
    else:
        return
    print(json.dumps(answer))  # noqa: T201 -- the protocol


if __name__ == "__main__":
    main()
