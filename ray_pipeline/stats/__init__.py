"""Statistics, one of each: kappa, bootstrap, intervals, lengths, win rates."""
