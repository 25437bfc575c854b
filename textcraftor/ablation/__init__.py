"""Ablations: the tables of the paper, measured on a run's own base, rewards and prompts.

`rows` says what each table trains and how it samples, `plan` in which workspaces, `jobs` runs the pipeline's verbs in them,
`results` reads what came out, `page` and `plots` show it.
"""
