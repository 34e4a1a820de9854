"""Prompts into keys and values: what several share is computed once, and what was computed before is not.

Two beginnings are kept. A prompt's tokens up to its last visual one serve further questions about the same
media; its opening, the text before its first visual one, serves whoever says the same, whatever is shown.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from prismprune.batches import Batch, Prefix, joined, roomy_cache
from prismprune.lanes import lanes_of, side_by_side

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from torch import Tensor

    from prismprune.caching import ByteCache
    from prismprune.decoding import Decoder
    from prismprune.generation import Prompt

SIMILAR = 0.75
"""Prompts are prefilled together while the shortest has this share of the longest: padding is work, too."""
CPU_PREFILL_TOKENS = 640
"""Of several prompts together, on a CPU: so many fill it, and what more of them compute leaves its caches.
Eight prompts of 585 tokens took a tenth longer together than one by one."""
TOKENS_AT_ONCE = 4 * CPU_PREFILL_TOKENS
"""Of passes that run side by side: each has activations of its own, and long ones keep all threads busy."""
LEAST_OPENING = 16
"""Tokens. What a chat template writes by itself is mostly shorter, and not worth a pass of its own size."""
LEAST_SHARE = 0.1
"""Of a prompt: what comes behind a beginning needs a mask of its own, which takes what a shorter one saves
(`benchmarks/system_text.py`)."""
NOTED = 256
"""Openings of which it is known that they have come once."""


class Kept:
    """Beginnings of earlier prompts, with openings among them from the second time on that one comes.

    A text of one request alone would only drive out what others use again.
    """

    def __init__(self, prefixes: ByteCache[Prefix]) -> None:
        self.prefixes = prefixes
        self._noted: OrderedDict[Hashable, None] = OrderedDict()

    def again(self, opening: Hashable) -> bool:
        """Whether it has come before; notes that it has now."""
        known = opening in self._noted
        self._noted[opening] = None
        self._noted.move_to_end(opening)
        if len(self._noted) > NOTED:
            self._noted.popitem(last=False)
        return known


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The first `length` tokens of a prompt, and what they are kept by; None: they are not kept."""

    length: int
    ids: bytes
    key: Hashable | None


@dataclass(frozen=True, slots=True)
class _Pass:
    """Rows that are run together, each behind what is known of it, if that is so.

    visuals: whether all of theirs lie behind that; else none does.
    """

    rows: list[int]
    beginnings: list[Prefix]
    visuals: bool = True

    @property
    def starts(self) -> list[int]:
        """Tokens of each row that are known."""
        return [beginning.length for beginning in self.beginnings] or [0] * len(self.rows)


