"""From prompts to scored groups: the one path that every kind of training and validation takes.

A *group* is the completions of one prompt. `roll_out.roll_out` is the coroutine that makes one: episodes → scores →
keep or drop. What differs is only who starts these coroutines, and when:

- `synchronous.SynchronousGroups` starts all groups of a step and waits; with dynamic sampling it starts replacements of
  dropped groups.
- `asynchronous.AsynchronousGroups` keeps groups in flight while earlier steps train, within the staleness bound
  (`group_scheduler`).
- `rlcore_recipes.step.validation` starts the groups of the held-out prompts.
"""
