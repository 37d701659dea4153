"""What is done to a run and what is seen then; `python -m train.faults` makes a table of it."""
