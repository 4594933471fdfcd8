"""Models: what a service answers from, looked up by name anew for every request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moon.runtime.predictor import Predictor
from moon.serve.engine import Engine
from moon.serve.metrics import Figures, Metrics
from moon.serve.problem import Problem
from moon.serve.settings import Settings

__all__ = ["Model", "Models"]


@dataclass(frozen=True)
class Model:
    """One version of one model, with the queue in front of it.

    Attributes:
        name: what clients call it.
        engine: reads and decides.
        figures: count what it decides.
    """

    name: str
    engine: Engine
    figures: Figures

    @classmethod
    def of(cls, name: str, predictor: Predictor, settings: Settings, metrics: Metrics) -> Model:
        """A model behind a predictor."""
        figures = metrics.figures(name, predictor, settings)
        engine = Engine(
            predictor,
            threads=settings.threads,
            limits=settings.limits,
            on_batch=figures.batched,
        )
        return cls(name, engine, figures)

    @property
    def version(self) -> str:
        """Of its bundle, ``sha256:...``."""
        return self.engine.predictor.bundle.manifest.version

    @property
    def facts(self) -> dict[str, str]:
        """Name and version, as answers tell them."""
        return {"name": self.name, "version": self.version}

    def close(self) -> None:
        """Let running work end, and take no more."""
        self.engine.close()
        self.figures.close()


class Models:
    """The models of one worker.

    A request keeps the `Model` that it was given to its end, so that what stands behind a name
    may change between two requests.

    Args:
        models: at least one, of different names; the first answers where none is named.
        metrics: show the drift tests of what answers now.
    """

    def __init__(self, models: Iterable[Model], metrics: Metrics) -> None:
        self._metrics = metrics
        self._models: dict[str, Model] = {}
        for model in models:
            self.put(model)
        self._first = next(iter(self._models))

    def __iter__(self) -> Iterator[Model]:
        return iter(tuple(self._models.values()))

    def put(self, model: Model) -> Model | None:
        """Answer from this model from now on.

        Returns:
            The one of that name until now, which may still have requests.
        """
        before = self._models.get(model.name)
        self._models[model.name] = model
        self._metrics.watch(model.figures)
        return before

    def get(self, name: str | None = None, version: str | None = None) -> Model:
        """The model of a name, at present.

        Args:
            name: None for the first.
            version: None for whichever there is.

        Raises:
            Problem: 404, there is none.
        """
        model = self._models.get(self._first if name is None else name)
        if model is None:
            raise Problem(404, "no-such-model", f"There is no model called {str(name)[:100]!r}.")
        if version not in (None, model.version):
            detail = f"The model {model.name!r} has the version {model.version!r} only."
            raise Problem(404, "no-such-model", detail)
        return model

    @property
    def working(self) -> bool:
        """Whether no engine hangs."""
        return not any(model.engine.stuck for model in self)

    def warm_up(self) -> None:
        """Make every model's first decisions."""
        for model in self:
            model.engine.warm_up()

    def close(self) -> None:
        """Let running work end, and take no more."""
        for model in self:
            model.close()
