"""The `inline` rollout engine, in pure PyTorch: generates with weights that a training engine in its process lends it.

- `engine` implements `rlcore.engines.RolloutEngine` and owns weights, cache and scheduler.
- `scheduler` is the continuous batching; `sequence` one request, `sampling`, `seeds` and `stopping` its tokens.
- `direct` and `generic` are the two decoders, on `attention` and `kv_cache`; `verification` checks a decoder against
  the model's forward pass.
- `weights` is a copy of the model, for a rollout in another process than the trainer.
"""
