"""A model's modules made to multiply as a CPU does it best, what they multiply together as one matrix.

Linear layers become `CpuLinear`. Attention and gated MLPs of language models multiply the same values by
three weights and by two: all of them are one product, and queries and keys are turned together, bit for bit
as before. Attention is given to torch's kernel in the shape that it is fastest at, or computed by products
(`cpu_attention`), and norms take five calls for nine, all of this up to rounding. Where rows are few, calls
are a good part of a decoding step's time, more so as the weights that stream by leave nothing in the
processor's caches (`benchmarks/layers.py`): layers whose parts nobody watches or has changed call them past
`nn.Module`. A language model's last layer computes keys and values for every token of a prompt, and the rest
for the last one, whose output alone is used. What changes in towers, `cpu_towers` has.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import cat, nn
from torch.nn.functional import silu
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prismprune.cpu_attention import CpuAttention
from prismprune.cpu_changes import Changed, Untouched, called_otherwise, changed_class
from prismprune.cpu_products import Copies, CpuLinear, available, formats
from prismprune.cpu_towers import change_activation, change_tower_attention, fuse, fusible_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

MANY_ROWS_ALONE = ("vision", "projector")
"""Parts of a model that never see few rows."""


_ONLY_LAST: ContextVar[bool] = ContextVar("only_last", default=False)


@contextmanager
def only_last_row() -> Iterator[None]:
    """What the model says after its last token is all that is used in this context, of each prompt.

    Its last layer then computes keys and values for every token, and the rest for one.
    """
    token = _ONLY_LAST.set(True)
    try:
        yield
    finally:
        _ONLY_LAST.reset(token)


class _Norm(Changed):
    """Root mean square normalization in five calls of nine, up to the rounding of float32."""

    weight: Tensor
    epsilon: Tensor

    def forward(self, hidden_states: Tensor) -> Any:
        inexact = hidden_states.dtype is not torch.float32 or self.weight.dtype is not torch.float32
        if inexact or torch.is_grad_enabled() or not hidden_states.is_cpu:
            return super().forward(hidden_states)
        return _normed(hidden_states, self.weight, self.epsilon)


def _normed(values: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(values, 2, -1, True)
    mean = torch.addcmul(epsilon, length, length, value=1 / values.shape[-1])
    return values.mul(mean.rsqrt_()).mul_(weight)


class _Joined(Changed):
    """A transformers module some of whose layers have their copies in common.

    It is what it was where these cannot be used: with gradients, in training, with hooks on a layer or on all
    modules, and where a layer has a `forward` of its own or another module is in its place.
    """

    joins: tuple[str, ...]
    copies: Copies | None = None

    def products(self, values: Tensor) -> Tensor | None:
        """Of the layers that it joins, side by side: [..., outputs]. None: multiply as ever."""
        if self.training or self.copies is None or _has_any_global_hook():
            return None
        for name, layer in zip(self.joins, self.copies.layers, strict=True):
            if self._modules[name] is not layer or called_otherwise(layer):
                return None
        return self.copies.product(values)


class _Rotation(threading.local):
    """Of queries and keys by their positions.

    These are the same in all layers of a pass, and prepared once: in each thread for the one it runs.
    """

    def __init__(self) -> None:
        self._prepared: tuple[Any, Tensor, Tensor] | None = None

    def turned(self, heads: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """heads: [B, L, H, head_dim]. embeddings: cosine and sine [B, L, head_dim]."""
        half, prepared = heads.shape[-1] // 2, self._prepared
        if prepared is None or prepared[0] is not embeddings:
            cosine, sine = (each.unsqueeze(2) for each in embeddings)
            signed = cat((-sine[..., :half], sine[..., half:]), dim=-1)
            prepared = self._prepared = embeddings, cosine, signed
        _, cosine, signed = prepared
        return (heads * cosine).add_(heads.roll(half, -1).mul_(signed))


class _Attention(_Joined):
    """Self-attention of Llama, and of language models that compute theirs in the same way."""

    joins = ("q_proj", "k_proj", "v_proj")
    rotation: _Rotation
    attention: CpuAttention
    config: Any
    o_proj: Any
    head_dim: int
    num_key_value_groups: int
    layer_idx: int
    scaling: float

    def forward(self, hidden_states: Tensor, *, last_query: bool = False, **given: Any) -> Any:
        """last_query: what the others attend to may be left out."""
        learns = self.training or torch.is_grad_enabled()
        if learns or not self.sdpa or not hidden_states.is_cpu:
            return super().forward(hidden_states, **given)
        projected = self.products(hidden_states)
        if projected is None:
            projected = cat([getattr(self, name)(hidden_states) for name in self.joins], dim=-1)
        return self.o_proj(self.attended(projected, last_query=last_query, **given)), None

    @property
    def sdpa(self) -> bool:
        """Whether that is how it attends."""
        name: str = self.config._attn_implementation  # noqa: SLF001 (its only name)
        return name == "sdpa"

    def attended(
        self,
        projected: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        *,
        last_query: bool = False,
        **given: Any,
    ) -> Tensor:
        """What its queries find, before the product behind it: [B, L, heads * head_dim].

        projected: queries, keys and values side by side, [B, L, outputs].
        """
        batch, length, _ = projected.shape
        heads, groups = projected.view(batch, length, -1, self.head_dim), self.num_key_value_groups
        key_heads = heads.shape[2] // (groups + 2)
        query_heads = groups * key_heads
        turning = heads.narrow(2, 0, query_heads + key_heads)
        turned = self.rotation.turned(turning, position_embeddings).transpose(1, 2)
        queries, keys = turned.narrow(1, 0, query_heads), turned.narrow(1, query_heads, key_heads)
        values = heads.narrow(2, query_heads + key_heads, key_heads).transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        if last_query:
            queries, length = queries[:, :, -1:], 1
            attention_mask = None if attention_mask is None else attention_mask[:, :, -1:]
        found = self.attention.attended(queries, keys, values, attention_mask, self.scaling)
        if found is None:
            found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
                self, queries, keys, values, attention_mask, scaling=self.scaling, **given
            )
            found = found.reshape(batch, length, -1)
        return found


class _GatedMLP(_Joined):
    """`down(act(gate(x)) * up(x))`."""

    joins = ("gate_proj", "up_proj")
    act_fn: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Any:
        products = self.products(x)
        if products is None:
            return super().forward(x)
        return self.down_proj(_activated(products, self.act_fn))


def _activated(products: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`activation(gate) * up`, of both side by side."""
    gate, up = products.chunk(2, dim=-1)
    return activation(gate).mul_(up)


