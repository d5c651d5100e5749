"""A pool of Ray actors that run a model's batches, on this machine or on a cluster (extra `ray`).

Each actor loads the model once. While `Actors.on(model)` is active, the loops of the stages send their batches to them
(`generation.parallel.run_batches`) and merge what comes back, in order, in this process: it alone writes files. So a
batch counts once, however many actors die over it. An actor that dies is replaced, and its batch is run again. A batch
that fails, or that kills two actors, is halved until the items that fail are alone; those are set aside and reported.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from lensteer import models
from lensteer.arguments import typed
from lensteer.errors import LensteerError
from lensteer.generation.parallel import SetAside, pooled

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Item = TypeVar("Item")
Result = TypeVar("Result")

#: The address that starts a cluster of this machine alone.
LOCAL = "local"
#: Seconds that the address of a cluster may take to answer, and that actors may wait for a place on it.
ANSWER, PLACE = 10.0, 120.0
#: How often to try to start a cluster.
START = 5
#: How many actors may die over a batch before it is halved, or set aside.
DEATHS = 2
#: Part of all items that may be set aside; beyond it, the mistake is not in single items.
MAX_ASIDE = 0.1


@dataclass(frozen=True)
class ActorOptions:
    """Where actors run, and what each is given.

    Attributes:
        address: "local" starts a cluster of this machine; "auto" finds the one that this machine is in; or HOST:PORT.
        n: number of actors; None: as many as there is room for.
        gpus: GPUs of each, such as 0.5 for two actors on one, or 4 with a `device_map`.
        cpus: CPU cores of each, which are its threads.

    Raises:
        LensteerError: a number that is not positive, or an address in another form.
    """

    address: str = LOCAL
    n: int | None = None
    gpus: float = 0.0
    cpus: int = 1

    def __post_init__(self) -> None:
        typed(self)
        if self.n is not None and self.n < 1:
            raise LensteerError(f"{self.n} actors: give at least 1")
        if not 0 <= self.gpus < math.inf or (self.gpus > 1 and self.gpus % 1):
            raise LensteerError(f"{self.gpus} GPUs per actor: give 0, a part of one such as 0.5, or a whole number")
        if self.cpus < 1:
            raise LensteerError(f"{self.cpus} CPU cores per actor: give at least 1")
        if self.address not in (LOCAL, "auto"):
            self.host_and_port  # noqa: B018  # raises

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Of a cluster's address.

        Raises:
            LensteerError: it is not HOST:PORT.
        """
        host, _, port = self.address.rpartition(":")
        if not host or "/" in host or not port.isdecimal():
            raise LensteerError(
                f"Ray address {self.address!r}: give 'local' (starts a cluster of this machine), 'auto' (the cluster "
                "that this machine is in), or its HOST:PORT; Ray's client (ray://…) is not supported: run the command "
                "on a machine of the cluster"
            )
        return host.strip("[]"), int(port)


class _Actor:
    """A process with the model. Errors come back as values, because not all exceptions can be pickled."""

    def __init__(self) -> None:
        self.model: Any = None
        self.number, self.run = -1, None

    def pid(self) -> int:
        """Its process, once it has a place."""
        return os.getpid()

    def load(self, source: Any, options: Mapping[str, Any], threads: int) -> tuple[bool, Any]:
        """Load the model; return its identity, or the error."""
        import torch

        torch.set_num_threads(threads)
        try:
            self.model = models.load_model(source, **options)
            return True, models.fingerprint(self.model).to_dict()
        except Exception as error:
            return False, _told(error)

    def work(self, number: int, boxed: list[Any], batch: Sequence[Any]) -> tuple[bool, Any]:
        """Run a batch; `boxed` is a reference to the function, which is read once per `number`."""
        import ray

        try:
            if number != self.number:
                self.number, self.run = number, ray.get(boxed[0])
            return True, self.run(self.model, batch)  # type: ignore[misc]  # set above
        except Exception as error:
            return False, _told(error)


