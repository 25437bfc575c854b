"""The story of a run, readable aloud: `full` makes and judges candidates, `promote` hands one over."""
