"""`quorum submit`: a run as a job of a Ray cluster, from the working directory of the user."""