def _told(error: Exception) -> str:
    """An error as text; those of other packages with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LensteerError) else f"{type(error).__name__}: {text}"


@dataclass(eq=False)
class _Batch:
    """A batch, or a part of one.

    Attributes:
        number: of the whole batch.
        items: of this part.
        at: index of its first item in the batch.
        deaths: of actors that had it.
    """

    number: int
    items: Sequence[Any]
    at: int = 0
    deaths: int = 0

    def halves(self) -> tuple[_Batch, _Batch]:
        """Its two halves."""
        half = len(self.items) // 2
        return (
            _Batch(self.number, self.items[:half], self.at),
            _Batch(self.number, self.items[half:], self.at + half),
        )


@dataclass
class Actors:
    """Ray actors with a model loaded, as a context manager: it connects to Ray, and disconnects whatever happens.

    Actors start with the first batch. Two sets of them in one process are one too many for Ray.

    Args:
        source: of the model, as `load_model` takes it: None, a folder or file that every machine sees, or a name on
            the hub.
        loading: other arguments of `load_model`.
        options: where actors run, and what each is given.
        announce: called with a line when actors start, or die.
    """

    source: str | None
    loading: Mapping[str, Any] = field(default_factory=dict)
    options: ActorOptions = field(default_factory=ActorOptions)
    announce: Callable[[str], object] = field(default=lambda line: None, repr=False)
    aside: list[SetAside] = field(default_factory=list, init=False)
    _live: list[Any] = field(default_factory=list, init=False, repr=False)
    _identity: Mapping[str, Any] | None = field(default=None, init=False, repr=False)
    _runs: int = field(default=0, init=False, repr=False)

    def __enter__(self) -> Actors:
        """Connect to Ray, or start it.

        Raises:
            LensteerError: Ray is not installed or runs already, the address does not answer, or there is not enough
                room for the actors.
        """
        self._handler = signal.getsignal(signal.SIGTERM)
        ray, o = _ray(), self.options
        if ray.is_initialized():
            raise LensteerError("this process is connected to Ray already: call ray.shutdown() first")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
        quiet: dict[str, Any] = dict(logging_level="error", log_to_driver=False)
        if o.address == LOCAL:
            _start_cluster(ray, **quiet, include_dashboard=False)
        else:
            if o.address != "auto":
                _check_answers(o)
            try:
                ray.init(address=o.address, **quiet)
            except Exception as error:
                raise LensteerError(
                    f"no Ray cluster at {o.address!r} ({_told(error)[:300]}): start one by `ray start --head`, give "
                    "the address of a running one, or 'local'"
                ) from error
        try:
            self.n  # noqa: B018  # raises
        except LensteerError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the actors, and the cluster if it was started here."""
        ray = _ray()
        for actor in self._live:
            ray.kill(actor)
        self._live = []
        ray.shutdown()
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)  # Ray sets its own

    @contextmanager
    def on(self, model: TransformerBridge) -> Iterator[Actors]:
        """Connect, and run the batches of a model, loaded here from the same source, on actors inside the `with`."""
        with self, self.serving(model):
            yield self

    @contextmanager
    def serving(self, model: TransformerBridge) -> Iterator[Actors]:
        """As `on`, once connected."""
        self._identity = models.fingerprint(model).to_dict()
        with pooled(model, self):
            yield self

    @cached_property
    def n(self) -> int:
        """Number of actors.

        Raises:
            LensteerError: there is not enough room for them.
        """
        o = self.options
        nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        room = sum(
            math.floor(min(has.get("CPU", 0) / o.cpus, has.get("GPU", 0) / o.gpus if o.gpus else math.inf))
            for has in nodes
        )
        wanted = o.n or room
        if not 0 < wanted <= room:
            there = "; ".join(f"{has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU" for has in nodes)
            raise LensteerError(
                f"{o.n or 'no'} actor(s) of {o.cpus} CPU core(s) and {o.gpus:g} GPU(s) each: there is room for {room} "
                f"on {len(nodes)} machine(s) ({there}); give fewer actors, or less to each"
            )
        return wanted

    def pids(self) -> list[int]:
        """Processes of the live actors; it starts them."""
        self._start()
        found: list[int] = _ray().get([actor.pid.remote() for actor in self._live])
        return found

    def run(
        self,
        run: Callable[[TransformerBridge, Sequence[Item]], Result],
        batches: Sequence[Sequence[Item]],
        name: Callable[[Item], str] | None,
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Each batch with the result of `run`, in order, as `run_batches` says.

        Raises:
            LensteerError: an item fails and `name` is None, or too many items fail; actors die one after another;
                the model cannot be loaded.
        """
        if not batches:
            return
        ray = _ray()
        self._start()
        self._runs += 1
        boxed = [ray.put(run)]
        todo = deque(_Batch(number, batch) for number, batch in enumerate(batches))
        idle, busy = deque(self._live), dict[Any, tuple[Any, _Batch]]()
        left = [len(batch) for batch in batches]  # items of each batch that are neither done nor set aside
        done: list[list[tuple[int, Sequence[Item], Result]]] = [[] for _ in batches]
        limit = max(1, int(MAX_ASIDE * sum(left)))
        n_aside = in_a_row = at = 0

        def failed(batch: _Batch, why: str) -> None:
            nonlocal n_aside
            if len(batch.items) > 1 and name is not None:
                todo.extendleft(reversed(batch.halves()))
                return
            if name is None:
                raise LensteerError(why)
            n_aside += 1
            self.aside.append(SetAside(name(batch.items[0]), why))
            left[batch.number] -= 1
            if n_aside > limit:
                raise LensteerError(
                    f"{n_aside} of {sum(map(len, batches))} items failed, so far, the last one {self.aside[-1].name!r}:"
                    f" {why}"
                )

        try:
            while at < len(batches):
                while todo and idle:
                    actor, batch = idle.popleft(), todo.popleft()
                    busy[actor.work.remote(self._runs, boxed, batch.items)] = actor, batch
                (ref,), _ = ray.wait(list(busy), num_returns=1)
                actor, batch = busy.pop(ref)
                try:
                    fine, found = ray.get(ref)
                except ray.exceptions.RayError as error:
                    in_a_row += 1
                    self._lost(actor, in_a_row, error)
                    idle += self._start()
                    batch.deaths += 1
                    if batch.deaths < DEATHS or name is None:
                        todo.appendleft(batch)
                    else:
                        failed(batch, f"{batch.deaths} actors died over it (out of memory?)")
                else:
                    in_a_row = 0
                    idle.append(actor)
                    if fine:
                        done[batch.number].append((batch.at, batch.items, found))
                        left[batch.number] -= len(batch.items)
                    else:
                        failed(batch, found)
                while at < len(batches) and not left[at]:
                    for _, items, result in sorted(done[at], key=lambda part: part[0]):
                        yield items, result
                    done[at] = []
                    at += 1
        finally:  # whoever stops early leaves actors at work
            for actor, _ in busy.values():
                self._end(actor)

    def _lost(self, actor: Any, in_a_row: int, error: Exception) -> None:
        """Take an actor out that died.

        Raises:
            LensteerError: too many died since the last batch that came back.
        """
        self._end(actor)
        said = _told(error)
        if in_a_row > DEATHS + self.n:
            raise LensteerError(f"{in_a_row} actors died one after another, the last one: {said[:500]}")
        self.announce(f"an actor died and is replaced: {said[:200]}")

    def _end(self, actor: Any) -> None:
        _ray().kill(actor)
        self._live.remove(actor)

    def _start(self) -> list[Any]:
        """Start actors up to the number of them, each with the model; return the new ones.

        Raises:
            LensteerError: there is no room within two minutes, or an actor cannot load the model, or loads another.
        """
        ray, o = _ray(), self.options
        kind = ray.remote(num_cpus=o.cpus, num_gpus=o.gpus)(_Actor)
        new = [kind.remote() for _ in range(self.n - len(self._live))]
        if not new:
            return []
        self._live += new
        try:
            placed, waiting = ray.wait([actor.pid.remote() for actor in new], num_returns=len(new), timeout=PLACE)
            if waiting:
                raise LensteerError(
                    f"{len(placed)} of {len(new)} actors got a place within {PLACE:.0f} s, of {o.cpus} CPU core(s) and "
                    f"{o.gpus:g} GPU(s) each: others use the cluster; give fewer actors, or wait"
                )
            options = dict(self.loading)
            if not o.gpus and not options.get("device") and not options.get("device_map"):
                options["device"] = "cpu"  # whatever the machine has, Ray did not give it to this actor
            for fine, found in ray.get([actor.load.remote(self.source, options, o.cpus) for actor in new]):
                if not fine:
                    raise LensteerError(f"an actor cannot load the model: {found}")
                if self._identity is not None and (odd := _differences(self._identity, found)):
                    raise LensteerError(
                        f"an actor loaded another model from {str(self.source)!r} than this process, which differs in "
                        f"{odd}: give the same files on every machine"
                    )
        except ray.exceptions.RayError as error:
            self._drop(new)
            raise LensteerError(
                f"an actor died while it loaded the model (out of memory?): {_told(error)[:500]}"
            ) from error
        except LensteerError:
            self._drop(new)
            raise
        self.announce(f"{len(new)} actor(s) with the model on {o.cpus} CPU core(s) and {o.gpus:g} GPU(s) each")
        return new

    def _drop(self, actors: Sequence[Any]) -> None:
        for actor in actors:
            self._end(actor)


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [key for key in mine if key not in ("name", "revision") and mine[key] != theirs[key]]


def _ray() -> Any:
    """The package.

    Raises:
        LensteerError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise LensteerError("Ray is not installed: it is the extra ray (pip install 'lensteer[ray]')")
    import ray

    return ray


def _start_cluster(ray: Any, **options: Any) -> None:
    """Start a cluster of this machine. Ray gives a node 30 seconds, which a busy machine may exceed.

    Raises:
        LensteerError: it does not start.
    """
    for left in range(START)[::-1]:
        try:
            ray.init(address=LOCAL, **options)
            return
        except Exception as error:
            ray.shutdown()
            if not left:
                raise LensteerError(
                    f"Ray does not start on this machine ({_told(error)[:300]}): free some of it, or give the address "
                    "of a running cluster"
                ) from error


def _check_answers(options: ActorOptions) -> None:
    """Whether anything listens there: Ray itself would try for minutes, and then end the process."""
    try:
        socket.create_connection(options.host_and_port, timeout=ANSWER).close()
    except OSError as error:
        raise LensteerError(
            f"nothing answers at the Ray address {options.address!r} ({error}): give the HOST:PORT that "
            "`ray start --head` printed, or 'local'"
        ) from error
