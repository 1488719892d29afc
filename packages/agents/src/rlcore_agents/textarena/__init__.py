"""TextArena: games in text for one or several players."""
