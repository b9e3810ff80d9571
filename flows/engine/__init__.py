"""What flows need of Prefect and the shell: command lines, names, run folders, runners, the GPU slot."""
