"""Studies: small sets of runs that together answer one question, made by one command each."""
