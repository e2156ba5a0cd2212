"""Bradley-Terry strengths of choix: without and with its L2 penalty."""

import choix
from bridge import inputs, save

given = inputs()
games = [(int(winner), int(loser)) for winner, loser in given["games"]]
save(
    likelihood=choix.ilsr_pairwise(given["systems"], games, alpha=0.0, max_iter=1000, tol=1e-13),
    penalized=choix.opt_pairwise(given["systems"], games, alpha=given["alpha"], method="Newton-CG", tol=1e-13),
)
