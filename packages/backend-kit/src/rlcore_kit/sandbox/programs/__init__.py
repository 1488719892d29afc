"""Programs of a sandbox's processes, outside in: `namespaces` (or bwrap), `supervisor`, `worker`."""
