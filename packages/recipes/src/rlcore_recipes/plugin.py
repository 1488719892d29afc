"""The entry points of this package; importing them loads neither torch nor a tracker's library."""

from rlcore.plugins import Plugin

sft = Plugin(
    interface=1,
    config="rlcore_recipes.sft:SFTConfig",
    factory="rlcore_recipes.sft:run",
    configs="rlcore_recipes.configs.sft",
    summary="Supervised fine-tuning on conversations or prompts with responses.",
)
rm = Plugin(
    interface=1,
    config="rlcore_recipes.rm:RewardModelConfig",
    factory="rlcore_recipes.rm:run",
    configs="rlcore_recipes.configs.rm",
    summary="Reward models from preference pairs, or from labels of answers or their steps.",
)
dpo = Plugin(
    interface=1,
    config="rlcore_recipes.dpo:PreferenceConfig",
    factory="rlcore_recipes.dpo:run",
    configs="rlcore_recipes.configs.dpo",
    summary="Preference optimisation on a data set: DPO, IPO, KTO, ORPO, SimPO and others.",
)
online_dpo = Plugin(
    interface=1,
    config="rlcore_recipes.online_dpo:OnlinePreferenceConfig",
    factory="rlcore_recipes.online_dpo:run",
    configs="rlcore_recipes.configs.online_dpo",
    summary="Preference optimisation on the policy's own completions, compared by a reward (Guo et al., 2024).",
)
spin = Plugin(
    interface=1,
    config="rlcore_recipes.spin:SpinConfig",
    factory="rlcore_recipes.spin:run",
    configs="rlcore_recipes.configs.spin",
    summary="Self-play fine-tuning: demonstrations preferred to the policy's own completions (Chen et al., 2024).",
)
grpo = Plugin(
    interface=1,
    config="rlcore_recipes.grpo:GRPOConfig",
    factory="rlcore_recipes.grpo:run",
    configs="rlcore_recipes.configs.grpo",
    summary="Group-relative policy optimisation (Shao et al., 2024).",
)
ppo = Plugin(
    interface=1,
    config="rlcore_recipes.ppo:PPOConfig",
    factory="rlcore_recipes.ppo:run",
    configs="rlcore_recipes.configs.ppo",
    summary="Proximal policy optimisation with a critic (Schulman et al., 2017).",
)
dapo = Plugin(
    interface=1,
    config="rlcore_recipes.dapo:DAPOConfig",
    factory="rlcore_recipes.dapo:run",
    configs="rlcore_recipes.configs.dapo",
    summary="GRPO with clip-higher, dynamic sampling and overlong shaping (Yu et al., 2025).",
)
raft = Plugin(
    interface=1,
    config="rlcore_recipes.raft:RaftConfig",
    factory="rlcore_recipes.raft:run",
    configs="rlcore_recipes.configs.raft",
    summary="Rejection sampling (best-of-n, RAFT, expert iteration, STaR, reward-weighted SFT; Dong et al., 2023).",
)
prime = Plugin(
    interface=1,
    config="rlcore_recipes.prime:PRIMEConfig",
    factory="rlcore_recipes.prime:run",
    configs="rlcore_recipes.configs.prime",
    summary="Implicit process rewards of a model trained online on outcomes (Cui et al., 2025).",
)

self_play = Plugin(
    interface=1,
    config="rlcore_recipes.self_play:SelfPlayConfig",
    factory="rlcore_recipes.self_play:run",
    configs="rlcore_recipes.configs.self_play",
    summary="Self-play on two-player text games (Liu et al., 2025).",
)

distill = Plugin(
    interface=1,
    config="rlcore_recipes.settings.distillation:DistillConfig",
    factory="rlcore_recipes.distill:run",
    configs="rlcore_recipes.configs.distill",
    summary="Distillation from teachers, on the student's completions or given ones (Agarwal et al., 2023).",
)

game_reward = Plugin(
    interface=1,
    config="rlcore.config.registry:NoParams",
    factory="rlcore_recipes.games.reward:GameReward",
    summary="Outcome of a game of the recipe self_play.",
)

environment_reward = Plugin(
    interface=1,
    config="rlcore.config.registry:NoParams",
    factory="rlcore_recipes.rollouts.environment_reward:EnvironmentReward",
    summary="Score that the episodes of rollout.environment give.",
)

console_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:ConsoleSettings",
    factory="rlcore_recipes.trackers.console:open_console",
    summary="Progress bar and a table of steps on the terminal.",
)
jsonl_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:JsonlSettings",
    factory="rlcore_recipes.trackers.jsonl:open_jsonl",
    summary="Metrics and tables as lines of JSON in the output folder.",
)
wandb_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:WandbSettings",
    factory="rlcore_recipes.trackers.wandb:open_wandb",
    summary="Weights & Biases, online or offline.",
)
tensorboard_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:TensorboardSettings",
    factory="rlcore_recipes.trackers.tensorboard:open_tensorboard",
    summary="TensorBoard event files.",
)
swanlab_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:SwanlabSettings",
    factory="rlcore_recipes.trackers.swanlab:open_swanlab",
    summary="SwanLab, online, offline or with its local dashboard.",
)
mlflow_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:MlflowSettings",
    factory="rlcore_recipes.trackers.mlflow:open_mlflow",
    summary="MLflow, a server or a data base.",
)
trackio_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:TrackioSettings",
    factory="rlcore_recipes.trackers.trackio:open_trackio",
    summary="Trackio, local or on the Hugging Face Hub.",
)
parquet_tracker = Plugin(
    interface=1,
    config="rlcore_recipes.trackers.settings:ParquetSettings",
    factory="rlcore_recipes.trackers.parquet:open_parquet",
    summary="Rollouts and other tables as Parquet files in the output folder.",
)
