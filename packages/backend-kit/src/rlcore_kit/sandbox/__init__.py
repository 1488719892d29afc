"""Sandboxes: code that models write runs here and nowhere else.

A sandbox is a process tree in Linux namespaces that it cannot leave: no network, a read-only system, no files of the
host except the system's, Python and its packages, a private /tmp of limited size, and limits on memory, CPU time,
processes and output.

- `settings`: what code in a sandbox may use.
- `detection`: which of the ways to make a sandbox works on this machine; there is no way around it.
- `session`: a sandbox that runs Python code, one piece after the other with one state, or a command.
- `programs`: what runs in the sandbox's processes. It imports the standard library only, and starts in 20 ms.
"""
