"""Pipelines: stages from every folder chained into one run that can be taken up again."""
