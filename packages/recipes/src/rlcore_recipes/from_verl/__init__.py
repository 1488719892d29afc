"""``rlcore from-verl``: read verl's commands, scripts and configuration files, and write rlcore's configuration.

    shell script ─── shell/ ─┐
    command line ────────────┼─ hydra.py ─ VerlCommand ─ translate.py ─ Translation ─ rlcore YAML
    verl's YAML ─────────────┘

Nothing that is read is executed. Nothing here imports torch.
"""
