"""The entry point."""

from __future__ import annotations

import subprocess
import sys


def test_the_plugin_is_found_without_importing_torch() -> None:
    program = (
        "import sys; from rlcore import plugins; "
        "assert plugins.get('rlcore.rollout_engines', 'inline').config_class().__name__ == 'InlineSettings'; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
