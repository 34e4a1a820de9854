"""Formats by their first bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.media import IMAGE_TYPES, VIDEO_TYPES, sniff
from tests.service.conftest import encoded


@pytest.mark.parametrize(
    ("image_format", "media_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("WEBP", "image/webp"),
        ("GIF", "image/gif"),
        ("BMP", "image/bmp"),
        ("TIFF", None),
        ("ICO", None),
        ("PPM", None),
    ],
)
def test_pictures_are_told_apart(image_format: str, media_type: str | None) -> None:
    """What Pillow writes is recognised where it is allowed, and only there."""
    assert sniff(encoded(image_format)) == media_type


@pytest.mark.parametrize(
    ("head", "media_type"),
    [
        (b"\x00\x00\x00\x18ftypmp42", "video/mp4"),
        (b"\x00\x00\x00\x14ftypqt  ", "video/quicktime"),
        (b"\x00\x00\x00\x08wide\x00\x00\x10\x00mdat", "video/quicktime"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm", "video/webm"),
        (b"\x1a\x45\xdf\xa3\xa3\x42\x86\x81\x01\x42\x82\x88matroska", "video/x-matroska"),
        (b"RIFF\x00\x00\x10\x00AVI LIST", "video/x-msvideo"),
        (b"RIFF\x00\x00\x10\x00WAVEfmt ", None),
        (b"\x00\x00\x00\x20ftypheic", None),
        (b"\x1a\x45\xdf\xa3 but not of Matroska", None),
        (b"#EXTM3U\n", None),
        (b"%PDF-1.7", None),
    ],
)
def test_videos_are_told_apart(head: bytes, media_type: str | None) -> None:
    """Containers by their brand or type; playlists, sound and stills in a video's box are none of ours."""
    assert sniff(head) == media_type


@given(st.binary(max_size=80))
def test_any_bytes_have_an_allowed_type_or_none(head: bytes) -> None:
    """No bytes make the sniffer fail."""
    assert sniff(head) in {*IMAGE_TYPES, *VIDEO_TYPES, None}
