"""Adapters read beside the engine's steps: taken once, in the place of a read, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.lora.request import LoRARequest

from safelora_vllm.errors import AdapterRefused, EngineUnavailable, GuardError, StoreUnavailable
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.server import engine as engine_side
from safelora_vllm.integration.server.engine import Pool
from safelora_vllm.integration.worker import guard as guarded
from safelora_vllm.integration.worker import lora_manager, read_ahead
from safelora_vllm.integration.worker.lora_manager import GuardedLoRAManager, prepare
from safelora_vllm.integration.worker.read_ahead import ReadAhead

CPU = torch.device("cpu")
KEY = "a" * 64
SECONDS = 20.0


def request(number: int = 1, path: str = f"safelora://{KEY}") -> Any:
    """As an API server makes it."""
    return LoRARequest(lora_name=f"adapter{number}", lora_int_id=number, lora_path=path)


class Reader:
    """What reads; it waits until `go` is set."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.read: list[int] = []

    def __call__(self, asked: Any) -> Any:
        self.began.set()
        assert self.go.wait(SECONDS)
        self.read.append(asked.lora_int_id)
        if asked.lora_name == "adapter13":
            raise StoreUnavailable("gone")
        return SimpleNamespace(id=asked.lora_int_id)


@pytest.fixture
def reader() -> Iterator[Reader]:
    """Ends waiting when the test ends."""
    found = Reader()
    yield found
    found.go.set()


def ended(ahead: ReadAhead, asked: Any) -> None:
    """Wait until it was read."""
    end = threading.Event()
    for _ in range(2_000):
        if ahead.begin(asked):
            return
        end.wait(0.01)
    pytest.fail("it is not read")


def test_it_is_read_once_beside_who_asks_and_taken_once(reader: Reader) -> None:
    ahead = ReadAhead(reader, CPU)
    assert not ahead.begin(request()) and not ahead.begin(request())
    reader.go.set()
    ended(ahead, request())
    assert ahead.take(request()).id == 1
    assert ahead.take(request()) is None
    assert reader.read == [1]


@pytest.mark.parametrize("other", [request(2), request(1, f"safelora://{KEY}/1"), request(1, "safelora://b")])
def test_another_request_is_not_given_what_was_read(other: Any, reader: Reader) -> None:
    ahead = ReadAhead(reader, CPU)
    reader.go.set()
    ended(ahead, request())
    assert ahead.take(other) is None and ahead.take(request()) is not None


def test_what_is_being_read_is_not_waited_for(reader: Reader) -> None:
    ahead = ReadAhead(reader, CPU)
    ahead.begin(request())
    assert reader.began.wait(SECONDS)
    ahead.begin(request(2))  # in the queue behind it
    assert ahead.take(request()) is None and ahead.take(request(2)) is None
    reader.go.set()
    ended(ahead, request(3))
    assert reader.read == [1, 3]


def test_a_load_waits_for_a_quick_read_and_for_no_other(reader: Reader) -> None:
    ahead = ReadAhead(reader, CPU)
    with pytest.raises(StoreUnavailable, match="adapter1 has not been read yet; load it again"):
        ahead.read(request(), 0.01)
    threading.Timer(0.05, reader.go.set).start()
    assert ahead.read(request(), SECONDS).id == 1  # the read that had begun, not another one
    assert reader.read == [1]
    assert ahead.read(request(), SECONDS).id == 1
    assert reader.read == [1, 1]  # what was taken is not kept


def test_a_load_is_told_what_is_wrong_and_the_next_one_reads_again(reader: Reader) -> None:
    ahead = ReadAhead(reader, CPU)
    reader.go.set()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="gone"):
            ahead.read(request(13), SECONDS)
    assert reader.read == [13, 13]


def test_a_load_that_finds_no_room_does_not_wait(reader: Reader) -> None:
    ahead = ReadAhead(reader, CPU)
    for number in range(1, 5):
        ahead.begin(request(number))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="adapter5 has not been read yet"):
        ahead.read(request(5), SECONDS)
    assert time.monotonic() - began < SECONDS / 2


def test_what_cannot_be_read_is_said_to_be_ready_and_left_to_the_load(reader: Reader) -> None:
    ahead = ReadAhead(reader, CPU)
    reader.go.set()
    ended(ahead, request(13))
    assert ahead.take(request(13)) is None


