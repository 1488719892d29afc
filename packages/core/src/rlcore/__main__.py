"""``python -m rlcore`` is the command ``rlcore``, for launchers that want a module (``torchrun -m rlcore run …``)."""

from rlcore.cli import main

main()
