"""Text of an answer while its tokens come: given out once it can no longer change, and decoded once."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a character decodes to while some of its bytes are still to come."""
WINDOW = 16
"""So many tokens are decoded again with each new one at most, if they end in a whole character."""


class Spelling:
    """How a tokenizer writes tokens, special ones left out.

    Where a tokenizer falls back to bytes (Llama 2's does), its decoder takes a run of such tokens for
    characters as a whole, or for none: with one character cut short all become U+FFFD. Here the others stay,
    and what is cut short is a single U+FFFD, as tokenizers have it whose tokens are all made of bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(token for token, about in added.items() if about.special)
        self._tokens = _byte_tokens(tokenizer)
        self._bytes = {token: byte for byte, token in enumerate(self._tokens)}

    def written(self, token_ids: Iterable[int]) -> list[int]:
        """Those that are not special."""
        return [token for token in token_ids if token not in self._special]

    def text(self, token_ids: Iterable[int]) -> str:
        """Of tokens that are written."""
        text: str = self._tokenizer.decode(
            self._mended(token_ids) if self._bytes else list(token_ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _mended(self, token_ids: Iterable[int]) -> list[int]:
        """With U+FFFD, spelled in bytes, in place of bytes that are no character."""
        mended: list[int] = []
        for is_byte, run in groupby(token_ids, self._bytes.__contains__):
            tokens = list(run)
            mended += self._as_characters(tokens) if is_byte else tokens
        return mended

    def _as_characters(self, run: Iterable[int]) -> list[int]:
        whole = bytes(self._bytes[token] for token in run).decode(errors="replace")
        return [self._tokens[byte] for byte in whole.encode()]


def _byte_tokens(tokenizer: Any) -> list[int]:
    """Ids of the tokens for the bytes 0 to 255; none where the tokenizer does not fall back to bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if not _ids(tokenizer, names[:1]):  # to ask for all of them takes a while
        return []
    tokens = _ids(tokenizer, names)
    return tokens if tokens and tokenizer.decode([tokens[byte] for byte in "€".encode()]) == "€" else []


def _ids(tokenizer: Any, names: list[str]) -> list[int]:
    """Of tokens by their names; none where one of them is unknown."""
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    return ids if None not in ids and tokenizer.convert_ids_to_tokens(ids) == names else []


class TextStream:
    """Turns a row's growing token ids into text that is given out once it can no longer change.

    What is held back: the start of a character whose bytes are not all there, what may become a stop string,
    and white space that may turn out to be the last. Text is given without white space at either end.
    """

    def __init__(self, spelling: Spelling, stop: Sequence[str] = ()) -> None:
        self._spelling = spelling
        self._stop = stop
        self._stop_starts = {text[0] for text in stop}
        self._seen = 0
        self._window: list[int] = []
        self._whole = 0  # tokens of the window up to where a character ended before the last time
        self._settled = 0  # characters of the window
        self._maybe_stop = ""
        self._maybe_last = ""
        self._given: list[str] = []
        self.stopped = False

    @property
    def given(self) -> str:
        """All of it so far."""
        return "".join(self._given)

    def push(self, token_ids: Sequence[int]) -> str:
        """The newly settled text of all of a row's tokens so far; sets `stopped` at a stop string."""
        text = self._decoded(token_ids)
        settled = text.rstrip(UNFINISHED)
        new = settled[self._settled :]
        self._settled = len(settled)
        if settled == text:
            self._forget()
        return self._give(self._before_stop(new))

    def end(self, token_ids: Sequence[int]) -> str:
        """What was held back, as no more tokens come; sets `stopped`, too."""
        text = self._decoded(token_ids)
        new = text[self._settled :]
        self._settled = len(text)
        sure = self._before_stop(new)
        held, self._maybe_stop = self._maybe_stop, ""
        return self._give(sure + held)

    def _decoded(self, token_ids: Sequence[int]) -> str:
        """Text of the window, with the tokens that are new."""
        self._window += self._spelling.written(token_ids[self._seen :])
        self._seen = len(token_ids)
        return self._spelling.text(self._window)

    def _forget(self) -> None:
        """At the end of a character: begin a long window anew, where one ended before.

        It begins with some text: a decoder may take white space from the start of what it is given.
        """
        if len(self._window) > WINDOW:
            context = self._window[self._whole :]
            if text := self._spelling.text(context):
                self._window, self._settled = context, len(text)
        self._whole = len(self._window)

    def _before_stop(self, new: str) -> str:
        """What is now known to be before any stop string."""
        text = self._maybe_stop + new
        starts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(starts)
        held = min(starts) if starts else self._stop_may_begin(text)
        self._maybe_stop = "" if starts else text[held:]
        return text[:held]

    def _stop_may_begin(self, text: str) -> int:
        """Where the first stop string begins that more text may complete; its length where none does."""
        for at, character in enumerate(text):
            if character in self._stop_starts and any(stop.startswith(text[at:]) for stop in self._stop):
                return at
        return len(text)

    def _give(self, text: str) -> str:
        """Without white space at either end of all."""
        text = self._maybe_last + text if self._given else text.lstrip()
        new = text.rstrip()
        self._maybe_last = text[len(new) :]
        if new:
            self._given.append(new)
        return new
