"""Versioned resources: prompts, endpoints, weights — what an algorithm improves and rollouts run against.

Resource types are open. A subclass of `Resource` that gives `resource_type` a default registers itself under it and
comes back as that class from every store. A type that nobody registered in this process survives a round trip
unchanged, as a plain `Resource` with its fields as attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from lightning.types.record import Record


class Resource(BaseModel):
    """Base of all resource types. Define your own:

    ```python
    class Weights(Resource):
        resource_type: Literal["weights"] = "weights"
        layers: list[list[float]]
    ```
    """

    # Fields of a newer release must survive being read and written back by an older one. NaN must not silently become
    # null: as itself it is refused where JSON is made.
    model_config = ConfigDict(extra="allow", ser_json_inf_nan="constants")

    resource_type: str

    _registry: ClassVar[dict[str, type[Resource]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        default = cls.model_fields["resource_type"].default
        if not isinstance(default, str):
            return  # an intermediate base class
        known = Resource._registry.get(default)
        # a class redefined in a notebook, or rebuilt by pickle in another process, replaces its former self
        if known is not None and known.__qualname__ != cls.__qualname__ and not issubclass(cls, known):
            raise TypeError(
                f"resource_type {default!r} of {cls.__qualname__} is already taken by {known.__qualname__}; "
                "choose another name"
            )
        if known is None or known.__qualname__ == cls.__qualname__:
            Resource._registry[default] = cls

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> Resource:
        """Build a resource of the class that is registered under `fields["resource_type"]`.

        Raises:
            ValueError: `resource_type` is missing, or the fields do not fit the registered class.
        """
        kind = fields.get("resource_type")
        if not isinstance(kind, str) or not kind:
            raise ValueError("a resource needs a non-empty string as its resource_type")
        return Resource._registry.get(kind, Resource).model_validate(dict(fields))


class LLM(Resource):
    """A language model behind an HTTP endpoint."""

    resource_type: Literal["llm"] = "llm"
    endpoint: str
    model: str = ""
    """Name the endpoint knows the model by; empty: the endpoint's default."""
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = Field(default_factory=dict)


class PromptTemplate(Resource):
    """A prompt with holes in it."""

    resource_type: Literal["prompt_template"] = "prompt_template"
    template: str
    engine: Literal["jinja", "f-string", "poml"] = "f-string"

    def format(self, **values: Any) -> str:
        """Fill the template.

        Raises:
            KeyError: A placeholder has no value.
            ValueError: The engine is not `"f-string"`: render the others with their own library.
        """
        if self.engine != "f-string":
            raise ValueError(f"format() renders f-string templates; this one is for {self.engine!r}")
        return self.template.format(**values)


NamedResources = dict[str, Resource]
"""Resources by the name under which agents ask for them."""


class ResourcesUpdate(Record):
    """One immutable version of a set of named resources."""

    resources_id: str
    create_time: float
    """When the first version under this id was published, in seconds since the epoch."""
    update_time: float
    """When this version was published, in seconds since the epoch."""
    version: int
    """1 for `add_resources`, then 2, 3, … for each `update_resources`."""
    resources: NamedResources
