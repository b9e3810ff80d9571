"""Parts of flows that deal with Prefect and the shell: command lines, names, run folders, runners, the GPU slot."""
