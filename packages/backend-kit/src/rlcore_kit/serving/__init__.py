"""What rollout engines over inference servers share, whatever the servers are."""
