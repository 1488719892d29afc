"""What the entry point of the recipe names. Listing recipes imports this file, and nothing else of the package."""

from rlcore.plugins import Plugin

hard_prompts = Plugin(
    interface=1,
    config="my_task.recipe:HardPromptsConfig",
    factory="my_task.recipe:run",
    configs="my_task.configs",
    summary="Policy gradient that weighs prompts by how seldom they are answered.",
)
