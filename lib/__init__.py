"""Algorithms and experiments behind the book. Rooms import only downward, top to bottom:

chapter > claims, figures, experiments > runs > finetune > bandit > methods
> rollouts, losses, advantages, divergences, stats
"""
