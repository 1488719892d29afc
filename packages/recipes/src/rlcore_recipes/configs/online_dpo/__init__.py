"""Ready-made configurations of the recipe online_dpo."""
