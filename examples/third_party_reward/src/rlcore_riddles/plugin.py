"""What the entry point names. Listing plugins imports this file, and nothing else of the package."""

from rlcore.plugins import Plugin

riddles = Plugin(
    interface=1,
    config="rlcore_riddles.riddles:RiddlesOptions",
    factory="rlcore_riddles.riddles:RiddlesReward",
    summary="The last word is the ground truth",
)
