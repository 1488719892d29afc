"""Any agent program in an episode: OpenAI's and Anthropic's protocols, recorded as trees of exact tokens."""
