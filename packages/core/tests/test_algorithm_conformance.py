"""Every built-in estimator and policy loss passes the conformance suite."""

from __future__ import annotations

from rlcore.algorithms import advantages, policy_losses
from rlcore_kit.testing.algorithms import AdvantageConformance, PolicyLossConformance

for _suite, _registry in ((AdvantageConformance, advantages), (PolicyLossConformance, policy_losses)):
    for _entry in (entry for entry in _registry if entry.function.__module__.startswith("rlcore.")):
        _name = f"Test {_entry.kind} {_entry.name}".title().replace(" ", "").replace("-", "")
        globals()[_name] = type(_name, (_suite,), {"name": _entry.name})

del _suite, AdvantageConformance, PolicyLossConformance
