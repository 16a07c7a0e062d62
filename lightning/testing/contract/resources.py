"""Resources: every version stays readable, and any type survives."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import UNKNOWN_RESOURCES, StoreTheme, everything, refused
from lightning.types import LLM, PromptTemplate, Resource, ResourcesUpdate


class Layer(BaseModel):
    """Part of a resource type of a user's own."""

    width: int
    weights: list[float]


class Network(Resource):
    """A resource type of a user's own."""

    resource_type: Literal["lightning-testing/network"] = "lightning-testing/network"
    layers: list[Layer]
    note: str | None = None


def prompt(template: str) -> dict[str, Resource]:
    """Resources that are just one prompt."""
    return {"prompt": PromptTemplate(template=template)}


def template_of(update: ResourcesUpdate | None) -> str:
    """The prompt in resources made by `prompt`."""
    assert update is not None
    resource = update.resources["prompt"]
    assert isinstance(resource, PromptTemplate)
    return resource.template


class ResourcesContract(StoreTheme):
    """`add_resources`, `update_resources` and their look-ups."""

    async def test_at_first_there_are_none(self, store: LightningStore) -> None:
        assert await store.get_latest_resources() is None
        assert await store.get_resources_by_id(UNKNOWN_RESOURCES) is None
        assert await store.get_resources_by_id(UNKNOWN_RESOURCES, 1) is None

    async def test_added_resources_are_version_one_and_the_latest(self, store: LightningStore) -> None:
        first = await store.add_resources(prompt("one"))
        second = await store.add_resources(prompt("two"))
        assert (first.version, second.version) == (1, 1)
        assert first.resources_id != second.resources_id
        assert first.resources_id.startswith("rs-")
        assert first.update_time >= first.create_time > 0
        assert await store.get_latest_resources() == second
        assert await store.get_resources_by_id(first.resources_id) == first
        assert await store.get_resources_by_id(first.resources_id, 1) == first
        assert await store.get_resources_by_id(first.resources_id, 2) is None
        assert await store.get_resources_by_id(first.resources_id, 0) is None

    async def test_an_update_is_the_next_version_and_the_latest(self, store: LightningStore) -> None:
        first = await store.add_resources(prompt("one"))
        other = await store.add_resources(prompt("other"))
        second = await store.update_resources(first.resources_id, prompt("two"))
        assert (second.resources_id, second.version) == (first.resources_id, 2)
        assert second.create_time == first.create_time
        assert second.update_time >= first.update_time
        assert await store.get_latest_resources() == second
        assert await store.get_resources_by_id(first.resources_id) == second
        assert await store.get_resources_by_id(other.resources_id) == other

    async def test_every_version_stays_readable(self, store: LightningStore) -> None:
        first = await store.add_resources(prompt("1"))
        for version in range(2, 6):
            await store.update_resources(first.resources_id, prompt(str(version)))
        for version in range(1, 6):
            found = await store.get_resources_by_id(first.resources_id, version)
            assert found is not None
            assert (found.version, template_of(found)) == (version, str(version))
        assert await store.get_resources_by_id(first.resources_id, 6) is None

    async def test_a_rollback_is_a_look_up(self, store: LightningStore) -> None:
        first = await store.add_resources(prompt("good"))
        await store.update_resources(first.resources_id, prompt("bad"))
        good = await store.get_resources_by_id(first.resources_id, 1)
        assert good is not None
        back = await store.update_resources(first.resources_id, good.resources)
        assert (back.version, template_of(back)) == (3, "good")

    async def test_an_update_replaces_all_names(self, store: LightningStore) -> None:
        first = await store.add_resources({**prompt("one"), "llm": LLM(endpoint="http://localhost")})
        second = await store.update_resources(first.resources_id, prompt("two"))
        assert list(second.resources) == ["prompt"]

    async def test_an_update_of_unknown_resources_is_refused(self, store: LightningStore) -> None:
        await store.add_resources(prompt("one"))
        before = await everything(store)
        with refused(ValueError, UNKNOWN_RESOURCES):
            await store.update_resources(UNKNOWN_RESOURCES, prompt("two"))
        assert await everything(store) == before

    async def test_resources_may_be_empty(self, store: LightningStore) -> None:
        empty = await store.add_resources({})
        assert empty.resources == {}
        assert await store.get_latest_resources() == empty

    # --- Types ---

    async def test_built_in_types_survive(self, store: LightningStore) -> None:
        resources: dict[str, Resource] = {
            "z": LLM(
                endpoint="http://localhost:1/v1",
                model="m",
                api_key="secret",
                sampling_parameters={"temperature": 0.7, "stop": ["\n"], "n": 1, "logit_bias": {"5.1": None}},
            ),
            "a": PromptTemplate(template="Say {word} völlig\x00", engine="jinja"),
        }
        added = await store.add_resources(resources)
        for update in (added, await store.get_latest_resources()):
            assert update is not None
            assert update.resources == resources
            assert list(update.resources) == ["z", "a"]
            assert [type(resource) for resource in update.resources.values()] == [LLM, PromptTemplate]

    async def test_a_registered_type_survives(self, store: LightningStore) -> None:
        network = Network(layers=[Layer(width=2, weights=[0.1, -0.0])], note=None)
        await store.add_resources({"net": network})
        latest = await store.get_latest_resources()
        assert latest is not None
        found = latest.resources["net"]
        assert type(found) is Network
        assert found == network

    async def test_a_type_that_nobody_registered_survives(self, store: LightningStore) -> None:
        fields: dict[str, Any] = {
            "resource_type": "lightning-testing/nobody-registered-this",
            "layers": [1, 1.0, None, {"deep": [True]}],
            "url": "völlig\x00",
        }
        await store.add_resources({"thing": Resource.model_validate(fields)})
        latest = await store.get_latest_resources()
        assert latest is not None
        assert latest.resources["thing"].model_dump() == fields
        await store.update_resources(latest.resources_id, latest.resources)
        again = await store.get_latest_resources()
        assert again is not None
        assert again.resources["thing"].model_dump() == fields

    async def test_what_is_no_resource_is_refused(self, store: LightningStore) -> None:
        added = await store.add_resources(prompt("one"))
        before = await everything(store)
        for mentions, bad in (
            ('resources["x"]', {"x": {"resource_type": "llm"}}),
            ("5", {5: LLM(endpoint="")}),
        ):
            resources: Any = bad
            with refused(TypeError, mentions):
                await store.add_resources(resources)
            with refused(TypeError, mentions):
                await store.update_resources(added.resources_id, resources)
        assert await everything(store) == before

    async def test_a_field_that_cannot_be_stored_is_refused(self, store: LightningStore) -> None:
        added = await store.add_resources(prompt("one"))
        before = await everything(store)
        resources: dict[str, Resource] = {
            "llm": LLM(endpoint="x", sampling_parameters={"top_p": [float("nan")]})
        }
        with refused(ValueError, 'resources["llm"]', "top_p"):
            await store.add_resources(resources)
        with refused(ValueError, 'resources["llm"]', "top_p"):
            await store.update_resources(added.resources_id, resources)
        assert await everything(store) == before

    # --- Copies ---

    async def test_resources_are_copies(self, store: LightningStore) -> None:
        llm = LLM(endpoint="http://localhost", sampling_parameters={"stop": ["a"]})
        resources: dict[str, Resource] = {"llm": llm}
        added = await store.add_resources(resources)
        llm.sampling_parameters["stop"].append("b")
        resources["other"] = llm
        for update in (
            added,
            await store.get_latest_resources(),
            await store.get_resources_by_id(added.resources_id),
            (await store.query_resources())[0],
        ):
            assert update is not None
            assert list(update.resources) == ["llm"]
            found = update.resources["llm"]
            assert isinstance(found, LLM)
            assert (found.endpoint, found.sampling_parameters) == ("http://localhost", {"stop": ["a"]})
            found.endpoint = "scribbled"
            found.sampling_parameters["stop"].append("c")
            update.resources["other"] = found
