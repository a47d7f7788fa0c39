"""Algorithms and experiments behind the book. Rooms import only downward, top to bottom:

chapter, figures > theory > claims, tables > experiments > bandit, lm > training > finetune
> methods > rollouts, losses, advantages, controllers, divergences, stats

`runs` stands beside them and imports none: it computes whatever engine it is given.
"""
