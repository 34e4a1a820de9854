"""Requests that `/docs` shows. They work as they stand: the picture is a red star beside a blue square."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

from PIL import Image, ImageDraw


def _scene() -> str:
    """A small PNG as a data URI, as large as the demo model sees it."""
    image = Image.new("P", (336, 336), 0)
    image.putpalette((200, 200, 200, 214, 39, 40, 31, 90, 180))
    draw = ImageDraw.Draw(image)
    radii = (78, 30) * 5
    corners = [
        (120 + radius * math.sin(math.pi * step / 5), 126 - radius * math.cos(math.pi * step / 5))
        for step, radius in enumerate(radii)
    ]
    draw.polygon(corners, fill=1)
    draw.rectangle((210, 204, 294, 288), fill=2)
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def answer_examples() -> dict[str, Any]:
    """OpenAPI examples of `POST /v1/answer` as JSON."""
    scene = _scene()
    return {
        "one question": {
            "summary": "A picture, a question, a budget",
            "value": {"image": scene, "question": "What color is the star?", "token_budget": 64},
        },
        "several questions": {
            "summary": "Several answers for one encoding, with the map of the tokens kept",
            "value": {
                "image": scene,
                "questions": [
                    "What color is the star?",
                    "What color is the square?",
                    "How many objects are there?",
                ],
                "keep_ratio": 0.2,
                "include": ["token_map"],
            },
        },
        "several pictures": {
            "summary": "One budget for several pictures",
            "value": {"images": [scene, scene], "question": "What color is the star?", "token_budget": 128},
        },
    }


def chat_examples() -> dict[str, Any]:
    """OpenAPI examples of `POST /v1/chat/completions`."""
    parts = [
        {"type": "image_url", "image_url": {"url": _scene()}},
        {"type": "text", "text": "What color is the star?"},
    ]
    asked = {"model": "prism-demo", "messages": [{"role": "user", "content": parts}], "token_budget": 64}
    usage = {"stream_options": {"include_usage": True}}
    return {
        "one question": {"summary": "A picture, a question, a budget", "value": asked},
        "streamed": {
            "summary": "The text as it comes, then the usage",
            "value": asked | {"stream": True} | usage,
        },
    }
