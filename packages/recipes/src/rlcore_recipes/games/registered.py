"""What the entry point of algorithms imports: the games and the advantage estimator register themselves."""

from rlcore_recipes.games import advantages, nim, tic_tac_toe

__all__ = ["advantages", "nim", "tic_tac_toe"]
