"""The stages of one block, read off the signals that its modules passed on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...core.errors import InputError
from ..architecture import Attention, Mlp, Stage
from .norms import is_norm
from .signals import Call, Signals, replayed, same


@dataclass(eq=False)
class Block:
    """A block's calls, and which of them have found their place."""

    name: str
    signals: Signals
    heads: int
    placed: set[str] = field(default_factory=set)
    norms: list[Call] = field(default_factory=list)
    linears: list[Call] = field(default_factory=list)
    plain: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        for call in self.signals.under(self.name):
            if isinstance(call.module, nn.Linear):
                self.linears.append(call)
            elif is_norm(call.module):
                self.norms.append(call)
            elif next(call.module.parameters(), None) is None:
                self.plain.append(call)

    def short(self, call: Call) -> str:
        return call.name.removeprefix(f"{self.name}.")

    def place(self, *calls: Call) -> None:
        self.placed |= {c.name for c in calls}

    def stages(self, before: Tensor, after: Tensor) -> tuple[Stage, ...]:
        """All stages in turn, from the stream before the block to that behind it. Raises InputError."""
        found, x = list[Stage](), before
        while norm := self._reads_stream(x):
            stage, x = self._stage(norm, x)
            found.append(stage)
        if not found:
            raise InputError(self._bare(before))
        if same(x, after):
            self._check_all_placed(self.placed)
            return tuple(found)
        self._check_all_placed({c.name for c in (*self.linears, *self.norms)})
        raise InputError(self._lost(found))

    def _lost(self, found: Sequence[Stage]) -> str:
        """Why the stream behind some stages is not what they explain."""
        names = " and ".join(f"'{stage.norm}'" for stage in found)
        return (
            f"behind the branches that read {names}, its stream is not the sum of the stream before and of what they give "
            "(multipliers?)"
        )

    def _reads_stream(self, x: Tensor) -> Call | None:
        reading = [n for n in self.norms if n.name not in self.placed and same(n.given, x)]
        if len(reading) > 1:
            names = " and ".join(f"'{self.short(n)}'" for n in reading)
            raise InputError(f"two norms, {names}, read one point of its stream")
        return reading[0] if reading else None

    def _bare(self, x: Tensor) -> str:
        reading = next((c for c in self.linears if same(c.given, x)), None)
        if reading is None:
            return "no norm reads the stream in front of its branches"
        branch = self.short(reading).rpartition(".")[0] or self.short(reading)
        return f"its branches read the stream itself: no norm stands in front of '{branch}'"

    def _stage(self, norm: Call, x: Tensor) -> tuple[Stage, Tensor]:
        """The stage that begins with a norm, and the stream behind it."""
        self.place(norm)
        readers = [c for c in self.linears if same(c.given, norm.gave)]
        mlp, down, inside = self._mlp(readers)
        left = [c for c in readers if c not in inside]
        attention, out = self._attention(left) if left else (None, None)
        written = [c for c in (out, down) if c is not None]
        if not written:
            raise InputError(self._unknown_reader(norm))
        post = self._post(written[0]) if len(written) == 1 else None
        for call in written:
            x = x + (call if post is None else post).gave.reshape(x.shape)
        made = Stage(
            self.short(norm),
            attention=attention,
            mlp=mlp,
            post=None if post is None else self.short(post),
        )
        return made, x

    def _unknown_reader(self, norm: Call) -> str:
        """Why nothing is known of what reads a norm."""
        reading = [self.short(c) for c in self.signals.under(self.name) if same(c.given, norm.gave)]
        said = f" ('{min(reading, key=len)}')" if reading else ""
        return f"what reads the norm '{self.short(norm)}'{said} is neither an attention nor an MLP of plain linear layers"

    def _post(self, writer: Call) -> Call | None:
        """The norm that what a branch gives passes before it is added."""
        found = [n for n in self.norms if n.name not in self.placed and same(n.given, writer.gave)]
        if not found:
            return None
        self.place(found[0])
        return found[0]

    def _mlp(self, readers: Sequence[Call]) -> tuple[Mlp | None, Call | None, list[Call]]:
        """The MLP among what reads a norm: its activation is given what one of them gives."""
        for act in self.plain:
            gate = next((c for c in readers if same(c.gave, act.given)), None)
            if gate is None or same(act.given, act.gave):
                continue
            for other in (None, *readers):
                inner = act.gave if other is None else act.gave * other.gave
                if other is gate or inner.shape != act.gave.shape:
                    continue
                down = next((c for c in self.linears if same(c.given, inner)), None)
                if down is not None:
                    inside = [gate, down] if other is None else [gate, other, down]
                    self.place(*inside)
                    return self._named(act, inside), down, inside
        return None, None, []

    def _named(self, act: Call, inside: Sequence[Call]) -> Mlp:
        module = _home(self.short(c) for c in inside)
        gate, *up, down = (_below(module, self.short(c)) for c in inside)
        return Mlp(
            module,
            up=up[0] if up else gate,
            down=down,
            gate=gate if up else None,
            act=_below(module, self.short(act)),
        )

    def _attention(self, readers: Sequence[Call]) -> tuple[Attention, Call]:
        """The attention of three readers, told apart by what the first token's part in each moves."""
        names = ", ".join(f"'{self.short(c)}'" for c in readers)
        module = _home(self.short(c) for c in readers)
        whole = self.signals.of(f"{self.name}.{module}") if module else None
        inside = [c for c in self.linears if module and c.name.startswith(f"{self.name}.{module}.")]
        writers = [c for c in inside if c not in readers]
        if len(readers) != 3 or whole is None or len(writers) != 1:
            raise InputError(
                f"what reads one norm, {names}, is no attention of three projections and one that writes, and no MLP"
            )
        moves = {c: replayed(whole, c.module, writers[0].module) for c in readers}
        roles = {(False, False): "q", (False, True): "k", (True, True): "v"}
        found = {roles.get(moved, ""): c for c, moved in moves.items()}
        if found.keys() != {"q", "k", "v"}:
            raise InputError(
                f"{names} are not the queries, keys and values of a causal attention by what the first token's parts move"
            )
        self.place(*readers, *writers)
        own = {role: _below(module, self.short(c)) for role, c in found.items()}
        norms = self._head_norms(module, found["q"], found["k"])
        out = _below(module, self.short(writers[0]))
        return Attention(module, **own, out=out, **norms), writers[0]

    def _head_norms(self, module: str, q: Call, k: Call) -> dict[str, str]:
        """Norms of each head's queries and keys."""
        found = dict[str, str]()
        for norm in self.norms:
            if not norm.name.startswith(f"{self.name}.{module}."):
                continue
            role = next((r for r, c in (("q_norm", q), ("k_norm", k)) if _of_heads(norm, c)), None)
            name = self.short(norm)
            if role is None:
                raise InputError(
                    f"its attention's norm '{name}' reads neither queries nor keys as they come"
                )
            self._check_head_norm(norm, q if role == "q_norm" else k)
            self.place(norm)
            found[role] = _below(module, name)
        if len(found) == 1:
            raise InputError(f"its attention norms by '{next(iter(found.values()))}' alone")
        return found

    def _check_head_norm(self, norm: Call, read: Call) -> None:
        name, width = self.short(norm), norm.given.shape[-1]
        if norm.given.dim() == 3 and width == read.gave.shape[-1] and self.heads > 1:
            raise InputError(
                f"its attention norms what all heads give together ('{name}'), so heads are no directions of their own"
            )
        if isinstance(norm.module, nn.LayerNorm):
            raise InputError(f"its attention norms queries or keys by a LayerNorm ('{name}')")

    def _check_all_placed(self, placed: Set[str]) -> None:
        block = self.signals.model.get_submodule(self.name)
        homes = (f"{self.name}.{n}".rpartition(".")[0] for n, _ in block.named_parameters())
        left = sorted(set(homes) - placed)
        if left:
            said = ", ".join(f"'{n}'" for n in left[:4])
            raise InputError(f"weights without a place in the grammar: {said}")


def _of_heads(norm: Call, linear: Call) -> bool:
    """Whether a norm reads what a linear layer gives, heads apart or not."""
    given, gave = norm.given, linear.gave
    forms = [given] + ([given.transpose(1, 2)] if given.dim() == 4 else [])
    return any(x.numel() == gave.numel() and same(x.reshape(gave.shape), gave) for x in forms)


def _home(names: Iterable[str]) -> str:
    """The module that all of these lie in; '' for the block itself."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _below(module: str, name: str) -> str:
    """A name relative to a module."""
    if module and not name.startswith(f"{module}."):
        raise InputError(f"'{name}' does not lie in '{module}' with the rest of its branch")
    return name.removeprefix(f"{module}.") if module else name