class _Parts:
    """The parts of one layer, called past `nn.Module`, which looks for each of them in dictionaries."""

    __slots__ = ("_activation", "_attention", "_norms", "copies")

    def __init__(self, layer: _Layer) -> None:
        self.copies = layer.all_copies
        self._attention: _Attention = layer.self_attn
        self._norms = [_NormParts(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        activation: Any = layer.mlp.act_fn
        self._activation = silu if type(activation) in SILU else activation

    def run(self, states: Tensor, *, only: bool, **given: Any) -> Tensor:
        """What the layer makes of these [B, L, hidden]. only: of each prompt's last token."""
        attending, outward, expanding, down = self.copies
        first, second = self._norms
        rows = states.shape[0] * states.shape[1]
        projected = attending.multiplied(first.normed(states), rows)
        attended = self._attention.attended(projected, last_query=only, **given)
        if only:
            states, rows = states[:, -1:], states.shape[0]
        states = outward.multiplied(attended, rows).add_(states)
        products = expanding.multiplied(second.normed(states), rows)
        return down.multiplied(_activated(products, self._activation), rows).add_(states)


class _NormParts:
    """A `_Norm`, past `nn.Module`."""

    __slots__ = ("_epsilon", "_norm", "_parameters")

    def __init__(self, norm: _Norm) -> None:
        self._norm, self._epsilon = norm, norm.epsilon
        self._parameters = norm._parameters  # noqa: SLF001 (no public name)

    def normed(self, values: Tensor) -> Any:
        weight: Any = self._parameters["weight"]
        if values.dtype is not torch.float32 or weight.dtype is not torch.float32:
            return self._norm.forward(values)
        return _normed(values, weight, self._epsilon)


class _Known(threading.local):
    """What was found of the pass that a thread runs, which is known by its embeddings of positions."""

    embeddings: Any = None
    direct: bool = False


class Stack:
    """The layers of one language model, and whether they may call their parts past `nn.Module`.

    That is looked into once a pass, for all of them: few rows leave no part of a layer in the processor's
    caches, and to look at it costs as much as a call.

    began: called whenever one of them begins; see `watch_layers`.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        own: list[Any] = list(layers)
        self.layers = layers
        self.began: Callable[[], object] | None = None
        self._attention: _Attention = own[0].self_attn
        self._parts = [_Parts(layer) for layer in own]
        self._copies = [copies for parts in self._parts for copies in parts.copies]
        self._untouched = Untouched(layers.modules())
        self._known = _Known()
        self._seen = False  # whether the last pass found every copy one of the weights that there are

    def parts(self, place: int, values: Tensor, embeddings: Any) -> _Parts | None:
        """Those of the layer there, which gets these [B, L, hidden]; None: it may not call them."""
        known = self._known
        if known.embeddings is not embeddings or embeddings is None:
            known.direct = self.direct(values)
            known.embeddings = embeddings
        return self._parts[place] if known.direct else None

    def direct(self, values: Tensor, *, step: bool = False) -> bool:
        """Whether the layers may in a pass of these [B, L, hidden].

        So it is if nobody watches, and every product has a copy for so many rows and for one of each prompt.
        step: the weights are those of the pass before, as its keys and values are. To look at each of them
        again would take a twentieth of a small model's step.
        """
        seen, self._seen = self._seen and step, False
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if not self._attention.sdpa or not self._untouched:
            return False
        rows, prompts = values.shape[0] * values.shape[1], values.shape[0]
        self._seen = all(
            copies.fit(values)
            and (seen or copies.current())
            and copies.serves(rows)
            and copies.serves(prompts)
            for copies in self._copies
        )
        return self._seen

    def run(self, states: Tensor, **given: Any) -> Tensor:
        """What all layers make of these [B, L, hidden], where they may. given: as to a layer."""
        for parts in self._parts:
            if self.began is not None:
                self.began()
            states = parts.run(states, only=False, **given)
        return states


class _Layer(Changed):
    """A language model's layer whose parts are called past `nn.Module` where its `stack` says so.

    The last one: see `only_last_row`.
    """

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    place: int
    last: bool
    stack: Stack | None

    @property
    def all_copies(self) -> list[Copies]:
        """Of its products, in their order; fewer if some have none."""
        holders = (self.self_attn, self.self_attn.o_proj, self.mlp, self.mlp.down_proj)
        every = (holder.__dict__.get("copies") for holder in holders)
        return [copies for copies in every if copies is not None]

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        only = self.last and hidden_states.shape[1] > 1 and _ONLY_LAST.get()
        if self.stack is not None:
            if self.stack.began is not None:
                self.stack.began()
            parts = self.stack.parts(self.place, hidden_states, given.get("position_embeddings"))
            if parts is not None:
                return parts.run(hidden_states, only=only, **given)
        if not only or self.training:
            return super().forward(hidden_states, **given)
        if isinstance(self.self_attn, _Attention):
            given["last_query"] = True
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        last = hidden_states[:, -1:] + attended[:, -1:]
        return last + self.mlp(self.post_attention_layernorm(last))


def watch_layers(model: nn.Module, began: Callable[[], object]) -> None:
    """Have `began` called whenever a layer begins: of the tower, of the language model, of any stack.

    Layers of a `Stack` tell it themselves. A hook on one would be somebody who wants to see what it is given,
    and for whom it is called as a module, with all of its parts.
    """
    for module in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in module:
            if isinstance(layer, _Layer) and layer.stack is not None:
                layer.stack.began = began
            else:
                layer.register_forward_pre_hook(lambda *_: began())


JOINED: Mapping[str, Any] = {
    "LlamaAttention": _Attention,
    "LlamaMLP": _GatedMLP,
    "MistralAttention": _Attention,
    "MistralMLP": _GatedMLP,
    "Qwen2_5_VLAttention": _Attention,
    "Qwen2MLP": _GatedMLP,
}
"""Transformers' modules, by their names, that compute what these do."""
ATTENTION = frozenset(name for name, change in JOINED.items() if change is _Attention)
"""Those of them that attend."""
LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2_5_VLDecoderLayer"}
"""Transformers' layers, by their names, that may be a `_Layer`."""
NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2_5_VLRMSNorm"}
"""Transformers' norms, by their names, that compute what `_Norm` does."""
SILU = {SiLUActivation, nn.SiLU}
"""Activations that are torch's function."""
PRODUCTS = 4
"""Of a layer: queries, keys and values; behind the attention; gate and up; down."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that multiply the same values, and the module that holds their copies: a single one itself."""

    holder: Any
    layers: tuple[CpuLinear, ...]
    part: str | None

    def bytes(self, of_a_weight: int) -> int:
        """What a copy takes."""
        return of_a_weight * sum(layer.weight.numel() for layer in self.layers)

    @property
    def halved(self) -> bool:
        copies: Copies | None = self.holder.__dict__.get("copies")
        return copies is not None and copies.half is not None

    def halve(self) -> list[_Group]:
        """Keep a copy in 16 bits. Where only some weights allow that, each is on its own from now on."""
        copies = Copies(*self.layers)
        if copies.halve():
            self._hold(copies)
        elif len(self.layers) > 1:
            alone = [_Group(layer, (layer,), self.part) for layer in self.layers]
            for each in alone:
                each.halve()
            if any(each.halved for each in alone):
                return alone
        return [self]

    def pack(self) -> None:
        """Keep a copy in oneDNN's order."""
        if "copies" not in self.holder.__dict__:
            self._hold(Copies(*self.layers))
        self.holder.copies.pack()

    def _hold(self, copies: Copies) -> None:
        self.holder.copies = copies
        if not isinstance(self.holder, CpuLinear | _Joined):
            original: Any = type(self.holder)
            self.holder.__class__ = changed_class(original, JOINED[original.__name__])


class _FusedGroup(_Group):
    """The layers of a tower's MLP, which are packed with the activation between them."""

    __slots__ = ()

    @property
    def halved(self) -> bool:
        return False

    def halve(self) -> list[_Group]:
        return [self]

    def pack(self) -> None:
        fuse(self.holder)


def use_cpu_products(
    model: nn.Module, packed_bytes: int = 0, parts: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Make every plain linear layer in one of the `formats` a `CpuLinear`, where `available`.

    Copies are made in the model's order while they take at most `packed_bytes` together: first those in 16
    bits of layers that a decoding step goes through, which win most for least, then those in oneDNN's order;
    modules of `JOINED` get one for several layers. parts: names of modules that are not the language model's
    layers, as `Family.outside`. Quantized layers, which multiply in their own way, other subclasses and other
    formats stay as they are. Attention, norms and layers of the known kinds change with copies and without.
    """
    if not available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in formats():
            module.__class__ = CpuLinear
    _change_attention(model)
    outside = {name: part for part, names in (parts or {}).items() for name in names}
    room, groups = packed_bytes, list[_Group]()
    for group in _groups(model, outside):
        if group.part in MANY_ROWS_ALONE or group.bytes(2) > room:
            groups.append(group)
        else:
            halved = group.halve()
            groups += halved
            room -= sum(each.bytes(2) for each in halved if each.halved)
    for group in groups:
        needs = group.bytes(group.layers[0].weight.element_size())
        never = group.part == "head" and group.halved  # it sees a row of each answer at the most
        if not never and needs <= room:
            group.pack()
            room -= needs
    _change_others(model)


def forget_copies(model: nn.Module) -> None:
    """Have the copies of a model's weights made again from what these are at the next prompt.

    Whoever changes weights through `.data`, as PEFT does to merge adapters, or in place those that were made
    in inference mode, calls it afterwards: torch counts no such changes, and copies do not notice them.
    """
    for module in model.modules():
        own = module.__dict__
        for each in (own.get("copies"), *(own.get("fused") or ())):
            if isinstance(each, Copies):
                each.forget()


def _change_others(model: nn.Module) -> None:
    """Norms, activations of towers, and layers as a whole."""
    modules = list(model.modules())
    for module in modules:
        if type(module).__name__ in NORMS:
            _change_norm(module)
        else:
            change_activation(module)
    for module in modules:
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            _change_layers(layers)


def _change_attention(model: nn.Module) -> None:
    """All of it, whether or not its products will have copies."""
    rotation, attention = _Rotation(), CpuAttention()
    for module in model.modules():
        changed: Any = module
        original: Any = type(module)
        if original.__name__ in ATTENTION:
            changed.__class__ = changed_class(original, _Attention)
            changed.rotation, changed.attention = rotation, attention
        else:
            change_tower_attention(module)


def _change_norm(norm: Any) -> None:
    original: Any = type(norm)
    norm.epsilon = torch.tensor(norm.variance_epsilon)
    norm.__class__ = changed_class(original, _Norm)


def _change_layers(layers: nn.ModuleList) -> None:
    """Make them `_Layer`s if they are of `LAYERS`; where all their products have copies, of one `Stack`."""
    if any(type(layer).__name__ not in LAYERS for layer in layers):
        return
    changed: list[Any] = list(layers)
    for place, layer in enumerate(changed):
        original: Any = type(layer)
        layer.__class__ = changed_class(original, _Layer)
        layer.place, layer.last, layer.stack = place, layer is changed[-1], None
    joined = all(
        isinstance(layer.self_attn, _Attention)
        and isinstance(layer.mlp, _GatedMLP)
        and isinstance(layer.input_layernorm, _Norm)
        and isinstance(layer.post_attention_layernorm, _Norm)
        for layer in changed
    )
    if changed and joined and all(len(layer.all_copies) == PRODUCTS for layer in changed):
        stack = Stack(layers)
        for layer in changed:
            layer.stack = stack


def stack_of(layers: nn.ModuleList) -> Stack | None:
    """That of these layers, if they have one: in this list, in which it sees what takes the place of one."""
    first: Any = layers[0] if len(layers) else None
    stack: Stack | None = first.stack if isinstance(first, _Layer) else None
    return stack if stack is not None and stack.layers is layers else None


def _groups(model: nn.Module, outside: Mapping[str, str]) -> Iterator[_Group]:
    """Of all layers, in the model's order."""
    joined = set[nn.Module]()
    for name, module in model.named_modules():
        part = next((own for place, own in outside.items() if f"{name}.".startswith(f"{place}.")), None)
        if (kind := JOINED.get(type(module).__name__)) is not None:
            layers = tuple(module.get_submodule(each) for each in kind.joins)
            if _alike(layers):
                joined |= {*layers}
                yield _Group(module, layers, part)
        elif (fusible := fusible_layers(module)) is not None:
            joined |= {*fusible}
            yield _FusedGroup(module, fusible, part)
        elif isinstance(module, CpuLinear) and module not in joined:
            yield _Group(module, (module,), part)


def _alike(layers: Sequence[nn.Module]) -> TypeGuard[tuple[CpuLinear, ...]]:
    """Whether their weights can stand one above the other."""
    kinds = {
        (each.in_features, each.weight.dtype, each.bias is None) if isinstance(each, CpuLinear) else None
        for each in layers
    }
    return len(kinds) == 1 and None not in kinds
