"""Agents: episodes of many turns, environments, tools, and a gateway for any agent program."""
