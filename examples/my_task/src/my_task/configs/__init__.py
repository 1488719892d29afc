"""Ready-made configurations: `rlcore run hard_prompts --config NAME`."""
