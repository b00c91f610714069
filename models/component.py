"""A network of a model, its weights, where they are, and what computes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from loader.checkpoint import Checkpoint
from loader.describe import describe
from loader.errors import LoadError
from loader.offload import Visit
from loader.options import LoadOptions
from loader.params import Weights, load_params
from pyggml import Backend, Graph, SplitBackend

from . import devices
from .devices import Place, host
from .nn import Module
from .split import load_split
from .streaming import Stream, VramReport

Load = Callable[..., Weights]  # load_params, or what stands in for it


class Component:
    """A network with its weights and the file they came from. It computes on `place.backend`.

    Weights that rest elsewhere are brought to the backend by `in_use` and given back after it: copied there when they
    rest in memory of the host (`cpu`), read from the file anew when they rest on `disk`. `weights` are those that rest;
    on `disk` they are closed between uses. Raises what `loader.load_params` raises, also for `disk`, when it is made.
    """

    def __init__(
        self, name: str, module: Module, checkpoint: Checkpoint, place: Place, options: LoadOptions | None = None,
        load: Load = load_params,
    ) -> None:  # fmt: skip
        self.module: Any = module
        self.checkpoint = checkpoint
        self.place = place
        if isinstance(place.backend, SplitBackend) and load is load_params:
            load = load_split
        self._name, self._options, self._loader = name, options, load
        self._visit: Visit | Stream | None = None
        self.vram: VramReport | None = None  # of the last uses, where weights came piece by piece
        self._n_uses = 0
        self._graphs: OrderedDict[object, Graph] = OrderedDict()
        self.weights = self._load(at_backend=not place.offloads)
        if place.rest == "disk" and load is load_params:  # what stands in for it holds nothing
            self.weights.close()

    @property
    def options(self) -> LoadOptions | None:
        """How the weights come to rest, as it was asked for."""
        return self._options

    @property
    def backend(self) -> Backend:
        return self.place.backend

    @contextmanager
    def in_use(self) -> Iterator[Any]:
        """The module, with its weights where it computes, for the `with` body. May be nested."""
        with self.kept():
            if self.place.rest == "disk":
                if self.weights.closed:
                    self.weights = self._load(at_backend=True)
            elif self.place.offloads and self._visit is None:
                self._visit = self._bring()
            yield self.module

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What `in_use` brings to the backend inside of the `with` body stays there until its end."""
        self._n_uses += 1
        try:
            yield
        finally:
            self._n_uses -= 1
            if not self._n_uses and self.place.offloads:
                self._give_back()

    def rest(self) -> None:
        """End the visit of weights that only visit the backend, as before they are changed: the next `in_use` brings
        them anew, also inside of another.
        """
        if self._visit is not None:
            self._give_back()

    def stream(self, graph: Graph) -> Stream | None:
        """What the weights of that graph come by, if they come piece by piece."""
        return self._visit if isinstance(self._visit, Stream) and self._visit.feeds(graph) else None

    def graph(self, key: object, build: Callable[[], Graph], n_kept: int = 2) -> Graph:
        """The graph of that key, built when it is new; the last `n_kept` are kept while the weights stay."""
        if key not in self._graphs:
            while len(self._graphs) >= n_kept:
                self._graphs.popitem(last=False)[1].close()
            self._graphs[key] = build()
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def close_graphs(self) -> None:
        """Forget the graphs, as when what they compute has changed."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def close(self) -> None:
        """Free graphs and weights, close the file."""
        self._give_back()
        self.close_graphs()
        self.weights.close()
        self.checkpoint.close()

    def _bring(self) -> Visit | Stream:
        limit = self.place.max_vram
        if isinstance(self.backend, SplitBackend) or self.backend.device.is_remote:
            return Visit(self.weights, self.backend)
        if limit is None:
            free = self.backend.device.memory[0]
            n_bytes = sum(p.tensor.n_bytes for p in self.weights.params.values() if p.loaded)
            if n_bytes <= free - free // 4:  # the rest for what it computes with
                return Visit(self.weights, self.backend)
            limit = free - free // 16
        stream = Stream(self.weights, self.backend, limit, self.vram)
        self.vram = stream.report
        return stream

    def _give_back(self) -> None:
        if self._visit is not None or self.place.rest == "disk":
            self.close_graphs()
        if self._visit is not None:
            self._visit.close()
            self._visit = None
        if self.place.rest == "disk":
            self.weights.close()

    def _load(self, at_backend: bool) -> Weights:
        load = partial(self._loader, self.module.params(), self.checkpoint, backend=self.backend, component=self._name)
        if at_backend:
            return load(options=self._options)
        # Only to be copied from: as the file has them, not in a layout that the processor likes.
        options = replace(self._options or LoadOptions.from_environment(), repack="off")
        return load(options=options, buffer_type=host().buffer_type)


@contextmanager
def opening(place: Mapping[devices.Module, Place]) -> Iterator[list[Component]]:
    """For components that are opened one by one: closed when one fails, and with them the backends that were opened
    for them.
    """
    parts: list[Component] = []
    try:
        yield parts
    except BaseException:
        for part in parts:
            part.close()
        for backend in dict.fromkeys(b for one in place.values() for b in one.opened):
            backend.close()
        raise


def check_width(text_encoder: Component, transformer: Component) -> None:
    """LoadError unless the transformer takes what the text encoder makes."""
    made, wanted = text_encoder.module.config.dim, transformer.module.config.text_dim
    if made != wanted:
        problem = f"the text encoder's features have {made} numbers, the transformer wants {wanted}"
        raise LoadError(f"{problem}: they do not belong together", path=text_encoder.checkpoint.path)


def require(checkpoint: Checkpoint, role: str, architectures: Sequence[str], option: str) -> None:
    """LoadError that says what the file is when it is recognised as something else than what it was given as."""
    found = describe(checkpoint)
    if found.role not in (role, "unknown", "several models") or (
        found.role == role and found.architecture not in (*architectures, "unknown")
    ):
        wanted = f"{option} wants a {role} ({' or '.join(architectures)})"
        raise LoadError(f"{found.sentence()}; {wanted}", path=checkpoint.path)
