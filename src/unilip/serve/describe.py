"""The OpenAPI description of the API as one page of HTML that loads nothing: no script, no font, no other host."""

from collections.abc import Mapping
from typing import Any

from unilip.files import fill_page
from unilip.serve.schema import Body

LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "maxLength": "≤ {} characters",
          "maxItems": "≤ {} entries", "default": "default {!r}"}  # fmt: skip


def inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Put the definitions of a JSON schema where they are used; none of ours refers to itself."""
    definitions = schema.get("$defs", {})

    def put(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return put(definitions[part["$ref"].rpartition("/")[2]])
            return {name: put(value) for name, value in part.items() if name != "$defs"}
        return [put(one) for one in part] if isinstance(part, list) else part

    return put(schema)


def json_body(kind: type[Body]) -> dict[str, Any]:
    """Return the OpenAPI description of a body of JSON."""
    content = {"application/json": {"schema": inlined(kind.model_json_schema())}}
    return {"requestBody": {"required": True, "content": content}}


def form_body(kind: type[Body], most: Mapping[str, int]) -> dict[str, Any]:
    """Return the OpenAPI description of a form with files, by name the `most` of each; the first must be there."""
    schema = kind.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary"}
    files = {
        name: file if count == 1 else {"type": "array", "items": file, "minItems": 1, "maxItems": count}
        for name, count in most.items()
    }
    required = [*schema.get("required", ()), next(iter(most))]
    schema |= {"properties": {**schema["properties"], **files}, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def kind_of(field: Mapping[str, Any]) -> str:
    """Return the type of a field in words, with its limits."""
    texts = []
    for way in field.get("anyOf", [field]):
        if way.get("type") != "null":
            values = way.get("enum", [way["const"]] if "const" in way else [])
            what = ", ".join(map(repr, values)) or str(way.get("type", "any"))
            said = {**field, **way}
            limits = [text.format(said[name]) for name, text in LIMITS.items() if said.get(name) is not None]
            texts.append("; ".join([what, *limits]))
    return " or ".join(texts)


def page(description: Mapping[str, Any]) -> str:
    """Return the page."""
    calls = []
    for path, methods in description["paths"].items():
        for method, about in methods.items():
            content: dict[str, Any] = next(iter(about.get("requestBody", {}).get("content", {}).values()), {})
            fields = content.get("schema", {}).get("properties", {})
            rows = [(name, kind_of(field), field.get("description", "")) for name, field in fields.items()]
            calls.append((f"{method.upper()} {path}", about.get("description", ""), rows))
    return fill_page("unilip.serve", "docs.html", info=description["info"], calls=calls)
