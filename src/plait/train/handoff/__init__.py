"""Rollouts for trainers of others: verl, TRL and verifiers. Each is one file that imports its package."""
