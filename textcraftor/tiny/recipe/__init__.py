"""The recipe of the tiny base model and the tiny rewards: trains every weight in `data/tiny` from rendered scenes alone."""
