"""Many runs from one command: plans them, and trains those that have not finished."""