def test_few_are_kept_and_none_that_somebody_asks_for_is_dropped(reader: Reader) -> None:
    """Whoever is the fifth waits. Dropped for it, the first would be read again, and so on without end."""
    ahead = ReadAhead(reader, CPU)
    for _ in range(3):
        assert not any(ahead.begin(request(number)) for number in range(1, 9))
    reader.go.set()
    waiting = set(range(1, 9))
    end = time.monotonic() + SECONDS
    while waiting and time.monotonic() < end:
        for number in sorted(waiting):
            if ahead.begin(request(number)) and ahead.take(request(number)) is not None:
                waiting.remove(number)
    assert not waiting and sorted(reader.read) == list(range(1, 9))


def test_what_nobody_asks_for_any_more_is_dropped(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(read_ahead, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ahead = ReadAhead(reader, CPU)
    reader.go.set()
    for number in range(1, 5):
        ended(ahead, request(number))
    now[0] += 9.0
    ended(ahead, request(4))
    assert not ahead.begin(request(5))
    now[0] += 1.5
    ended(ahead, request(5))
    assert [number for number in range(1, 6) if ahead.take(request(number))] == [4, 5]
    assert ahead._asked == ahead._reads == {}


def test_its_thread_uses_the_workers_device(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    """Pinned memory belongs to a device; without this all ranks would open the first one."""
    used: list[Any] = []
    monkeypatch.setattr(read_ahead, "current_platform", SimpleNamespace(set_device=used.append))
    reader.go.set()
    for device in (torch.device("cuda:1"), CPU):
        ahead = ReadAhead(reader, device)
        ended(ahead, request())
        assert ahead.take(request()) is not None
    assert used == [torch.device("cuda:1")]


class Guard:
    """A guard of one copy, which some reads find exchanged."""

    def __init__(self, exchanged: int) -> None:
        self.exchanged, self.resolved = exchanged, 0
        self.forgotten: list[str] = []

    def resolve(self, _asked: Any) -> str:
        self.resolved += 1
        return KEY

    def folder(self, key: str) -> str:
        assert key == KEY
        return "/published/copy"

    def forget(self, key: str) -> None:
        self.forgotten.append(key)

    def still_sound(self, key: str) -> bool:
        self.exchanged -= 1
        return key == KEY and self.exchanged < 0


def manager(guard: Guard) -> Any:
    """With nothing of vLLM."""
    made: Any = object.__new__(GuardedLoRAManager)
    made.guard, made._in_step = guard, False
    made.read_ahead, made.counts = (
        ReadAhead(made._read, CPU),
        SimpleNamespace(change=lambda *_: nullcontext()),
    )
    return made


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """What vLLM is asked to load. A busy machine may take long for it."""
    monkeypatch.setattr(lora_manager, "_LOAD_SECONDS", SECONDS)
    found: list[tuple[str, int, str]] = []

    def load(_: Any, asked: Any) -> Any:
        found.append((asked.lora_name, asked.lora_int_id, asked.lora_path))
        return SimpleNamespace(id=asked.lora_int_id)

    monkeypatch.setattr(seams, "load_published", load)
    return found


def test_only_a_load_by_the_api_server_is_bounded(
    loads: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder of an offline load may take its time, and an evicted adapter has requests that wait."""
    monkeypatch.setattr(lora_manager, "_LOAD_SECONDS", 0.0)
    made = manager(Guard(0))
    made.read_ahead._thread.submit(time.sleep, 0.5)
    monkeypatch.setattr(
        lora_manager.LRUCacheWorkerLoRAManager, "add_adapter", GuardedLoRAManager._load_adapter
    )
    with pytest.raises(StoreUnavailable, match="adapter1 has not been read yet"):
        made._load_adapter(request(1))
    with caplog.at_level("INFO", "vllm.safelora.worker"):
        assert made.add_adapter(request(1)) is False, "an error would be one of the engine's in vLLM's log"
    (line,) = caplog.records
    assert (line.levelname, line.adapter, line.copy) == ("INFO", "adapter1", f"safelora://{KEY}")  # type: ignore[attr-defined]
    assert made._load_adapter(request(2, "/a/folder")).id == 2
    made._in_step = True
    assert made._load_adapter(request(3)).id == 3
    assert [number for _, number, _ in loads] == [2, 3]


@pytest.mark.parametrize("ahead", [False, True], ids=["in the step", "ahead"])
def test_a_load_is_of_the_published_copy_and_read_ahead_it_is_not_read_again(
    ahead: bool, loads: list[Any]
) -> None:
    made = manager(Guard(0))
    if ahead:
        ended(made.read_ahead, request(7))
    assert made._load_adapter(request(7)).id == 7
    assert loads == [("adapter7", 7, "/published/copy")]


@pytest.mark.parametrize("exchanged", [0, 1, 2])
def test_a_copy_that_is_exchanged_while_it_is_read_is_not_served(exchanged: int, loads: list[Any]) -> None:
    """It is checked and read once more; not a third time."""
    made = manager(Guard(exchanged))
    if exchanged < 2:
        assert made._load_adapter(request()).id == 1
        assert len(loads) == made.guard.resolved == exchanged + 1
    else:
        with pytest.raises(StoreUnavailable, match="adapter1 changes while it is read; load it again"):
            made._load_adapter(request())


def test_a_worker_is_asked_to_read_and_says_when_it_has(loads: list[Any]) -> None:
    made = manager(Guard(0))
    made.list_adapters = set
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=made))
    end = threading.Event()
    while not prepare(worker, "adapter5", 5, f"safelora://{KEY}"):
        end.wait(0.01)
    assert made.read_ahead.take(request(5)).id == 5
    assert loads == [("adapter5", 5, "/published/copy")]


def test_a_copy_that_cannot_be_read_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk has lost does not show in a file's state."""

    def load(*_: Any) -> Any:
        raise OSError("I/O error")

    monkeypatch.setattr(seams, "load_published", load)
    made = manager(Guard(0))
    with pytest.raises(OSError, match="I/O error"):
        made._load_adapter(request())
    assert made.guard.forgotten == [KEY]


def test_what_is_loaded_is_in_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays mapped would be read within a step, and end the worker where the file is cut meanwhile."""
    sides = [torch.ones(2, 3), torch.ones(4, 2), torch.ones(1), None]
    layers = {
        "plain": SimpleNamespace(lora_a=sides[0], lora_b=sides[1]),
        "stacked": SimpleNamespace(lora_a=[sides[2], None], lora_b=[sides[2]]),
    }
    monkeypatch.setattr(seams, "_original_load", lambda *_: SimpleNamespace(loras=layers))
    model = seams.load_published(None, request())
    for side in sides[:3]:
        assert side is not None
        side.zero_()
    plain, stacked = model.loras["plain"], model.loras["stacked"]
    assert plain.lora_a.sum() == 6 and plain.lora_b.sum() == 8
    assert stacked.lora_a[0] == stacked.lora_b[0] == 1 and stacked.lora_a[1] is None


def test_a_device_that_torch_does_not_know_is_named() -> None:
    assert guarded._device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(GuardError, match="gate_device is 'nonsense:1', which torch does not know; try cpu"):
        guarded._device("nonsense:1")


Make = Callable[[], Any]


@pytest.mark.parametrize(
    ("worker", "path"),
    [
        (lambda: SimpleNamespace(), f"safelora://{KEY}"),
        (lambda: SimpleNamespace(model_runner=None), f"safelora://{KEY}"),
        (lambda: SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager(Guard(0)))), "/etc"),
    ],
    ids=["no runner", "no LoRA", "a path that names no copy"],
)
def test_a_worker_that_cannot_never_answers_with_an_error(worker: Make, path: str, loads: list[Any]) -> None:
    """One rank's error would be taken for the answer to another question."""
    assert prepare(worker(), "x", 1, path) is True
    assert loads == []


def test_what_is_in_the_pool_is_not_read(loads: list[Any]) -> None:
    made = manager(Guard(0))
    made.list_adapters = lambda: {5}
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=made))
    assert prepare(worker, "adapter5", 5, f"safelora://{KEY}") is True
    assert loads == [] and made.read_ahead.take(request(5)) is None


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, "cuda:0", ("cuda:0", {"VISIBLE": "0"})),
        (None, "cuda:3", ("cuda:0", {"VISIBLE": "3"})),
        ("", "cuda:1", ("cuda:0", {"VISIBLE": "1"})),
        ("4,6", "cuda:1", ("cuda:0", {"VISIBLE": "6"})),
        ("GPU-a, GPU-b", "cuda:1", ("cuda:0", {"VISIBLE": "GPU-b"})),
        ("4,6", "cpu", ("cpu", {})),
        ("4,6", "cuda", ("cuda", {})),
        ("4,6", "xpu:1", ("xpu:1", {})),
    ],
)
def test_the_gate_sees_the_workers_device_only(
    visible: str | None, device: str, expected: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "current_platform", SimpleNamespace(device_control_env_var="VISIBLE"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("VISIBLE", raising=False)
    if visible is not None:
        monkeypatch.setenv("VISIBLE", visible)
    assert guarded._only_device(torch.device(device)) == expected


@pytest.mark.parametrize(("visible", "count"), [(None, 4), ("4,6", 2)])
def test_a_device_that_the_worker_does_not_see_is_refused(
    visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "current_platform", SimpleNamespace(device_control_env_var="VISIBLE"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("VISIBLE", raising=False)
    if visible is not None:
        monkeypatch.setenv("VISIBLE", visible)
    with pytest.raises(GuardError, match=f"cuda:{count}, but this worker sees {count} devices"):
        guarded._only_device(torch.device("cuda", count))


class Engine:
    """vLLM's ``EngineClient`` with two data-parallel engines, of two workers and of one."""

    errored = False

    def __init__(
        self, answers: list[list[bool] | Exception], results: Sequence[Exception | bool] = ()
    ) -> None:
        self.answers, self.results = iter(answers), [*results]
        self.asked: list[Any] = []
        self.core_engines, self.engine_core = (0, 1), self

    async def _call_utility_async(self, *arguments: object, engine: int) -> Any:
        self.asked.append((engine, *arguments))
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def add_lora(self, loaded: Any) -> bool:
        self.asked.append(loaded.lora_int_id)
        result = self.results.pop(0) if self.results else True
        if isinstance(result, Exception):
            raise result
        return result


CALL = ("collective_rpc", "safelora_prepare", None, ("adapter1", 1, f"safelora://{KEY}"), None)


@pytest.mark.parametrize(
    ("answers", "looks"),
    [
        ([[True, True], [True]], 1),
        ([[True, False], [True], [True, True], [True]], 2),
        ([[True, True], [False], [False, False], [False], [True, True], [True]], 3),
        ([RuntimeError("no such method"), [False]], 1),
    ],
    ids=["at once", "one worker is not ready", "one engine is not ready", "workers that cannot"],
)
def test_a_load_follows_when_all_workers_have_read(
    answers: list[list[bool] | Exception], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_side, "_READ_POLL_SECONDS", 1e-4)
    engine = Engine(answers)
    pool = Pool(engine, cast(Any, None))
    asyncio.run(pool.load(request()))
    assert engine.asked == [(0, *CALL), (1, *CALL)] * looks + [1]


READ = [(0, *CALL), (1, *CALL)]


@pytest.mark.parametrize(
    ("nbytes", "results", "asked"),
    [
        (4 * 1024**2, [], [1]),
        (4 * 1024**2, [False], [1, *READ, 1]),
        (4 * 1024**2, [RuntimeError("of another engine: has not been read yet")], [1, *READ, 1]),
        (4 * 1024**2 + 1, [], [*READ, 1]),
    ],
    ids=["small", "small, but it takes long", "small, but the second engine takes long", "large"],
)
def test_a_small_adapter_is_loaded_with_one_question(
    nbytes: int, results: list[Exception | bool], asked: list[Any]
) -> None:
    """Each question waits for a step of the engine."""
    engine = Engine([[True, True], [True]], results)
    asyncio.run(Pool(engine, cast(Any, None)).load(request(), nbytes))
    assert engine.asked == asked


def test_what_is_wrong_with_a_small_adapter_is_said() -> None:
    engine = Engine([[True, True], [True]], [RuntimeError("first"), RuntimeError("no room")])
    with pytest.raises(AdapterRefused, match="vLLM cannot load the adapter: no room"):
        asyncio.run(Pool(engine, cast(Any, None)).load(request(), 1))


def test_an_adapter_that_is_not_read_in_time_is_unavailable() -> None:
    engine = Engine([[True, True], [True]], [False, False])
    with pytest.raises(StoreUnavailable, match="adapter1 has not been read in time; load it again"):
        asyncio.run(Pool(engine, cast(Any, None)).load(request(), 1))


def test_an_engine_that_has_ended_is_not_asked_again() -> None:
    engine = Engine([], [RuntimeError("dead")])
    engine.errored = True
    with pytest.raises(EngineUnavailable, match="the engine has ended: dead"):
        asyncio.run(Pool(engine, cast(Any, None)).load(request(), 1))
    assert engine.asked == [1]


def test_a_store_that_hangs_does_not_stop_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load would wait for it between two steps, and every stream with it."""
    monkeypatch.setattr(engine_side, "_READ_POLL_SECONDS", 0.01)
    monkeypatch.setattr(engine_side, "_READ_SECONDS", 0.05)
    engine = Engine([[False]] * 1000)
    with pytest.raises(
        StoreUnavailable, match="have not read adapter1 from the adapter store in 0 s, and it is"
    ):
        asyncio.run(Pool(engine, cast(Any, None)).load(request()))
    assert set(engine.asked) == {(0, *CALL), (1, *CALL)}  # it was never loaded


def test_the_pause_grows_to_its_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    engine = Engine([[False]] * 20 + [[True]] * 2)
    asyncio.run(Pool(engine, cast(Any, None)).load(request()))
    assert pauses == [0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.1, 0.1, 0.1, 0.1]
