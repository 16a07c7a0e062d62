"""Named resources to messages and back. Types that this process does not know pass through unchanged."""

from __future__ import annotations

from collections.abc import Iterable

from lightningpb.v1 import resources_pb2

from lightning.codec.building import build, construct, decode_object
from lightning.types import NamedResources, Resource, ResourcesUpdate, encode_payload


def resources_to_proto(resources: NamedResources) -> list[resources_pb2.NamedResource]:
    """Encode resources in their order.

    Raises:
        TypeError: Not a dict of names to `Resource` objects.
        ValueError: A field holds what JSON cannot; the message names the path, as `resources["llm"]["temperature"]`.
    """
    if not isinstance(resources, dict):
        raise TypeError(
            f"resources must be a dict of names to Resource objects, not {type(resources).__name__}"
        )
    return [_resource_to_proto(name, resource) for name, resource in resources.items()]


def resources_from_proto(messages: Iterable[resources_pb2.NamedResource]) -> NamedResources:
    """Decode resources, each into the class that is registered for its type.

    Raises:
        ValueError: A name comes twice, or a resource is no JSON object, contradicts its type or misfits its class.
    """
    resources: NamedResources = {}
    for message in messages:
        if message.name in resources:
            raise ValueError(f'resources names "{message.name}" twice')
        resources[message.name] = _resource_from_proto(message)
    return resources


def update_to_proto(update: ResourcesUpdate) -> resources_pb2.ResourcesUpdate:
    """Encode one version of resources. Raises as `resources_to_proto`."""
    return build(
        resources_pb2.ResourcesUpdate,
        resources_id=update.resources_id,
        version=update.version,
        create_time=update.create_time,
        update_time=update.update_time,
        resources=resources_to_proto(update.resources),
    )


def update_from_proto(message: resources_pb2.ResourcesUpdate) -> ResourcesUpdate:
    """Decode one version of resources. Raises as `resources_from_proto`."""
    return construct(
        ResourcesUpdate,
        {
            "resources_id": message.resources_id,
            "create_time": message.create_time,
            "update_time": message.update_time,
            "version": message.version,
            "resources": resources_from_proto(message.resources),
        },
    )


def _resource_to_proto(name: str, resource: Resource) -> resources_pb2.NamedResource:
    if not isinstance(name, str):
        raise TypeError(f"resources has the key {name!r}; names must be strings")
    if not isinstance(resource, Resource):
        raise TypeError(f'resources["{name}"] is a {type(resource).__name__}, not a Resource')
    return build(
        resources_pb2.NamedResource,
        name=name,
        resource_type=resource.resource_type,
        # in JSON mode, so that fields such as a datetime become text that their class reads back
        value_json=encode_payload(resource.model_dump(mode="json"), f'resources["{name}"]'),
    )


def _resource_from_proto(message: resources_pb2.NamedResource) -> Resource:
    path = f'resources["{message.name}"]'
    fields = decode_object(message.value_json, path)
    if fields.setdefault("resource_type", message.resource_type) != message.resource_type:
        raise ValueError(
            f"{path} is announced as {message.resource_type!r} but is a {fields['resource_type']!r}"
        )
    return Resource.from_fields(fields)
