"""`LlavaForConditionalGeneration.generate` behind LitServe, a batch at a time.

A script that `litserve_plain` starts in LitServe's environment; nothing here imports it. Annotations stay
what they are, not strings: LitServe reads from `decode_request`'s that the body is JSON.
"""

import argparse
import base64
import io
from typing import Any

import litserve
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

BATCH_TIMEOUT_S = 0.005
"""How long the first of a batch waits for others: as long as our worker's, by default."""


class Chat(litserve.LitAPI):
    """OpenAI's chat completions as far as the benchmark asks for them. `model` is a directory."""

    def __init__(self, model: str, dtype: str, **options: Any) -> None:
        super().__init__(**options)
        self._name = model
        self._dtype = getattr(torch, dtype)

    def setup(self, device: str) -> None:
        self._processor = AutoProcessor.from_pretrained(self._name)
        self._processor.tokenizer.padding_side = "left"
        # Any: transformers' types say that `to` takes a model.
        model: Any = LlavaForConditionalGeneration.from_pretrained(self._name, dtype=self._dtype).eval()
        self._model = model.to(device)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    @torch.inference_mode()
    def predict(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        inputs = self._processor(
            images=[picture(request) for request in requests],
            text=[
                self._processor.apply_chat_template(_messages(request), add_generation_prompt=True)
                for request in requests
            ],
            padding=True,
            return_tensors="pt",
        ).to(self._model.device, self._dtype)
        length = inputs["input_ids"].shape[1]
        new = max(request["max_tokens"] for request in requests)
        ids = self._model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, length:]
        return [
            {
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
                "usage": {"completion_tokens": len(row)},
            }
            for row, text in zip(ids, self._processor.batch_decode(ids), strict=True)
        ]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def picture(request: dict[str, Any]) -> Image.Image:
    """The one that the request's message shows, out of its data URI."""
    (url,) = [part["image_url"]["url"] for part in _parts(request) if part["type"] == "image_url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def _messages(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as the processor's chat template takes them."""
    parts = [{"type": "image"} if part["type"] == "image_url" else part for part in _parts(request)]
    return [{"role": "user", "content": parts}]


def _parts(request: dict[str, Any]) -> list[dict[str, Any]]:
    (message,) = request["messages"]
    parts: list[dict[str, Any]] = message["content"]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    asked = parser.parse_args()
    api = Chat(
        asked.model,
        asked.dtype,
        max_batch_size=asked.max_batch,
        batch_timeout=BATCH_TIMEOUT_S,
        api_path="/v1/chat/completions",
    )
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(host=asked.host, port=asked.port, generate_client_file=False)


if __name__ == "__main__":
    main()
