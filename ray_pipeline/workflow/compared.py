"""The keys of a comparison of methods and datasets."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from ray_pipeline.config.messages import nearest
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.variants import DataVariant
from ray_pipeline.evaluate.method_table import Reading
from ray_pipeline.training.methods import METHODS, MethodName


class BaselinesBlock(Settings):
    """The `baselines` block: every method is trained on every dataset with every seed."""

    methods: dict[MethodName, dict[str, Any]] = Field(
        default_factory=lambda: {name: dict[str, Any]() for name, method in METHODS.items() if method.trains_policy},
        min_length=1,
        description="method → overrides of the `train` block",
    )
    data: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")], DataVariant] = Field(
        min_length=1, description="name → how the dataset is made"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="every method is trained with each of them"
    )
    readings: tuple[Reading, ...] = Field(
        ("epochs",),
        min_length=1,
        description="what is equal for all datasets; each reading trains policies of its own. `epochs`: passes over "
        "the data (train.epochs); `steps`: optimiser steps, those of the reference; `rows`: training rows, each "
        "dataset being cut at random to the size of the smallest, with other rows for each seed",
    )
    reference: str | None = Field(
        None, description="the dataset that others are compared with; default: the first without a gate, else the first"
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _names(cls, methods: Any) -> Any:
        """A plain list of methods means no overrides."""
        return {name: {} for name in methods} if isinstance(methods, (list, tuple)) else methods

    def check(self) -> None:
        """Raises ValueError for a value that occurs twice, and for the name of a dataset that there is not."""
        for key, values in (("seed", self.seeds), ("reading", self.readings)):
            if len(set(values)) < len(values):
                raise ValueError(f"duplicate {key} in baselines.{key}s: {list(values)}")
        if self.reference is not None and self.reference not in self.data:
            raise ValueError(f"baselines.reference: no dataset {self.reference!r}{nearest(self.reference, self.data)}")
        for name, variant in self.data.items():
            whole = [other for other, one in self.data.items() if one.size_of is None and other != name]
            if variant.size_of is not None and variant.size_of not in whole:
                raise ValueError(
                    f"baselines.data.{name}.size_of is {variant.size_of!r}; name another dataset without size_of"
                    + nearest(variant.size_of, whole)
                )

    @property
    def compared_with(self) -> str:
        """The dataset that the others are compared with."""
        ungated = (name for name, variant in self.data.items() if not variant.gated)
        return self.reference or next(ungated, next(iter(self.data)))
