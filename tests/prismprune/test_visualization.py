"""Kept tokens drawn over their picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prismprune.errors import InvalidOptionError
from prismprune.media import Clip, Picture
from prismprune.results import PartMap
from prismprune.visualization import draw_kept, draw_sheet
from prismprune.visualization.kept import DIVERSE, GAP, KEPT, SALIENT

PART = PartMap(
    media=0,
    crop=None,
    frame=None,
    time_s=None,
    grid=(4, 8),
    box=(0, 0, 800, 400),
    salient=(0, 9),
    diverse=(31,),
    kept=(0, 9, 31),
)
WHITE_PICTURE = Image.new("RGB", (800, 400), "white")


def outlined(drawn: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """[4, 8], True for the cells of 100 x 100 whose top left pixel has that color."""
    return (np.asarray(drawn)[::100, ::100] == color).all(-1)


def test_each_kept_token_is_drawn_in_its_place_and_color() -> None:
    """Salient, diverse and dropped cells are told apart, each where its raster index says."""
    drawn = draw_kept(WHITE_PICTURE, [PART])
    assert drawn.size == (800, 400)
    assert np.argwhere(outlined(drawn, SALIENT)).tolist() == [[0, 0], [1, 1]]
    assert np.argwhere(outlined(drawn, DIVERSE)).tolist() == [[3, 7]]
    values = np.asarray(drawn)
    assert values[250, 450].max() < 100
    assert (values[50, 50] == 255).all()  # its own color, which a tint would change


def test_methods_without_two_kinds_have_one_color() -> None:
    """Where salient and diverse are not told apart, all kept tokens look alike."""
    drawn = draw_kept(WHITE_PICTURE, [replace(PART, salient=None, diverse=None)])
    assert outlined(drawn, KEPT).sum() == 3


def test_the_box_places_the_grid() -> None:
    """A crop's tokens lie inside the crop's box."""
    drawn = draw_kept(WHITE_PICTURE, [replace(PART, box=(400, 200, 800, 400), diverse=())])
    changed = np.argwhere((np.asarray(drawn) == SALIENT).all(-1))
    assert changed.min(0).tolist() == [200, 400]


def test_a_small_picture_is_enlarged() -> None:
    """Patches of an 80-pixel picture would be a few pixels wide: it is drawn larger."""
    drawn = draw_kept(WHITE_PICTURE.resize((80, 40)), [PART], size=(800, 400))
    assert drawn.size == (672, 336)
    assert drawn.getpixel((0, 0)) == SALIENT


def test_a_sheet_holds_every_picture_and_frame() -> None:
    """Frames stand side by side with their own tokens, four in a row."""
    clip = Clip(frames=(WHITE_PICTURE,) * 5, times_s=(0.0, 1.0, 2.0, 3.0, 4.0), size=(800, 400))
    parts = [replace(PART, media=1, frame=3), PART]
    sheet = draw_sheet([Picture(WHITE_PICTURE), clip], parts)
    assert sheet.size == (4 * 800 + 3 * GAP, 2 * 400 + GAP)
    assert sheet.getpixel((0, 0)) == SALIENT
    assert sheet.getpixel((808, 0)) != SALIENT
    assert sheet.getpixel((0, 408)) == SALIENT


def test_nothing_to_draw_is_an_error() -> None:
    """A sheet needs media."""
    with pytest.raises(InvalidOptionError):
        draw_sheet([], [])
