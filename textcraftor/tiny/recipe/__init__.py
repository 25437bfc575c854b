"""How the tiny base model and the tiny rewards came to be: every weight in `data/tiny`, from rendered scenes alone."""
