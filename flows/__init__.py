"""Sentences: order, policy, where things run. No arithmetic and no file formats live here."""

import tasks as tasks  # sets Prefect's environment before anything here imports Prefect
