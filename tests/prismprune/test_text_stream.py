"""Text that is given out while tokens come: once it is sure, whole, and as decoding all at once gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from prismprune.text_stream import UNFINISHED, WINDOW, Spelling, TextStream
from tests.prismprune.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENIZER = tiny_tokenizer()
FIRST_BYTE = len(TOKENIZER) - 256
SPECIALS = ("<s>", "</s>")
PIECES = ("▁", "▁▁", "▁a", "a", "b", "ab", "▁the", "!", "\n", "é", "▁你", "€€", UNFINISHED)
"""Of vocabularies that fall back to bytes: ▁ is a space."""


def byte_level() -> PreTrainedTokenizerFast:
    """As the demo's: tokens of several bytes, some of which begin or end within a character."""
    wholes = (" the", "ab", "  ", "€", " 你", "\n\n", UNFINISHED)
    names = ["".join(TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"])) for text in wholes]
    euro, you = names[3], names[4]
    parts = [euro[:2], euro[1:], euro[1:] + you[:2], "a" + euro[:1], you[2:] + "b"]
    vocabulary = TOKENIZER.get_vocab()
    vocabulary |= {name: len(vocabulary) + place for place, name in enumerate([*names, *parts])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def falling_back(*, strip: bool) -> PreTrainedTokenizerFast:
    """Bytes (ids 0 to 255) beside `PIECES`. strip: decoded as Llama 2's are, without the first space."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *SPECIALS]
    vocabulary = {name: place for place, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "byte-level": byte_level(),
    "fallback": falling_back(strip=False),
    "fallback-strip": falling_back(strip=True),
}
SPELLINGS = {name: Spelling(tokenizer) for name, tokenizer in TOKENIZERS.items()}
BYTE_LEVEL_IDS = st.integers(0, len(TOKENIZERS["byte-level"]) - 1)
SNIPPETS = st.sampled_from(["你", "é", "😀", " ", "\n", "x"]).map(lambda text: list(text.encode()))
"""Whole characters as bytes that were fallen back to."""
FALLBACK_IDS = st.lists(
    SNIPPETS
    | st.integers(256, 255 + len(PIECES) + len(SPECIALS)).map(lambda token: [token])
    | st.integers(0, 255).map(lambda byte: [byte]),
    max_size=40,
).map(lambda parts: [token for part in parts for token in part])
ANSWERS = st.one_of(
    st.tuples(st.just("byte-level"), st.lists(BYTE_LEVEL_IDS, max_size=60)),
    st.tuples(st.sampled_from(["fallback", "fallback-strip"]), FALLBACK_IDS),
)


def streamed(
    spelling: Spelling, ids: Sequence[int], stop: Sequence[str] = ()
) -> tuple[list[str], TextStream]:
    """Push them one by one; the pieces, and the stream."""
    text, pieces = TextStream(spelling, stop), []
    for count in range(1, len(ids) + 1):
        pieces.append(text.push(ids[:count]))
        if text.stopped:
            return pieces, text
    return [*pieces, text.end(ids)], text


def stream(data: str | list[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """The same of text, or of ids; every byte is a token."""
    return streamed(
        Spelling(TOKENIZER), TOKENIZER(data)["input_ids"] if isinstance(data, str) else data, stop
    )


def decoded(ids: Sequence[int], tokenizer: Any = TOKENIZER) -> str:
    """By the tokenizer alone, all at once."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # of several rows it is a list
    return text


def whole(name: str, ids: Sequence[int]) -> str:
    """All at once, what is no character as one U+FFFD each: all of an answer's bytes, decoded by Python."""
    if name == "byte-level":
        return decoded(ids, TOKENIZERS[name])
    pieces = [*(bytes([byte]) for byte in range(256)), *(one.replace("▁", " ").encode() for one in PIECES)]
    text = b"".join(pieces[token] for token in ids if token < len(pieces)).decode(errors="replace")
    return text.removeprefix(" ") if name == "fallback-strip" else text


@example(("fallback-strip", [0x80] * 20 + [258, 256 + len(PIECES), 258]))  # nothing to begin anew with
@given(ANSWERS)
def test_pieces_add_up_to_what_decoding_everything_gives(answer: tuple[str, list[int]]) -> None:
    """Of any tokens, special ones and broken characters among them."""
    name, ids = answer
    pieces, text = streamed(SPELLINGS[name], ids)
    assert "".join(pieces) == text.given == whole(name, ids).strip()


@given(st.sampled_from(["fallback", "fallback-strip"]), FALLBACK_IDS)
def test_whole_characters_are_those_of_the_tokenizer(name: str, ids: list[int]) -> None:
    """Where bytes that were fallen back to are all characters, a stream says what the tokenizer does."""
    assume(UNFINISHED not in whole(name, ids))
    _, text = streamed(SPELLINGS[name], ids)
    assert text.given == decoded(ids, TOKENIZERS[name]).strip()


@given(ANSWERS, st.data())
def test_an_answer_ends_before_the_first_stop_string(answer: tuple[str, list[int]], data: Any) -> None:
    """By whichever token completes one first, and at the one that begins first in the text by then."""
    name, ids = answer
    full = whole(name, ids)
    cuts = st.integers(0, len(full)).flatmap(
        lambda at: st.integers(1, 4).map(lambda length: full[at : at + length])
    )
    stop = [
        text for text in data.draw(st.lists(cuts | st.sampled_from(["a", "ab", "\n"]), max_size=3)) if text
    ]
    pieces, text = streamed(SPELLINGS[name], ids, stop)
    assert "".join(pieces) == text.given
    ends = [whole(name, ids[:count]).rstrip(UNFINISHED) for count in range(len(ids) + 1)] + [full]
    starts = next((found for end in ends if (found := [end.find(one) for one in stop if one in end])), None)
    assert text.stopped == (starts is not None)
    assert text.given == (full if starts is None else full[: min(starts)]).strip()


@pytest.mark.parametrize("name", ["fallback", "fallback-strip"])
@pytest.mark.parametrize("missing", [1, 2])
def test_an_answer_cut_within_a_character_ends_in_one_replacement(name: str, missing: int) -> None:
    """However many of its bytes are there, and whatever was given out before."""
    ids = list("你好".encode())[:-missing]
    pieces, text = streamed(SPELLINGS[name], ids)
    assert pieces == ["", "", "你", *[""] * (3 - missing), UNFINISHED]
    assert text.given == "你" + UNFINISHED


@given(st.text(max_size=30))
def test_pieces_add_up_to_the_text(data: str) -> None:
    """Whole characters only, and without white space at either end."""
    pieces, text = stream(data.replace("\r", ""))
    assert "".join(pieces) == text.given
    assert text.given == decoded(TOKENIZER(data.replace("\r", ""))["input_ids"]).strip()


@given(st.lists(st.integers(FIRST_BYTE, FIRST_BYTE + 255), max_size=40))
def test_pieces_of_broken_characters_add_up_too(ids: list[int]) -> None:
    """Bytes that are no UTF-8, as a random model writes them, still give what decoding all of them gives."""
    pieces, text = stream(ids)
    assert "".join(pieces) == text.given == decoded(ids).strip()


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_ever_given_out(data: str, stops: list[str]) -> None:
    """The text ends before the first stop string to be complete, wherever its pieces were cut."""
    pieces, text = stream(data, stops)
    ends = [data.index(stop) + len(stop) for stop in stops if stop in data]
    if not ends:
        assert not text.stopped
        assert "".join(pieces) == data
        return
    cut = data[: min(ends)]
    assert "".join(pieces) == text.given == cut[: min(cut.index(stop) for stop in stops if stop in cut)]


def test_a_character_is_given_once_it_is_whole() -> None:
    """The first bytes of a euro sign give nothing, its last the sign."""
    pieces, _ = stream("a€b")
    assert pieces == ["a", "", "", "€", "b", ""]


def test_a_stop_string_of_white_space_counts_at_the_start() -> None:
    """Leading white space is not given out, but it can end an answer."""
    pieces, text = stream("\nrest", ["\n"])
    assert (pieces, text.stopped) == ([""], True)


def test_a_token_takes_no_longer_at_the_end_of_a_long_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last ones are decoded again, however many there were."""
    lengths, decode = [], Spelling.text

    def noted(spelling: Spelling, ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(spelling, ids)

    monkeypatch.setattr(Spelling, "text", noted)
    stream("Grüße, and so on. " * 30, ["never"])
    assert max(lengths) <= WINDOW + 3


def test_names_of_bytes_alone_are_no_falling_back() -> None:
    """A vocabulary may have `<0x00>` to `<0xFF>` and a decoder that takes them for words."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert spelling.text([0xE4]) == "<0xE4>"
