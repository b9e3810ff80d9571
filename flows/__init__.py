"""The flows: order of stages, policy, and where work runs. No arithmetic and no file formats."""

import tasks as tasks  # sets Prefect's environment before anything here imports Prefect
