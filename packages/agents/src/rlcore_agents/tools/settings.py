"""Settings of tools and of the environment `tools`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, GetJsonSchemaHandler, JsonValue, Tag, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rlcore.config import Config, FileName, FilePath, Seconds
from rlcore.object_path import checked_object_path
from rlcore_agents.environment.settings import EnvironmentSettings
from rlcore_agents.tools.tool import MAX_CHARACTERS, TIMEOUT_S
from rlcore_kit.sandbox.settings import SandboxLimits

Characters = Annotated[int, Field(ge=100)]


class TextForm(Config):
    """Settings that may be written as a text (`from_text`).

    Attributes:
        text_schema: the JSON Schema of that text.
    """

    text_schema: ClassVar[JsonSchemaValue] = {"type": "string"}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [super().__get_pydantic_json_schema__(core_schema, handler), cls.text_schema]}


class CalculatorSettings(TextForm):
    """`calculator`: arithmetic."""

    text_schema: ClassVar = {"const": "calculator"}

    name: Literal["calculator"] = Field("calculator", description="The tool.")

    @classmethod
    def from_text(cls, text: str) -> Mapping[str, Any]:
        """Return the values that a text in place of a section means."""
        return {"name": text}


class InterpreterSettings(CalculatorSettings):
    """`python`: an interpreter in a sandbox, one per episode."""

    text_schema: ClassVar = {"const": "python"}

    name: Literal["python"] = Field("python", description="The tool.")  # type: ignore[assignment]
    limits: SandboxLimits = Field(SandboxLimits(), description="What the code may use.")
    max_characters: Characters = Field(MAX_CHARACTERS, description="Characters of an answer that the policy sees.")


class RetrievalSettings(CalculatorSettings):
    """`retrieval`: the tool search over a local corpus, by BM25."""

    text_schema: ClassVar = {"const": "retrieval"}

    name: Literal["retrieval"] = Field("retrieval", description="The tool.")  # type: ignore[assignment]
    corpus: FilePath = Field(
        description="JSONL or Parquet file of passages, or a folder of .txt and .md files, one passage each."
    )
    column: str = Field("text", description="Column of the passages.")
    results: int = Field(3, ge=1, le=20, description="Passages of an answer, unless the policy asks for others.")
    max_characters: Characters = Field(MAX_CHARACTERS, description="Characters of an answer that the policy sees.")


class FunctionSettings(TextForm):
    """A function with type hints, or a class whose objects can be called: one object per episode, closed with it."""

    text_schema: ClassVar = {"type": "string", "pattern": ":"}

    path: FileName = Field(description="'file.py:name' or 'package.module:name'.")
    name: str = Field("", description="Name for the policy; that of the function when empty.")
    kwargs: dict[str, JsonValue] = Field({}, description="Keyword arguments of the class.")
    timeout_s: Seconds = Field(TIMEOUT_S, gt=0, description="Timeout of a call in seconds.")
    max_characters: Characters = Field(MAX_CHARACTERS, description="Characters of an answer that the policy sees.")

    @classmethod
    def from_text(cls, text: str) -> Mapping[str, Any]:
        """Return the values that a text in place of a section means."""
        return {"path": text}

    @field_validator("path")
    @classmethod
    def _names_an_object(cls, path: str) -> str:
        return checked_object_path(path)


SHIPPED = ("calculator", "python", "retrieval")


def _kind(value: Any) -> str | None:
    """Return which of the models `ToolEntry` a value is to be."""
    if isinstance(value, str):
        return value if value in SHIPPED else "function" if ":" in value else None
    get = value.get if isinstance(value, Mapping) else lambda key: getattr(value, key, None)
    if get("path") is not None:
        return "function"
    return name if (name := get("name")) in SHIPPED else None


ToolEntry = Annotated[
    Annotated[CalculatorSettings, Tag("calculator")]
    | Annotated[InterpreterSettings, Tag("python")]
    | Annotated[RetrievalSettings, Tag("retrieval")]
    | Annotated[FunctionSettings, Tag("function")],
    Discriminator(
        _kind,
        custom_error_type="tool",
        custom_error_message="a tool is calculator, python, {name: retrieval, corpus: …}, or the path of a function "
        "(my_tools.py:search)",
    ),
]


class McpServer(TextForm):
    """A server of tools that speaks the Model Context Protocol."""

    command: tuple[str, ...] = Field((), description="Program and arguments of a server over stdio, which is started.")
    url: str = Field("", description="URL of a server over streamable HTTP.")
    env: dict[str, str] = Field(
        {}, description="Environment variables of the program, besides PATH, HOME and the like."
    )
    headers: dict[str, str] = Field({}, description="HTTP headers of requests.")
    scope: Literal["process", "episode"] = Field(
        "process", description="What a connection is for; an episode's own server keeps state apart from others."
    )
    only: tuple[str, ...] = Field((), description="Names of the tools to offer; all when empty.")
    prefix: str = Field("", pattern="[A-Za-z0-9_-]*", description="What is put before names of tools.")
    start_timeout_s: Seconds = Field(30.0, gt=0, description="Timeout of starting, connecting and listing tools.")
    timeout_s: Seconds = Field(
        TIMEOUT_S, gt=0, description="Timeout of a call; the episode of a later answer is invalid."
    )
    max_characters: Characters = Field(MAX_CHARACTERS, description="Characters of an answer that the policy sees.")

    @classmethod
    def from_text(cls, text: str) -> Mapping[str, Any]:
        """Return the values that a text in place of a section means."""
        return {"url": text}

    @property
    def title(self) -> str:
        """What messages call the server."""
        return f"MCP server {self.url or ' '.join(self.command)!r}"

    @model_validator(mode="after")
    def _is_reached_one_way(self) -> McpServer:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server has either a command or a url")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} does not begin with http:// or https://")
        return self


class ToolSettings(Config):
    """What an environment's settings say about tools."""

    tools: tuple[ToolEntry, ...] = Field(
        (),
        description="Tools that the policy may call: calculator, python, {name: retrieval, corpus: …}, or the path of "
        "a function or class.",
    )
    mcp: tuple[McpServer, ...] = Field((), description="MCP servers, whose tools the policy may call.")


class ToolsEnvironmentSettings(EnvironmentSettings, ToolSettings):
    """Settings of `tools`: a conversation that ends with the first reply without a call."""

    @model_validator(mode="after")
    def _has_tools(self) -> ToolsEnvironmentSettings:
        if not (self.tools or self.mcp):
            raise ValueError("the environment tools needs tools (such as tools=[calculator]) or mcp servers")
        return self
