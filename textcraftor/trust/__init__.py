"""What makes a model trustworthy: the policy of its registered model, one signed statement, and one verifier."""