class Prefill:
    """Runs prompts through the model, what several share once, and nothing of what is known before.

    A prompt has a prefix if another one of them shows the very same visuals, or an earlier one showed media
    of its key. Those without are run from their opening on, if that is known, or whole, and the prefix of one
    with a key is kept.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], kept: Kept | None) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._kept = kept
        both = [self._beginnings(prompt) for prompt in prompts]
        self._openings = [opening for opening, _ in both]
        self._prefixes = [prefix for _, prefix in both]

    def _beginnings(self, prompt: Prompt) -> tuple[_Beginning, _Beginning]:
        """Its opening, and its tokens up to the last visual one."""
        before, until = self._decoder.beginnings(prompt)
        opening, prefix = (prompt.token_ids[:length].numpy().tobytes() for length in (before, until))
        worth = before >= max(LEAST_OPENING, LEAST_SHARE * len(prompt.token_ids))
        named = until and prompt.media_key is not None
        return (
            _Beginning(before, opening, (Kept, opening) if worth else None),
            _Beginning(until, prefix, (prompt.media_key, prefix) if named else None),
        )

    def run(self) -> tuple[Batch, Tensor]:
        """The prompts' batch, and logits [B, vocabulary] of their first tokens."""
        begun = self._begun()
        opened = {
            row: opening
            for row, own in enumerate(self._openings)
            if row not in begun and (opening := self._find(own)) is not None
        }
        starts = {row: prefix.length for row, prefix in (begun | opened).items()}
        rests = {row: len(prompt.token_ids) - starts.get(row, 0) for row, prompt in enumerate(self._prompts)}
        most_tokens = CPU_PREFILL_TOKENS if self._decoder.model.device.type == "cpu" else math.inf
        whole = {row: rest for row, rest in rests.items() if row not in starts}
        together = partial(similar_lengths, most_tokens=most_tokens, threads=torch.get_num_threads())
        passes = [_Pass(rows, []) for rows in together(whole)]
        passes += [
            _Pass(rows, [opened[row] for row in rows])
            for rows in together({row: rests[row] for row in opened})
        ]
        # These rests are short: a run reads every weight for them, which costs more than padding.
        passes += [
            _Pass(rows, [begun[row] for row in rows], visuals=False)
            for rows in together({row: rests[row] for row in begun}, similar=0)
        ]
        sizes = [len(one.rows) * max(rests[row] for row in one.rows) for one in passes]
        computed = self._computed(passes, sizes)
        for one, (batch, _) in zip(passes, computed, strict=True):
            if one.visuals:
                self._keep_beginnings(one, batch)
        places = [one.rows for one in passes]
        order = torch.tensor([row for rows in places for row in rows]).argsort()
        logits = torch.cat([own for _, own in computed])[order.to(self._decoder.model.device)]
        return joined([batch for batch, _ in computed], places), logits

    def _begun(self) -> dict[int, Prefix]:
        """The prefixes of the rows that have one."""
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for row, prompt in enumerate(self._prompts):
            alike[tuple(map(id, prompt.visuals)), self._prefixes[row].ids].append(row)
        begun: dict[int, Prefix] = {}
        for rows in alike.values():
            own = self._prefixes[rows[0]]
            if not own.length:
                continue
            prefix = self._find(own)
            if prefix is None and len(rows) > 1:
                prefix = self._shared(rows[0])
            if prefix is not None:
                begun |= dict.fromkeys(rows, prefix)
        return begun

    def _find(self, beginning: _Beginning) -> Prefix | None:
        """What is kept of it."""
        if beginning.key is None or self._kept is None:
            return None
        return self._kept.prefixes.get(beginning.key)

    def _keep(self, beginning: _Beginning, batch: Batch, place: int, columns: Sequence[slice]) -> None:
        """A copy from those columns of a batch's row; of one that is too large none is made."""
        if beginning.key is None or self._kept is None:
            return
        if self._kept.prefixes.takes(batch.token_bytes * beginning.length):
            self._kept.prefixes.put(beginning.key, Prefix.of(batch, place, *columns))

    def _comes_again(self, opening: _Beginning) -> bool:
        return opening.key is not None and self._kept is not None and self._kept.again(opening.key)

    def _shared(self, row: int) -> Prefix:
        """The prefix of that row, which others have as well."""
        own, opening = self._prefixes[row], self._find(self._openings[row])
        beginning = self._prompts[row].beginning(own.length)
        before = None if opening is None else opening.batch(beginning.following)
        batch, _ = _extended(self._decoder, before, [beginning], [0 if opening is None else opening.length])
        prefix = Prefix.of(batch, 0, slice(0, own.length))
        if own.key is not None and self._kept is not None:
            self._kept.prefixes.put(own.key, prefix)
        return prefix

    def _computed(self, passes: Sequence[_Pass], sizes: Sequence[int]) -> list[tuple[Batch, Tensor]]:
        """The batch of each pass, and its rows' next logits; on a CPU those of similar size side by side."""
        computed: dict[int, tuple[Batch, Tensor]] = {}
        for alike in similar_lengths(dict(enumerate(sizes))):
            own = [partial(self._run, passes[number]) for number in alike]
            at_once = max(1, TOKENS_AT_ONCE // max(sizes[number] for number in alike))
            computed |= zip(alike, side_by_side(own, self._decoder.model.device, at_once), strict=True)
        return [computed[number] for number in range(len(passes))]

    def _run(self, one: _Pass) -> tuple[Batch, Tensor]:
        prompts = [self._prompts[row] for row in one.rows]
        batch = None
        if one.beginnings:
            pairs = zip(one.beginnings, prompts, strict=True)
            batch = joined([prefix.batch(prompt.following) for prefix, prompt in pairs])
        return _extended(self._decoder, batch, prompts, one.starts, visuals=one.visuals)

    def _keep_beginnings(self, one: _Pass, batch: Batch) -> None:
        """What others may begin with."""
        for place, row in enumerate(one.rows):
            prefix, opening = self._prefixes[row], self._openings[row]
            tokens = len(self._prompts[row].token_ids)
            first = partial(_stretches, batch.mask.shape[1], one.starts, place, tokens)
            self._keep(prefix, batch, place, first(prefix.length))
            if not one.beginnings and self._comes_again(opening):
                self._keep(opening, batch, place, first(opening.length))


def _stretches(width: int, starts: Sequence[int], place: int, tokens: int, length: int) -> list[slice]:
    """Columns of the first `length` of the `tokens` of a batch's row, which has `width` columns.

    What was there before its start ends where that of all rows ends, the others where the batch does.
    """
    start, known = starts[place], max(starts)
    begins_at = width - (tokens - start)
    behind = slice(begins_at, begins_at + length - start)
    return [slice(known - start, known), behind] if start else [behind]


def _extended(
    decoder: Decoder,
    batch: Batch | None,
    prompts: Sequence[Prompt],
    starts: Sequence[int],
    *,
    visuals: bool = True,
) -> tuple[Batch, Tensor]:
    """Feed each prompt's tokens from its start on, into a new batch if there is none; its rows' next logits.

    visuals: whether all of them lie behind the starts; else none does.
    """
    device = decoder.model.device
    longest = max(len(prompt.token_ids) - start for prompt, start in zip(prompts, starts, strict=True))
    # Any token serves as padding, as nothing attends to it, but for a placeholder, which would be filled.
    filler = int(prompts[0].token_ids[-1])
    ids, mask, positions = [], [], []
    for prompt, start in zip(prompts, starts, strict=True):
        own = prompt.token_ids[start:]
        missing = (longest - len(own), 0)
        ids.append(pad(own, missing, value=filler))
        mask.append(pad(torch.ones_like(own), missing))
        positions.append(pad(prompt.positions[..., start:], missing))
    axes = len(prompts[0].positions) if prompts[0].positions.ndim > 1 else None
    if batch is None:
        empty = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
        following = torch.tensor([prompt.following for prompt in prompts], device=device)
        batch = Batch(roomy_cache(), empty, following, axes)
    shown = [visual for prompt in prompts for visual in prompt.visuals] if visuals else []
    visual_inputs = decoder.visual_inputs(shown) if shown else {}
    logits = decoder.extend(
        batch,
        torch.stack(ids).to(device),
        torch.stack(mask).to(device),
        torch.stack(positions, dim=-2).to(device),
        visual_inputs,
    )
    return batch, logits


def similar_lengths(
    lengths: Mapping[int, int], most_tokens: float = math.inf, similar: float = SIMILAR, threads: int = 1
) -> list[list[int]]:
    """Groups of rows (row: length), in order, whose shortest has at least `similar` of its longest.

    Only a row by itself has more than `most_tokens`; those of a group count as long as its longest. Where
    that makes several of similar rows, lanes that share so many `threads` have as many of them each, and rows
    that are left over are groups of their own.
    """
    groups: list[list[int]] = []
    for row in sorted(lengths, key=lambda row: lengths[row]):
        if groups and lengths[groups[-1][0]] >= similar * lengths[row]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [
        sorted(part)
        for group in groups
        for part in _parts(group, max(1, int(min(len(group), most_tokens / lengths[group[-1]]))), threads)
    ]


def _parts(group: Sequence[int], at_once: int, threads: int) -> Iterator[Sequence[int]]:
    """Of at most so many rows `at_once`: as many for each lane, which end together, and what is left over."""
    lanes = lanes_of(math.ceil(len(group) / at_once), threads)
    of_lane = len(group) // lanes
    rows, parts = of_lane * lanes, lanes * math.ceil(of_lane / at_once)
    for number in range(parts):
        yield group[number * rows // parts : (number + 1) * rows // parts]
    if rest := group[rows:]:
        yield from _parts(rest, at_once, threads)
