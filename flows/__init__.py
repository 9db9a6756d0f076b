"""The command line and the Prefect flow: the only package that imports Prefect."""
