"""Entry points of the rewards in this package. Nothing is imported until a reward is used.

Factory contract of the group ``rlcore.rewards``: ``factory(options: Config, settings: RewardSettings) -> Reward``.
"""

from rlcore.plugins import Plugin

gsm8k = Plugin(
    interface=1,
    config="rlcore_rewards.gsm8k:GSM8KOptions",
    factory="rlcore_rewards.gsm8k:GSM8KReward",
    summary="The number after #### (or the last number) equals the ground truth",
)
math = Plugin(
    interface=1,
    config="rlcore_rewards.math:MathOptions",
    factory="rlcore_rewards.math:math_reward",
    summary="The last expression is mathematically equal to the ground truth (math-verify)",
)
none = Plugin(
    interface=1,
    config="rlcore_rewards.nothing:NoRewardOptions",
    factory="rlcore_rewards.nothing:NoReward",
    summary="No reward: a reward model alone scores completions",
)
function = Plugin(
    interface=1,
    config="rlcore_rewards.function:FunctionOptions",
    factory="rlcore_rewards.function:function_reward",
    summary="Any Python function, by file or import path",
)
combine = Plugin(
    interface=1,
    config="rlcore_rewards.combine:CombineOptions",
    factory="rlcore_rewards.combine:CombinedReward",
    summary="The weighted sum of several rewards",
)
data_source = Plugin(
    interface=1,
    config="rlcore_rewards.by_source:BySourceOptions",
    factory="rlcore_rewards.by_source:BySourceReward",
    summary="Another reward for each data set, by the sample's data_source (GSM8K, MATH and AIME are known)",
)
