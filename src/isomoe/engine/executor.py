"""Who runs the steps: the workers of all ranks behind one interface."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from isomoe.config import EngineConfig
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.sampler import Answer
from isomoe.engine.step import GroupOutput, Step
from isomoe.engine.worker import ExpertLoad, Worker
from isomoe.errors import EngineDeadError

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all) while rank 0 reads its weights."""


class Executor(ABC):
    """Runs steps on every rank.

    Its life: construction loads the weights, `allocate_cache` follows, then steps.
    """

    @property
    @abstractmethod
    def available_bytes(self) -> int:
        """Memory that the KV cache may take on the rank with the least."""

    @property
    @abstractmethod
    def can_capture(self) -> bool:
        """Whether steps can be captured as CUDA graphs: collectives over the host cannot."""

    @abstractmethod
    def allocate_cache(self, num_pages: int, graph_rows: tuple[int, ...] = ()) -> None:
        """Makes every rank's KV cache, and captures steps of so many rows where that can be."""

    @abstractmethod
    def launch(self, step: Step) -> None:
        """Starts a step. It runs once those before it have; `collect` brings its answers.

        Raises:
            EngineDeadError: if a rank fails; nothing can be run afterwards.
        """

    @abstractmethod
    def collect(self) -> list[GroupOutput]:
        """The answers of each attention-DP group to the oldest step that has none yet.

        Raises:
            EngineDeadError: if a rank fails; nothing can be run afterwards.
        """

    @abstractmethod
    def expert_load(self) -> list[ExpertLoad]:
        """What each rank has counted, in every step that was launched.

        Raises:
            EngineDeadError: if a rank fails; nothing can be run afterwards.
        """

    @property
    def pids(self) -> list[int]:
        """The process ids of workers that are processes of their own, in rank order."""
        return []

    def check_alive(self) -> None:
        """Raises EngineDeadError if a worker has ended between two steps."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends every worker. May be called twice."""


class LocalExecutor(Executor):
    """One rank, in this process: no sockets, no processes."""

    def __init__(
        self, config: EngineConfig, info: ModelInfo, progress: Progress | None = None
    ) -> None:
        self._worker: Worker | None = Worker(config, info, progress=progress)
        self._answers: deque[Answer] = deque()
        self._over = "the engine was shut down"

    @property
    def available_bytes(self) -> int:
        """Memory that the KV cache may take."""
        return self._alive().available_bytes()

    def allocate_cache(self, num_pages: int, graph_rows: tuple[int, ...] = ()) -> None:
        """Makes the KV cache."""
        self._alive().allocate_cache(num_pages, graph_rows)

    @property
    def can_capture(self) -> bool:
        """Whether this is a GPU."""
        return self._alive().device.type == "cuda"

    @property
    def worker(self) -> Worker:
        """The one rank."""
        return self._alive()

    def launch(self, step: Step) -> None:
        """Starts a step."""
        worker = self._alive()
        answer = self._checked(lambda: worker.launch(step.shape, step.groups[0]))
        assert answer is not None
        self._answers.append(answer)

    def collect(self) -> list[GroupOutput]:
        """The answer to the oldest step."""
        self._alive()
        return [self._checked(self._answers.popleft().wait)]

    def expert_load(self) -> list[ExpertLoad]:
        """What the one rank has counted."""
        worker = self._alive()
        return [self._checked(worker.expert_load)]

    def _checked(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            self._worker = None
            self._over = f"rank 0 raised {type(error).__name__}: {error}"
            raise EngineDeadError(self._over) from error

    def shutdown(self) -> None:
        """Lets go of the weights and the KV cache."""
        self._worker = None

    def _alive(self) -> Worker:
        if self._worker is None:
            raise EngineDeadError(self._over)
        return self._worker
