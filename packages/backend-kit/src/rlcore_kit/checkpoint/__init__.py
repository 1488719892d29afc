"""Checkpoints of training engines: files that all ranks of an engine write in parallel, in the background.

A checkpoint of a run has three kinds of files that describe it, one for each writer:

- **Rank file** ``rank-NNNNN.safetensors`` (`rank_files`, `tensor_file`): the parts of weights and optimizer states that
  one rank owns, and its random states. Each rank writes its file without communicating.
- **Engine manifest** ``checkpoint.json`` (`rank_files.RankManifest`), in the same folder: which parts of which tensors
  each rank file holds, the shapes of the full tensors, the step of the learning-rate schedule, and size and SHA-256 of
  every file. Rank 0 writes it after all ranks have written, so that a folder with an engine manifest is complete. Each
  engine extends it by its description: the FSDP engine by ranges of rows and its adapters (`rlcore_fsdp.checkpoint`),
  the Megatron engine by blocks of Megatron's global tensors (`rlcore_megatron.checkpoint`).
- **Run manifest** ``manifest.json`` (`rlcore_recipes.checkpoint.manifest`), one level above the folders of engines:
  step, the metric that selects the best checkpoint, and size and SHA-256 of every other file, engine manifests
  included. A recipe writes it last; a checkpoint without it is incomplete and is never loaded.

An engine does not know the run: `TrainEngine.load` reads the folder of an engine alone. The run manifest does not know
what the files of an engine contain. All manifests are models of `rlcore_kit.checkpoint.json_file`, whose validation is
the check for damage; nothing here reads or writes a pickle.

`background_save` writes while training continues; `random_states` collects and restores the random generators.
"""
